"""L2-SP: a penalty that pulls pretrained weights to where they started, and new weights to zero.

Source: Li, Grandvalet, Davoine, ICML 2018, equation 4 (arXiv:1802.01483).
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
from luthier.core.table import ParamTable
from luthier.core.wrappers import placed, trained

Strength = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def distance(weight: Tensor, start: Tensor | None) -> Tensor:
    """Half the squared distance to ``start`` (or to zero): ||w - w0||^2 / 2. Its gradient is w - w0.

    Args:
        weight: any shape, any float type; may be sharded.
        start: the same shape and placement, or None.
    Returns:
        shape (), at least single precision, the same on every process.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    total = (wide if start is None else wide - start).square().sum() / 2
    whole: Tensor = total.full_tensor() if hasattr(total, "full_tensor") else total
    return whole


@ingredient
class L2SP(Ingredient):
    """Adds alpha/2 ||w - w0||^2 for pretrained weights w and beta/2 ||v||^2 for new ones v to the loss.

    w0 are the weights at the start of the stage. New are the head, and weights that were not there then (LoRA's).
    Only trainable weights count. The defaults are the values of the authors' script.

    Args:
        strength: alpha, the pull to the start.
        head_strength: beta, the pull of new weights to zero.
    Differs: w0 is where this stage starts, which after an earlier stage is no longer what was downloaded. Biases and
        norms are pulled too, as in the authors' code by its mode 101; its mode 1 pulls matrices only.
    """

    strength: Strength = 0.1
    head_strength: Strength = 0.01

    def touches(self) -> tuple[Claim, ...]:
        return (wraps(Place.LOSS), needs(Place.REFERENCE, "backbone"))

    def loss(self, inner: LossFn, ctx: Context) -> LossFn:
        if not self.strength and not self.head_strength:
            return inner
        parts = {part.name: part for part in ctx.anatomy.parts}
        starts: dict[str, Tensor] = {}  # the reference, placed like the weights at its first use

        def pulled(model: nn.Module, batch: Any) -> Tensor:
            loss = inner(model, batch)
            for part, weight in trained(model, parts, signer="l2sp"):
                start = None if part.role == "head" else ctx.reference.get(part.canonical)
                strength = self.head_strength if start is None else self.strength
                if not strength:
                    continue
                if start is not None:
                    if part.name not in starts:
                        starts[part.name] = placed(start, weight)
                    start = starts[part.name]
                loss = loss + strength * distance(weight, start)
            return loss

        return pulled

    def works_on(self, table: ParamTable, started: frozenset[str]) -> frozenset[str] | None:
        if not self.strength and not self.head_strength:
            return None
        new = {row.name for row in table.rows if row.part.role == "head" or row.part.canonical not in started}
        return frozenset(row.name for row in table.rows if (self.head_strength if row.name in new else self.strength))

    def state_bytes(self, table: ParamTable) -> int:
        if not self.strength and not self.head_strength:
            return 0
        start = sum(row.part.bytes for row in table.rows)
        differences = sum(4 * row.part.numel for row in table.rows if row.trainable)  # they wait for the backward pass
        return start + differences
