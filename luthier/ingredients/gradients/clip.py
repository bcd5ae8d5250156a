"""Clip: the global norm of the gradient is kept below a bound.

Source: Pascanu, Mikolov, Bengio, ICML 2013 (arXiv:1211.5063), algorithm 1; computed by ``torch.nn.utils.clip_grad_norm_``.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from luthier.core.claims import Claim, Place, wraps
from luthier.core.context import Context
from luthier.core.ingredient import Ingredient, ingredient


@ingredient
class Clip(Ingredient):
    """Scales the gradient g of all trainable weights together by min(1, max_norm / (|g| + 1e-6)) before each step.

    Args:
        max_norm: the bound on the L2 norm over all weights.
    Differs from algorithm 1: torch adds 1e-6 to the norm.
    """

    max_norm: Annotated[float, Field(gt=0)] = 1.0

    def touches(self) -> tuple[Claim, ...]:
        return (wraps(Place.GRADIENT),)

    def optimizer(self, inner: Optimizer, ctx: Context) -> Optimizer:
        def clip(optimizer: Optimizer, args: Any, named: Any) -> None:
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            clip_grad_norm_(weights, self.max_norm)

        inner.register_step_pre_hook(clip)
        return inner
