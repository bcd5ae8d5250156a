"""GMT: of each tensor's gradient only the largest entries take part in a step.

Source: Li, Zhang, Liu, Gong, Wang, Chen, Cheng, AAAI 2025 (arXiv:2406.15330), gradient-mask tuning.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from luthier.core.anatomy import select_all
from luthier.core.claims import Claim, Place, needs, owns, wraps
from luthier.core.context import Context
from luthier.core.ingredient import Ingredient, ingredient
from luthier.core.masks import masked
from luthier.core.table import ParamTable


def largest(gradient: Tensor, keep_ratio: float) -> Tensor:
    """M: true at the k entries of largest |g|, k = max(1, round(keep_ratio n)) of the tensor's n entries; never where g is 0.

    Args:
        gradient: g, any shape, the mean over all rows of the step.
        keep_ratio: share of the entries that is kept, in (0, 1].
    Returns:
        bool, the shape of ``gradient``, k true, or as many as are not 0 if they are fewer; which of entries that are equal is left to
        the selection.
    Source: Li et al., the mask M of the accumulated gradient.
    Differs: their threshold keeps all entries that equal the k-th, which may be more than k; k is rounded, and at least 1. An entry
        without a gradient is never kept.
    """
    live, size = gradient != 0, gradient.numel()
    k = max(1, round(keep_ratio * size))
    if gradient.device.type != "cpu":  # without waiting for a count
        mask = torch.zeros(size, dtype=torch.bool, device=gradient.device)
        mask[gradient.abs().flatten().topk(min(k, size), sorted=False).indices] = True
        return mask.view(gradient.shape) & live
    rest = int(live.count_nonzero()) - k
    if rest <= 0:
        return live
    dense = rest + k == size
    values = (gradient.flatten() if dense else gradient[live]).abs()
    # numpy's selection takes a tenth of the time of torch's, and knows no bfloat16
    wide = values.to(torch.promote_types(values.dtype, torch.float32)).numpy()
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[torch.from_numpy(np.argpartition(wide, rest)[rest:])] = True
    return mask.view(gradient.shape) if dense else live.masked_scatter(live, mask)


@ingredient
class GMT(Ingredient):
    """Before each step keeps the largest entries of each tensor's accumulated gradient and sets the others to zero.

    Args:
        keep_ratio: share of each tensor's entries that is kept, at most: those without a gradient are not; at 1 nothing changes.
        where: selectors of the weights; all others learn as usual.
        strict: entries that are not kept stand still in this step, bit for bit; otherwise momentum and weight decay move them, as in
            the paper, whose rule is about the gradient alone.
    Differs: strict is ours.
    """

    keep_ratio: Annotated[float, Field(gt=0, le=1)] = 0.2
    where: Annotated[tuple[str, ...], Field(min_length=1)] = ("all",)
    strict: bool = False

    def touches(self) -> tuple[Claim, ...]:
        # wraps: refuses what does away with gradients; owns: one mask a weight; whole: the k-th largest is that of the whole tensor
        return (wraps(Place.GRADIENT, *self.where), owns(Place.GRADIENT, *self.where), needs(Place.WHOLE_WEIGHTS))

    def optimizer(self, inner: Optimizer, ctx: Context) -> Optimizer:
        if self.keep_ratio == 1.0:
            return inner
        chosen = select_all(ctx.anatomy, self.where)
        return masked(inner, chosen, lambda name, gradient: largest(gradient, self.keep_ratio), strict=self.strict)

    def state_bytes(self, table: ParamTable) -> int:
        """With ``strict`` a copy of the weights, and their masks while the step is taken; otherwise one mask at a time."""
        chosen = table.select(self.where)
        parts = [row.part for row in table.rows if row.trainable and row.name in chosen]
        if self.keep_ratio == 1.0:
            return 0
        return (
            sum(part.bytes + part.numel for part in parts) if self.strict else max((p.numel for p in parts), default=0)
        )
