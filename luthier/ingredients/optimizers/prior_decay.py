"""Prior decay: weight decay that pulls to the weights at the start of the stage instead of to zero.

Source: weight decay towards the pretrained weights, as in Lee, Cho, Kang, ICLR 2020 (arXiv:1909.11299); the step is that of
``prior_wd_optim`` in the code of Zhang, Wu, Katiyar, Weinberger, Artzi, ICLR 2021 (arXiv:2006.05987).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from luthier.core.anatomy import Part, select_all
from luthier.core.claims import Claim, Place, needs, scales
from luthier.core.context import Context
from luthier.core.ingredient import Ingredient, ingredient
from luthier.core.table import ParamTable
from luthier.core.wrappers import placed


@torch.no_grad()
def pull(weight: Tensor, start: Tensor | None, share: float) -> None:
    """Goes a share of the way to ``start`` (or to zero), in place: w <- w - share (w - w0).

    Args:
        weight: any shape, any float type; may be sharded.
        start: w0, the same shape and placement, or None for zero.
        share: rate times decay, without unit.
    """
    if start is None:
        weight.mul_(1.0 - share)
    else:
        weight.add_(start - weight, alpha=share)


@ingredient
class PriorDecay(Ingredient):
    """Before each step w <- w - rate x weight_decay x (w - w0), and the ordinary decay of those weights is off.

    w0 are the weights at the start of the stage; weights that were not there then (LoRA's) are pulled to zero. As the pull does not go
    through the gradient, it is the same whatever the optimizer divides gradients by.

    Args:
        weight_decay: per unit of learning rate; 0 changes nothing.
        where: selectors of the weights.
        exclude: kinds of weights that are not pulled; their own decay stays as it is.
    Differs: the authors' code means to leave the head out and, by a slip, pulls it to where it started too; ours pulls what ``where`` says.
        Theirs takes the strength from each group's own decay.
    """

    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    where: Annotated[tuple[str, ...], Field(min_length=1)] = ("backbone",)
    exclude: tuple[Literal["bias", "norm", "weight"], ...] = ("bias", "norm")

    def touches(self) -> tuple[Claim, ...]:
        return (scales(Place.DECAY, *self.where), needs(Place.REFERENCE, *self.where), needs(Place.GRADIENT))

    def settings(self, table: ParamTable) -> ParamTable:
        if not self.weight_decay:
            return table
        chosen = table.select(self.where)
        return table.decay(lambda row: 0.0 if row.name in chosen and self._pulls(row.part) else row.weight_decay)

    def optimizer(self, inner: Optimizer, ctx: Context) -> Optimizer:
        if not self.weight_decay:
            return inner
        chosen = select_all(ctx.anatomy, self.where)
        parts = {part.name: part for part in ctx.anatomy.parts if part.name in chosen and self._pulls(part)}
        starts: dict[str, Tensor | None] = {}  # the reference, placed like the weights at its first use
        decays: list[float] = []

        def before(optimizer: Optimizer, args: Any, named: Any) -> None:
            decays[:] = [group["weight_decay"] for group in optimizer.param_groups]
            if getattr(optimizer, "found_inf", None):  # a gradient scaler's: the step will be left out
                return
            for group in optimizer.param_groups:
                if parts.keys().isdisjoint(group["names"]):
                    continue
                for name, weight in zip(group["names"], group["params"], strict=True):
                    if weight.grad is None:
                        continue
                    if name not in parts:
                        if group["weight_decay"]:
                            pull(weight, None, group["lr"] * group["weight_decay"])
                        continue
                    if name not in starts:
                        start = ctx.reference.get(parts[name].canonical)
                        starts[name] = None if start is None else placed(start, weight)
                    pull(weight, starts[name], group["lr"] * self.weight_decay)
                # An optimizer that stands after this in the recipe, as the default one does, has put its own decay back.
                group["weight_decay"] = 0.0

        def after(optimizer: Optimizer, args: Any, named: Any) -> None:
            for group, decay in zip(optimizer.param_groups, decays, strict=True):
                group["weight_decay"] = decay

        inner.register_step_pre_hook(before)
        inner.register_step_post_hook(after)
        return inner

    def works_on(self, table: ParamTable, started: frozenset[str]) -> frozenset[str] | None:
        if not self.weight_decay:
            return None
        chosen = table.select(self.where)
        return frozenset(row.name for row in table.rows if row.name in chosen and self._pulls(row.part))

    def state_bytes(self, table: ParamTable) -> int:
        """One copy of the weights as they were."""
        chosen = table.select(self.where) if self.weight_decay else frozenset()
        return sum(row.part.bytes for row in table.rows if row.name in chosen)

    def _pulls(self, part: Part) -> bool:
        return part.kind not in self.exclude
