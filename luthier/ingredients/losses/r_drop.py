"""R-Drop: every batch goes through the model twice under two dropout masks, and the two answers are pulled together.

Source: Wu et al., NeurIPS 2021 (arXiv:2106.14448), equations 1 to 3.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.core.claims import Claim, Place, needs, wraps
from luthier.core.closure import LossFn
from luthier.core.context import Context
from luthier.core.heard import heard
from luthier.core.ingredient import Ingredient, ingredient


def disagreement(first: Tensor, second: Tensor) -> Tensor:
    """How far two passes are apart, the mean over rows: (KL(p1 || p2) + KL(p2 || p1)) / 2, p the softmax of the logits.

    The two divergences together are the sum over classes of (p1 - p2) (log p1 - log p2). A single output is a number and
    not a distribution: there it is the squared difference of the outputs.

    Args:
        first: logits of one pass, shape (rows, outputs), any float type.
        second: those of the other, the same shape.
    Returns:
        shape (), at least single precision; nats a row, or the label's unit squared where there is one output. Its
        gradient reaches both.
    Source: equation 1.
    Differs: the authors' code for GLUE sums over the rows where this takes the mean; for one output it has the mean
        squared difference, as here.
    """
    wide = torch.promote_types(first.dtype, torch.float32)
    first, second = first.to(wide), second.to(wide)
    if first.shape[-1] == 1:
        return (first - second).square().mean()
    one, other = first.log_softmax(-1), second.log_softmax(-1)
    return ((one.exp() - other.exp()) * (one - other)).sum(-1).mean() / 2


@ingredient
class RDrop(Ingredient):
    """Adds alpha times the disagreement of two passes under dropout to the mean of their two losses.

    The loss is (L1 + L2) / 2 + alpha (KL(p1 || p2) + KL(p2 || p1)) / 2, and gradients flow through both passes. The second
    pass draws its dropout where the first left off, so a step that is evaluated again sees the same two masks. At ``alpha``
    0 there is no second pass: the loss is the inner one, bit for bit. In a model without dropout the two passes agree, and
    nothing but time is lost; a note says so.

    Args:
        alpha: weight of the disagreement. At 0 it changes nothing.
    Differs: the paper adds the two losses where this takes their mean; and see ``disagreement``. The authors' code for GLUE
        is CE1 + CE2 + (sum over B rows of KL + KL) / 4, twice ours with alpha = B / 4: 4 at its batch of 16, 8 at 32. Its
        regression is ours with alpha = 1/2.
    """

    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0

    def touches(self) -> tuple[Claim, ...]:
        return (wraps(Place.LOSS), needs(Place.NOISE))

    def loss(self, inner: LossFn, ctx: Context) -> LossFn:
        if not self.alpha:
            return inner

        def twice(model: nn.Module, batch: Any) -> Tensor:
            with heard(model) as first:
                one = inner(model, batch)
            with heard(model) as second:
                other = inner(model, batch)
            if not ctx.progress.step and model.training and torch.equal(first[0], second[0]):
                ctx.note("r_drop's two passes gave the same logits: the model has no dropout that is on.")
            return (one + other) / 2 + self.alpha * disagreement(first[0], second[0])

        return twice

    def waiting(self, above: int, below: int) -> tuple[int, int]:
        return (2 * above, 2 * below) if self.alpha else (above, below)
