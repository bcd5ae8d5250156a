"""Best: the stage is evaluated often, and its end weights are those that scored best.

Source: Zhang, Wu, Katiyar, Weinberger, Artzi, ICLR 2021 (arXiv:2006.05987), who evaluate ten times a run; Dodge, Ilharco, Schwartz,
Farhadi, Hajishirzi, Smith 2020 (arXiv:2002.06305) on how much that matters for small data.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from luthier.core.averages import named, write
from luthier.core.claims import Claim, Place, needs, wraps
from luthier.core.context import Context, Progress, Tensors
from luthier.core.ingredient import Ingredient, ingredient
from luthier.core.scores import HIGHER_IS_BETTER, Metric, better
from luthier.core.table import ParamTable
from luthier.errors import Fault, RecipeError

Count = Annotated[int, Field(ge=1)]


def due(progress: Progress, *, every: int | None, per_epoch: int | None) -> bool:
    """Whether the step that was just counted is followed by an evaluation: every so often, at each epoch's end, and at the last step.

    Args:
        every: optimizer steps from one evaluation to the next.
        per_epoch: evaluations in an epoch, at even distances.
    """
    step, epoch = progress.step, progress.epoch
    if step == progress.steps or (epoch and step % epoch == 0) or (every and step % every == 0):
        return True
    return bool(per_epoch and epoch and step * per_epoch // epoch > (step - 1) * per_epoch // epoch)


@ingredient
class Best(Ingredient):
    """Keeps the weights that score best on the validation rows, and ends the stage with them.

    Better means strictly better, so of equal scores the earliest stays; a score that is not a number is never best. What is
    scored and kept is what the stage would end with: with ``swa`` or ``ema`` in the stage, their average. The training itself is the
    same to the bit however often it is evaluated.

    Args:
        every: optimizer steps from one evaluation to the next.
        per_epoch: evaluations in an epoch, instead; with neither there is one at each epoch's end.
        metric: what is compared; None = the run's.
        patience: evaluations in a row without a better one after which the stage ends; None goes on to its last step.
    Raises:
        RecipeError: ``per_epoch`` where the rows are not known.
    Differs: the authors' code keeps a reference to the live weights where they are on the CPU, so that its best is its last.
    """

    every: Count | None = None
    per_epoch: Count | None = None
    metric: Metric | None = None
    patience: Count | None = None

    def touches(self) -> tuple[Claim, ...]:
        return (wraps(Place.END_WEIGHTS), needs(Place.VALIDATION))

    def settings(self, table: ParamTable) -> ParamTable:
        if self.per_epoch and not table.epoch and table.steps:
            do = "Say every: and a number of steps."
            raise RecipeError.of([Fault("best.per_epoch", "needs rows that are known beforehand", do=do)], "the plan")
        return table

    def optimizer(self, inner: Optimizer, ctx: Context) -> Optimizer:
        weights = named(inner)
        ctx.keep("weights", lambda: Tensors({name: weight.detach().clone() for name, weight in weights.items()}))
        return inner

    @torch.no_grad()
    def watch(self, model: nn.Module, ctx: Context) -> None:
        progress = ctx.progress
        if not due(progress, every=self.every, per_epoch=self.per_epoch):
            return
        metric = self.metric or ctx.around.metric
        value = ctx.validate()[metric]
        at = ctx.keep("at", _nowhere)
        at["seen"] += 1
        if better(value, float(at["score"]) if at["step"] else None, higher=HIGHER_IS_BETTER[metric]):
            at["step"].fill_(progress.step)
            at["score"].fill_(value)
            at["stale"].zero_()
            with ctx.ended():
                live = _live(model)
                kept = ctx.keep("weights", Tensors)
                kept.load_state_dict({name: live[name] for name in {*kept, *dict(model.named_buffers())}})
            return
        at["stale"] += 1
        if self.patience and at["stale"] >= self.patience:
            progress.over = f"{int(at['stale'])} evaluations without a better {metric}"

    @torch.no_grad()
    def finish(self, model: nn.Module, ctx: Context) -> None:
        at, metric = ctx.keep("at", _nowhere), self.metric or ctx.around.metric
        step, seen = int(at["step"]), int(at["seen"])
        if not step:
            ctx.note(f"best kept nothing: {metric} was never a number.")
            return
        kept, buffers = ctx.keep("weights", Tensors), dict(model.named_buffers())
        write({name: value for name, value in kept.items() if name not in buffers}, model, signer="best")
        for name in buffers.keys() & kept.keys():
            buffers[name].copy_(kept[name])
        told = f"best kept step {step} of {ctx.progress.step}: the best {metric} ({float(at['score']):.4g}) of {seen} evaluations"
        ctx.note(f"{told} on the validation rows; chosen by it, that score is optimistic: go by the test rows.")

    def state_bytes(self, table: ParamTable) -> int:
        return sum(row.part.bytes for row in table.rows if row.trainable)


def _live(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _nowhere() -> Tensors:
    number = {name: torch.zeros((), dtype=torch.int64) for name in ("step", "seen", "stale")}
    return Tensors(number, score=torch.zeros((), dtype=torch.float64))
