"""SWA: the end weights are the average of the weights along the end of the stage.

Source: Izmailov, Podoprikhin, Garipov, Vetrov, Wilson, UAI 2018, algorithm 1 (arXiv:1803.05407).
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from luthier.core.claims import Claim, Place, owns, scales
from luthier.core.context import Context, Tensors
from luthier.core.ingredient import Ingredient, ingredient
from luthier.core.schedule import Constant, Switch
from luthier.core.table import ParamTable
from luthier.errors import Fault, ModelError, RecipeError


def averaged(average: Tensor, weight: Tensor, count: int) -> Tensor:
    """Takes one more snapshot into an average of ``count``, in place: avg <- avg + (w - avg) / (count + 1).

    Args:
        average: any shape, at least single precision; at ``count`` 0 its values do not matter.
        weight: the same shape and placement, any float type; the new snapshot.
        count: snapshots that are in the average already.
    Returns:
        ``average``.
    Source: Izmailov et al., algorithm 1, with n_models = ``count``.
    """
    if count == 0:
        return average.copy_(weight)
    return average.add_((weight.to(average.dtype) - average) / (count + 1))


def opening(start: float, steps: int) -> int:
    """The first of ``steps`` steps (0-based) at or after the share ``start``; ``steps`` when there is none.

    >>> opening(0.75, 100), opening(0.07, 100), opening(1.0, 10)
    (75, 7, 10)
    """
    step = max(0, math.floor(start * steps) - 1)
    while step < steps and step / steps < start:  # the schedule's own comparison, so that both begin at one step
        step += 1
    return step


@ingredient
class SWA(Ingredient):
    """Averages the trainable weights over the end of the stage; at its end the model holds the average.

    The average is kept outside the optimizer, in single precision even where weights are not. It is not seen before the
    end: scores during the stage are those of the last step. Frozen weights and buffers are left alone.

    Args:
        start: share of the stage after which weights are averaged.
        every: optimizer steps from one snapshot to the next; the first is taken ``every`` steps after ``start``.
        lr_factor: from ``start`` on the rate of each weight is this factor of its own peak rate, without a schedule, so
            that layer-wise ratios stay; None leaves the schedule alone. In a recipe ``swa`` then stands after what it
            replaces (``anneal``).
    Differs: the rate switches at once, where the authors' code lowers it linearly; batch norm statistics are not made
        anew (a note says so where the model has any).
    """

    start: Annotated[float, Field(gt=0, le=1)] = 0.75
    every: Annotated[int, Field(ge=1)] = 1
    lr_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    def touches(self) -> tuple[Claim, ...]:
        ends = (owns(Place.END_WEIGHTS),)
        return ends if self.lr_factor is None else (*ends, scales(Place.LR))

    def settings(self, table: ParamTable) -> ParamTable:
        if self.lr_factor is None:
            return table
        after = Constant(self.lr_factor)
        return table.reschedule(lambda row: Switch(self.start, row.schedule, after))

    def optimizer(self, inner: Optimizer, ctx: Context) -> Optimizer:
        weights = _named(inner)
        count = ctx.keep("count", _count)
        average = ctx.keep("average", lambda: Tensors({name: _single(weight) for name, weight in weights.items()}))
        first = opening(self.start, ctx.progress.steps)

        @torch.no_grad()
        def snapshot(optimizer: Optimizer, args: Any, values: Any) -> None:
            done = ctx.progress.step + 1 - first  # steps since the start, with the one that was just taken
            if done < 1 or done % self.every:
                return
            taken = int(count["snapshots"])
            for name, weight in weights.items():
                averaged(average[name], weight, taken)
            count["snapshots"] += 1

        inner.register_step_post_hook(snapshot)
        return inner

    @torch.no_grad()
    def finish(self, model: nn.Module, ctx: Context) -> None:
        taken = int(ctx.keep("count", _count)["snapshots"])
        if not taken:
            ctx.note(
                "swa took no snapshot, so the weights are those of the last step: start earlier, or snap more often."
            )
            return
        weights = dict(model.named_parameters())
        average = ctx.keep("average", Tensors)
        lost = [Fault(name, "was averaged, and is no longer in the model") for name in average if name not in weights]
        if lost:
            raise ModelError.of(lost, "swa")
        for name, mean in average.items():
            weights[name].copy_(mean)
        if any(isinstance(module, _BatchNorm) for module in model.modules()):
            ctx.note("swa averaged the weights but not the batch norm statistics, which are those of the last step.")

    def state_bytes(self, table: ParamTable) -> int:
        return sum(4 * row.part.numel for row in table.rows if row.trainable)


def _named(optimizer: Optimizer) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        if "names" not in group:
            must = "must name the weights of each of its groups"
            raise RecipeError.of([Fault("the optimizer", must, do="Make its groups with groups_of.")], "swa")
        named.update(zip(group["names"], group["params"], strict=True))
    return named


def _count() -> Tensors:
    return Tensors(snapshots=torch.zeros((), dtype=torch.int64))


def _single(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32), requires_grad=False)
