"""SAM: the step is taken by the gradient a little uphill, so that the weights end where the loss around them is low too.

Source: Foret, Kleiner, Mobahi, Neyshabur, ICLR 2021, equations 2 and 3 (arXiv:2010.01412); scaled by the weights: ASAM, Kwon, Kim, Park,
Choi, ICML 2021 (arXiv:2102.11600).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from luthier.core.claims import Claim, Place, needs, wraps
from luthier.core.closure import Closure
from luthier.core.context import Context
from luthier.core.ingredient import Ingredient, ingredient
from luthier.core.table import ParamTable
from luthier.errors import ConflictError, Fault


def reach(weights: Sequence[Tensor], gradients: Sequence[Tensor], *, rho: float, adaptive: bool) -> Tensor:
    """What the direction uphill is multiplied by: rho / |T g|, with T = |w| elementwise where ``adaptive``, else 1.

    Args:
        weights: w, any shapes; may be sharded.
        gradients: g, of the same shapes and placement.
        rho: how far to go, in units of the weights (of relative change where ``adaptive``).
    Returns:
        shape (), float64 where a weight is, else float32; 0 where |T g| is zero or no finite number, so that nothing moves.
    Source: equation 2 of the paper with p = 2; ASAM for ``adaptive``.
    Differs: no small number is added to |T g|, as a gradient of zero is told apart.
    """
    squares = []
    for weight, gradient in zip(weights, gradients, strict=True):
        slope = wide(gradient)
        square = (slope * weight.abs() if adaptive else slope).square().sum()
        squares.append(square.full_tensor() if hasattr(square, "full_tensor") else square)
    norm = torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()
    return torch.where(torch.isfinite(norm) & (norm > 0), rho / norm, torch.zeros_like(norm))


def climb(weights: Sequence[Tensor], gradients: Sequence[Tensor], *, rho: float, adaptive: bool) -> None:
    """Moves the weights uphill, in place: w <- w + rho T^2 g / |T g|.

    Args:
        weights, gradients, rho, adaptive: as in ``reach``.
    Source: equation 2 with p = 2; ASAM for ``adaptive``.
    Differs: every weight is scaled where ``adaptive``, biases and norms too, and T is |w| without the 0.01 that ASAM's code adds, so
        that a weight of zero stays.
    """
    factor = reach(weights, gradients, rho=rho, adaptive=adaptive)
    for weight, gradient in zip(weights, gradients, strict=True):
        move = wide(gradient) * factor.to(gradient.device)
        if adaptive:
            move = move * weight.square()
        weight.add_(torch.nan_to_num(move, nan=0.0, posinf=0.0, neginf=0.0))  # 0 times inf, where nothing is to move


def wide(value: Tensor) -> Tensor:
    """``value`` in at least single precision."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


@ingredient
class SAM(Ingredient):
    """Evaluates each step twice: the gradient at w says where uphill is, that at w + rho g / |g| is the one the optimizer steps by.

    The weights come back bit for bit before the step, whatever the optimizer. Both evaluations see the same rows and, in a recipe, the
    same dropout. What is averaged over all processes and micro-batches is the gradient of the whole step, both times.

    Args:
        rho: how far uphill, in units of the weights; 0 changes nothing.
        adaptive: whether the way is scaled by |w| (ASAM), so that rho is a relative change; ten times the ``rho`` is a usual start.
    Raises:
        ConflictError: the optimizer replaces gradients itself.
    """

    rho: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.05
    adaptive: bool = False

    def touches(self) -> tuple[Claim, ...]:
        return (wraps(Place.STEP), needs(Place.GRADIENT))

    def optimizer(self, inner: Optimizer, ctx: Context) -> Optimizer:
        if not self.rho:
            return inner
        if hasattr(inner, "offer"):
            must = "needs an optimizer that steps by gradients, and this one replaces them"
            raise ConflictError.of([Fault("sam", must, type(inner).__name__, "Drop one.")], "the stage")

        def offer(closure: Closure) -> Tensor:
            inner.zero_grad(set_to_none=True)
            first = closure.backward()
            weights = [w for group in inner.param_groups for w in group["params"] if w.grad is not None]
            if not weights:
                return first
            with away(weights), statistics_kept(closure.model):
                with torch.no_grad():
                    climb(weights, [weight.grad for weight in weights], rho=self.rho, adaptive=self.adaptive)
                inner.zero_grad(set_to_none=True)
                second = closure.backward()
            return torch.where(torch.isfinite(second), first, second)  # what steps must be a number; w is where it was

        # On the optimizer itself: whatever hooks onto it, schedules it or saves it, before or after, has the same object.
        inner.offer = offer  # type: ignore[attr-defined]
        return inner

    def state_bytes(self, table: ParamTable) -> int:
        """A copy of what learns, while it is uphill."""
        return sum(row.part.bytes for row in table.rows if row.trainable) if self.rho else 0


@contextmanager
def away(weights: Sequence[Tensor]) -> Iterator[None]:
    """The weights may be moved inside it; afterwards they are bit for bit what they were, also after an error."""
    kept = [weight.detach().clone() for weight in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, was in zip(weights, kept, strict=True):
                weight.copy_(was)


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Running statistics (the buffers that are saved with a model) are afterwards what they were."""
    saved = [
        buffer
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    ]
    with away(saved):
        yield
