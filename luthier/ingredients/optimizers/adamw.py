"""AdamW: Adam with decoupled weight decay.

Source: Loshchilov and Hutter, ICLR 2019 (arXiv:1711.05101); the update is ``torch.optim.AdamW``'s.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch.optim import AdamW as TorchAdamW
from torch.optim import Optimizer

from luthier.core.claims import Claim, Place, owns, scales
from luthier.core.context import Context
from luthier.core.groups import groups_of
from luthier.core.ingredient import Ingredient, ingredient
from luthier.core.table import ParamTable

Share = Annotated[float, Field(ge=0, lt=1)]


@ingredient
class AdamW(Ingredient):
    """Adam with decoupled weight decay; biases and norms do not decay unless asked.

    Args:
        weight_decay: per unit of learning rate.
        betas: decay of the first and second moments.
        eps: added to the root of the second moment, after bias correction.
        exclude: kinds of weights that do not decay.
    Differs from torch: the fused kernel is used wherever torch has one (CPU and CUDA floats).
    """

    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    exclude: tuple[Literal["bias", "norm", "weight"], ...] = ("bias", "norm")

    def touches(self) -> tuple[Claim, ...]:
        return (owns(Place.OPTIMIZER), scales(Place.DECAY))

    def settings(self, table: ParamTable) -> ParamTable:
        return table.decay(lambda row: 0.0 if row.part.kind in self.exclude else self.weight_decay)

    def optimizer(self, inner: Optimizer, ctx: Context) -> Optimizer:
        return TorchAdamW(groups_of(inner), betas=self.betas, eps=self.eps, fused=True)

    def state_bytes(self, table: ParamTable) -> int:
        return 2 * sum(row.part.bytes for row in table.rows if row.trainable)
