"""SMART: a penalty on how far the answer moves when the word embeddings move a little, and a pull to where the model was.

Source: Jiang, He, Chen, Liu, Gao, Zhao, ACL 2020 (arXiv:1911.03437).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from luthier.core.claims import Claim, Place, needs, wraps
from luthier.core.closure import LossFn
from luthier.core.context import Context, Tensors
from luthier.core.heard import aside, heard
from luthier.core.ingredient import Ingredient, ingredient
from luthier.core.modes import paused
from luthier.core.perturb import (
    afresh,
    copied,
    embeddings,
    lent,
    named,
    perturbed,
    process,
    rewinder,
    slope,
    uncompiled,
    zeros,
)
from luthier.core.table import ParamTable

Positive = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """How far two answers are apart, the mean over rows: KL(p || q) + KL(q || p) = sum of (p - q) (log p - log q).

    Args:
        first, second: logits, shape (rows, outputs), any float type. One output is a number: then it is (a - b)^2.
    Returns:
        shape (), at least single precision; nats a row, or the label's unit squared. It is the paper's l_s.
    """
    wide = torch.promote_types(first.dtype, torch.float32)
    first, second = first.to(wide), second.to(wide)
    if first.shape[-1] == 1:
        return (first - second).square().mean()
    one, other = first.log_softmax(-1), second.log_softmax(-1)
    return ((one.exp() - other.exp()) * (one - other)).sum(-1).mean()


def climbed(delta: Tensor, gradient: Tensor, *, step: float, radius: float) -> Tensor:
    """One step uphill inside a box: delta + step g / max |g|, every entry held in [-radius, radius]; the maximum is a token's.

    Args:
        delta, gradient: shape (rows, length, width).
        step, radius: in the unit of the embeddings. A token without a gradient stays where it is.
    Source: algorithm 1; the largest entry is a token's own, as in the authors' code.
    Differs: that code, as of 28 April to 26 August 2020, steps from zero and not from the start, adds 1e-6 to the divisor,
        and has no box. Since then it divides start + step g by its largest entry, which is then about 1 for any step.
    """
    largest = gradient.abs().amax(-1, keepdim=True)
    direction = gradient / largest.where(largest > 0, torch.ones_like(largest))
    return (delta + step * direction).clamp(-radius, radius)


def followed(teacher: Tensor, weight: Tensor, beta: float) -> Tensor:
    """The teacher, at least single precision, goes a little of the way to the weight, in place: t <- beta t + (1 - beta) w."""
    return teacher.lerp_(weight.to(teacher.dtype), 1.0 - beta)


@ingredient
class SMART(Ingredient):
    """Adds lambda l_s(f(x), f(x + delta)) and mu l_s(f(x), f_teacher(x)) to the loss; l_s is ``divergence``.

    delta is drawn from N(0, sigma^2) at every real token and climbs once. The teacher is an average of the weights along
    the stage and answers without dropout. The clean pass and the perturbed ones share their dropout masks.

    Args:
        strength: lambda, of the smoothness. At 0, or with ``radius`` 0, delta is not looked for.
        step: eta, how far the largest entry of a token climbs, in the unit of the word embeddings. The default is ours, 0.18
            of the root mean square of MiniLM's (0.056); other families have another unit, and so another value.
        sigma: standard deviation of the start, as in the authors' code.
        radius: epsilon; no entry of delta is larger.
        pull: mu, of the pull to the teacher. At 0 there is no teacher.
        beta: share of the teacher that stays at each step.
    Differs: the authors' code draws new dropout masks for the perturbed pass, so that its difference is also dropout's,
        and does not differentiate the side of a divergence that it calls the target. Its values of ``step`` (1e-3, later
        1e-5) mean something else: see ``climbed`` and the card. ``beta`` is one number for the stage.
    """

    strength: Positive = 1.0
    step: Positive = 1e-2
    sigma: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-5
    radius: Positive = 1e-2
    pull: Positive = 0.0
    beta: Annotated[float, Field(ge=0, le=1)] = 0.99

    def touches(self) -> tuple[Claim, ...]:
        teacher = (needs(Place.WHOLE_WEIGHTS),) if self.pull else ()
        return (wraps(Place.LOSS), needs(Place.GRADIENT), *teacher)

    def surgery(self, model: nn.Module, ctx: Context) -> None:
        if self.strength and self.radius:
            embeddings(model)  # a model that does not say where they are is refused before the first step

    def loss(self, inner: LossFn, ctx: Context) -> LossFn:
        smooths = self.strength > 0 and self.radius > 0
        if not smooths and not self.pull:
            return inner

        def smooth(model: nn.Module, batch: Any) -> Tensor:
            if self.pull:
                lend = lent(model, ctx.keep("teacher", Tensors))
                with torch.no_grad(), paused(model), lend, aside(model), heard(model) as before:
                    inner(model, batch)
            rows, rewind = afresh(model, batch) if smooths else batch, rewinder(model)
            with uncompiled(model), heard(model) as clean:
                loss = inner(model, rows)
            if self.pull:
                # detached: a loss inside that takes gradients of its own (freelb) leaves a graph that is used up
                loss = loss + self.pull * divergence(clean[0], before[0].detach())
            if smooths:
                delta = self._worst(inner, model, rows, clean[0].detach(), rewind, ctx)
                rewind()
                with perturbed(model, delta), heard(model) as moved:
                    inner(model, rows)
                loss = loss + self.strength * divergence(clean[0], moved[0])
            return loss

        return smooth

    def _worst(
        self, inner: LossFn, model: nn.Module, batch: Any, clean: Tensor, rewind: Callable[[], None], ctx: Context
    ) -> Tensor:
        """The perturbation after its one step, detached; ``clean`` are the logits without it."""
        if clean.dtype in (torch.float16, torch.bfloat16):
            ctx.note("smart's start is lost in half precision and its direction is chance: raise sigma, or use fp32.")
        delta, mask = zeros(model, batch)
        draw = ctx.rng("start", ctx.progress.part, process(), device=delta.device)
        delta.normal_(0.0, self.sigma, generator=draw).mul_(mask).requires_grad_()
        rewind()
        with torch.enable_grad(), perturbed(model, delta), heard(model) as moved:
            inner(model, batch)
            gradient = slope(divergence(moved[0], clean), delta, keep=False)
        return climbed(delta.detach(), gradient * mask, step=self.step, radius=self.radius)

    def optimizer(self, inner: Optimizer, ctx: Context) -> Optimizer:
        if not self.pull:
            return inner
        teacher = ctx.keep("teacher", lambda: Tensors({name: copied(weight) for name, weight in named(inner)}))

        @torch.no_grad()
        def follow(optimizer: Optimizer, args: Any, values: Any) -> None:
            for name, weight in named(optimizer):
                followed(teacher[name], weight, self.beta)

        inner.register_step_post_hook(follow)
        return inner

    def waiting(self, above: int, below: int) -> tuple[int, int]:
        """The clean pass waits beside the one that climbs, which reaches down to the embeddings."""
        return (2 * above, above + below) if self.strength and self.radius else (above, below)

    def state_bytes(self, table: ParamTable) -> int:
        return sum(4 * row.part.numel for row in table.rows if row.trainable) if self.pull else 0
