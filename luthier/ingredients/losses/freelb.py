"""FreeLB: the loss is averaged along a path of perturbations of the word embeddings that climbs to where it is high.

Source: Zhu, Cheng, Gan, Sun, Goldstein, Liu, ICLR 2020 (arXiv:1909.11764), algorithm 1.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.core.claims import Claim, Place, needs, wraps
from luthier.core.closure import LossFn
from luthier.core.context import Context
from luthier.core.ingredient import Ingredient, ingredient
from luthier.core.perturb import afresh, embeddings, perturbed, process, rewinder, slope, zeros

Positive = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def sizes(delta: Tensor) -> Tensor:
    """The L2 norm of each row's perturbation over all its tokens: shape (rows, length, width) -> (rows, 1, 1)."""
    found: Tensor = torch.linalg.vector_norm(delta, dim=(1, 2), keepdim=True)
    return found


def held(delta: Tensor, radius: float | None) -> Tensor:
    """``delta`` with each row that is longer than ``radius`` shortened to it; None holds nothing."""
    if radius is None:
        return delta
    size = sizes(delta)
    return delta * (radius / size).where(size > radius, torch.ones_like(size))


def begun(zero: Tensor, mask: Tensor, *, start: float, draw: torch.Generator) -> Tensor:
    """delta_0 = start / sqrt(N) U(-1, 1) at real tokens, N the numbers that a row has there; its norm is about start / sqrt(3).

    Args:
        zero: shape (rows, length, width); filled in place.
        mask: shape (rows, length, 1), 1 at real tokens.
        start: in the unit of the embeddings, as are all norms here.
    Source: algorithm 1, with N counted as in the authors' code.
    """
    numbers = mask.sum((1, 2), keepdim=True).clamp_min(1.0) * zero.shape[-1]
    return zero.uniform_(-1.0, 1.0, generator=draw) * mask * (start / numbers.sqrt())


def climbed(delta: Tensor, gradient: Tensor, *, rate: float, radius: float | None) -> Tensor:
    """One step uphill, row by row: delta + rate g / ||g||, held in the ball.

    Args:
        delta, gradient: shape (rows, length, width).
        rate: alpha, the length of the step. A row whose gradient is below 1e-8 takes a shorter one.
        radius: epsilon, of the ball.
    Source: algorithm 1, with the authors' code's guard of 1e-8.
    """
    return held(delta + rate * gradient / sizes(gradient).clamp_min(1e-8), radius)


@ingredient
class FreeLB(Ingredient):
    """The mean of the losses at delta_0, ..., delta_{K-1}: each one step uphill from the one before, each held as a constant.

    Its gradient is the mean of the gradients along the path, which is what the paper accumulates. All passes share one
    dropout mask. Only real tokens are perturbed. The K passes wait for the backward pass: K times the activations.

    Args:
        passes: K, of which K - 1 are followed by a step.
        rate: alpha, the length of a step.
        radius: epsilon, the largest norm of a row's perturbation; None is no bound, 0 none to perturb.
        start: how far delta_0 reaches. 0 starts at the embeddings themselves.
    Differs: the authors' code takes one backward pass a pass, for weights and delta at once, and so the activations of one;
        here the step's gradient is taken beside. delta_0 is held in the ball too.
    """

    passes: Annotated[int, Field(ge=1)] = 3
    rate: Positive = 0.1
    radius: Positive | None = 0.6
    start: Positive = 1.0

    def touches(self) -> tuple[Claim, ...]:
        return (wraps(Place.LOSS), needs(Place.GRADIENT))

    def surgery(self, model: nn.Module, ctx: Context) -> None:
        if not self._neutral():
            embeddings(model)  # a model that does not say where they are is refused before the first step

    def loss(self, inner: LossFn, ctx: Context) -> LossFn:
        if self._neutral():
            return inner

        def averaged(model: nn.Module, batch: Any) -> Tensor:
            wanted = torch.is_grad_enabled()
            rows, rewind = afresh(model, batch), rewinder(model)
            zero, mask = zeros(model, batch)
            draw = ctx.rng("start", ctx.progress.part, process(), device=zero.device)
            delta = held(begun(zero, mask, start=self.start, draw=draw), self.radius)
            losses = []
            for number in range(self.passes):
                climbs = number + 1 < self.passes
                if number:
                    rewind()
                delta.requires_grad_(climbs)
                with perturbed(model, delta), torch.set_grad_enabled(wanted or climbs):
                    loss = inner(model, rows)
                if climbs:
                    gradient = slope(loss, delta, keep=wanted) * mask
                    delta = climbed(delta.detach(), gradient, rate=self.rate, radius=self.radius)
                losses.append(loss if wanted else loss.detach())
            return torch.stack(losses).mean()

        return averaged

    def waiting(self, above: int, below: int) -> tuple[int, int]:
        """All passes wait; those that climb reach down to the embeddings."""
        return (above, below) if self._neutral() else (self.passes * above, (self.passes - 1) * above + below)

    def _neutral(self) -> bool:
        """Whether every perturbation is zero."""
        return self.radius == 0 or (self.start == 0 and (self.passes == 1 or self.rate == 0))
