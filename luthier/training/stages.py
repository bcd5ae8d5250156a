"""One stage of a run by steps. The only training loop there is."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier.core.anatomy import Anatomy, select_all
from luthier.core.closure import Closure
from luthier.core.context import Around
from luthier.core.ingredient import Outputs
from luthier.core.seeds import derive, generator, remembered, reseed
from luthier.errors import Fault, RunError
from luthier.narrate import Narrator
from luthier.outputs import BATCH, logits, scores
from luthier.placement import Placement
from luthier.planning.plan import StagePlan
from luthier.quick import QuickRandom, quicken
from luthier.run import Run
from luthier.sources import models
from luthier.sources.text import collate
from luthier.stock import key
from luthier.training import frozen
from luthier.training.job import Job
from luthier.training.probing import quickly
from luthier.training.trace import Hooks, Trace

_ANEW = "--resume would come to the same: start anew in another --out, with a lower learning rate, a warm-up or clip."


class Stopped(RunError):
    """The run was asked to stop; what it had done is saved."""


class Paused(RunError):
    """The run has come to the share of its steps at which it was to pause; what it had done is saved.

    Args:
        score: of the validation rows, by metric, for the weights that the stage would end with now.
        steps: taken so far; whole: all that the plan has.
    """

    def __init__(self, score: dict[str, Any], steps: int, whole: int) -> None:
        self.score, self.steps, self.whole = score, steps, whole
        super().__init__(f"paused after {steps} of {whole} steps; --resume goes on from there")


def pause_step(share: float, steps: int) -> int:
    """The first of ``steps`` steps, counted from 1, with which ``share`` of them is taken.

    >>> pause_step(0.3, 10), pause_step(0.3, 11), pause_step(0.01, 10)
    (3, 4, 1)
    """
    return max(1, math.ceil(share * steps - 1e-9))  # a share is not later for its rounding


@dataclass(frozen=True)
class Sample:
    """The training rows as batches, in an order drawn from the recipe's seed; asked twice, the same ones.

    Args:
        size: rows of a step.
        most: rows in a batch: as many of a step's as go through the model at once.
    """

    job: Job
    size: int
    most: int
    device: torch.device

    @property
    def parts(self) -> int:
        """Batches whose rows make a step, but for the last ones."""
        return math.ceil(self.size / self.most)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        train = self.job.encoded["train"]
        draw = generator(self.job.recipe.seed_of("order"), "sample")
        order = torch.randperm(len(train), generator=draw).tolist()  # a file may be sorted by class
        for first in range(0, len(order), self.size):
            step = order[first : first + self.size]
            for at in range(0, len(step), self.most):
                yield collate(train, step[at : at + self.most], pad_id=self.job.pad_id, device=self.device)


def attach(
    job: Job, plan: StagePlan, model: nn.Module, placement: Placement, *, folder: Path | None = None
) -> tuple[Run, TaskLoss]:
    """A Run on the job's model, and the task's loss inside its chain. A model to be sharded is copied first."""
    inner = TaskLoss(job, placement)
    run = Run(
        plan,
        copy.deepcopy(model) if placement.sharded else model,
        seed=job.recipe.seed,
        around=Around(
            inner,
            Sample(job, plan.stage.batch_size, plan.stage.micro_batch or plan.stage.batch_size, placement.device),
            (lambda live: score(job, live, placement)) if "validation" in job.encoded else None,
            job.metric,
        ),
        place=lambda live: placement.place(live, Anatomy.of(live, plan.family)),
        folder=folder,
    )
    return run, inner


class TaskLoss:
    """The task's mean loss over a batch; reads frozen layers' outputs where they are kept."""

    def __init__(self, job: Job, placement: Placement) -> None:
        self._task, self._placement = job.task, placement
        self.frozen: frozen.FrozenOutputs | None = None

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "rows")}
        replay: AbstractContextManager[Any] = nullcontext()
        if self.frozen is not None and "rows" in batch:
            self.frozen.use(batch["rows"], inputs["input_ids"].shape[1])
            replay = self.frozen.replayed()
        with self._placement.autocast(), replay:
            out = model(**inputs).logits
        return self._task.loss(out, batch["labels"])


def train(job: Job, run: Run, placement: Placement, trace: Trace, hooks: Hooks, narrator: Narrator) -> None:
    """Takes the steps of a stage that are left, from wherever ``run`` stands.

    Raises:
        RunError: the loss is not a number; the weights are as they were before that step.
        Stopped: someone asked to stop.
    """
    plan, stream = run.plan, run.plan.stream
    assert stream is not None
    left = 0 if run.progress.over else plan.steps - run.progress.step
    quick = QuickRandom(job.recipe.seed_of("dropout"))
    first = trace.steps - run.progress.step  # the stage's first step, counted over the whole run
    handle = quicken(run.model, quick) if placement.device.type == "cpu" else None
    restore = remembered([placement.device])
    try:
        with narrator.bar(plan.name, left) as bar:
            for step, rows, last_of_epoch in steps(plan, run.progress.step) if left else ():
                begun = time.perf_counter()
                ready = closure(job, run, placement, quick, step, rows)
                loss = float(run.offer(ready))
                if not math.isfinite(loss):
                    raise _not_finite(plan, step, loss, run.model)
                rate = max(run.rates.values())
                run.step(placement.take)
                trace.steps = first + step + 1
                trace.seconds += time.perf_counter() - begun
                trace.loss.append([trace.steps, loss])
                trace.rate.append([trace.steps, rate])
                hooks.log({"stage": plan.name, "step": step + 1, "loss": loss, "learning_rate": rate})
                bar.advance(1, say=f"loss {loss:.3f}")
                if last_of_epoch and "validation" in job.encoded:
                    run.validate()
                if run.scored is not None:
                    trace.validation.append([trace.steps, dict(run.scored)])
                    told = {f"validation_{name}": value for name, value in run.scored.items()}
                    hooks.log({"stage": plan.name, "step": step + 1, **told})
                if run.progress.over:
                    run.notes.append(f"ended after step {step + 1} of {plan.steps}: {run.progress.over}")
                hooks.save(step + 1, run)
                if run.progress.over:
                    break
                if step + 1 < plan.steps and placement.anyone(hooks.stop()):
                    raise Stopped("stopped on request")
        if left and placement.anyone(not finite(run.model)):  # no loss comes after the last step
            raise _last_step(plan)
    finally:
        restore()
        if handle is not None:
            handle.remove()


def keep_frozen(job: Job, run: Run, inner: TaskLoss, placement: Placement, narrator: Narrator) -> str | None:
    """Keeps the outputs of layers that cannot change, where the plan has some, they fit in memory, and replaying them is exact.

    Returns:
        a sentence for the report, or None when nothing is frozen.
    """
    plan, train_rows = run.plan, job.training
    blocks = frozen.frozen_blocks(run.model, plan.anatomy, plan.table.quiet_depth)
    if not blocks or placement.processes > 1 or run.forward is not run.model:
        return None
    config: Any = run.model.config
    hidden: int = getattr(config, "hidden_size", None) or getattr(config, "d_model", None) or 1
    assert plan.stream is not None
    own = plan.stream.rows
    size = frozen.bytes_needed([train_rows.lengths[row] for row in own], hidden)
    if size > frozen.LIMIT:
        return (
            f"the outputs of {len(blocks)} frozen blocks would take {size / 1e9:.1f} GB and are computed anew each step"
        )
    used = math.ceil(plan.steps * plan.stage.batch_size / max(1, len(own)))
    if used < 2:
        return None

    def batch(rows: Sequence[int]) -> dict[str, Tensor]:
        made = collate(train_rows, rows, pad_id=job.pad_id, device=placement.device)
        made.pop("labels", None)
        return made

    outputs = frozen.FrozenOutputs(run.model, blocks)

    def learn() -> frozen.Kept:
        with narrator.bar(f"{plan.name}: frozen layers", len(own)) as bar:
            return outputs.learn(own, train_rows.lengths, batch, size=BATCH, tick=bar.advance)

    names = {part.name for part in plan.anatomy.parts if part.depth < plan.table.quiet_depth}
    weights = dict(run.model.named_parameters())
    below = {name: weights[name] for name in sorted(names)} | dict(run.model.named_buffers())
    known = [*job.rows_of(run.model, placement.device), models.digest(below), own]
    with _evaluating(run), quickly(run.model, placement):
        outputs.take(job.stock.get(key("frozen", *known), learn, most=1))
        fits = frozen.holds(run.model, outputs, list(own[:4]), batch)
    if not fits:
        return f"the outputs of {len(blocks)} frozen blocks cannot be replayed in this family and are computed anew each step"
    inner.frozen = outputs
    return f"the outputs of {len(blocks)} frozen blocks are computed once and kept ({size / 1e6:.0f} MB)"


class _evaluating:
    """Eval mode inside, the run's own training mode after."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __enter__(self) -> None:
        self._run.model.eval()

    def __exit__(self, *error: object) -> None:
        self._run.train()


def put_back(model: nn.Module, before: Mapping[str, Tensor], plan: StagePlan) -> None:
    """What ``before`` holds, weights and buffers, is as it was, in place, but for what the stage carries on."""
    if plan.stage.carry is None:
        return
    kept, now = select_all(Anatomy.of(model, plan.family), plan.stage.carry), model.state_dict()
    with torch.no_grad():
        for name, value in before.items():
            if name not in kept:
                now[name].copy_(value)


def steps(plan: StagePlan, done: int) -> Iterator[tuple[int, list[int], bool]]:
    """(step, rows, whether the epoch ends with it) from step ``done`` on; epochs that are over are not made again."""
    assert plan.stream is not None
    step, epoch = 0, 0
    while step < plan.steps:
        count = plan.stream.count(epoch)
        if step + count > done:
            batches = plan.stream.epoch(epoch)
            for at, rows in enumerate(batches):
                if done <= step + at < plan.steps:
                    yield step + at, rows, at + 1 == count or step + at + 1 == plan.steps
        step, epoch = step + count, epoch + 1


def closure(job: Job, run: Run, placement: Placement, quick: QuickRandom, step: int, rows: list[int]) -> Closure:
    """The closure of one optimizer step over ``rows``, of which this process takes its share."""
    plan, encoded = run.plan, job.training
    mine = rows[placement.rank :: placement.processes]
    share = math.ceil(len(rows) / placement.processes)  # rows of the process that has the most
    size = plan.stage.micro_batch or share
    most = math.ceil(share / size)  # every process takes the same number of turns, whatever it has
    chunks = [mine[at : at + size] for at in range(0, len(mine), size)]
    shares = [placement.processes * len(chunk) / len(rows) for chunk in chunks]
    while len(chunks) < most:
        chunks.append(rows[:1])
        shares.append(0.0)
    batches = []
    for chunk in chunks:
        batch: dict[str, Any] = dict(collate(encoded, chunk, pad_id=job.pad_id, device=placement.device))
        batch["rows"] = chunk
        batches.append(batch)

    def before(number: int) -> None:
        seed = derive(job.recipe.seed_of("dropout"), "dropout", plan.index, step, number, placement.rank)
        run.begin_part(number)
        reseed(seed, placement.device)
        quick.reseed(seed)

    return Closure(
        run.forward,
        run.loss,
        batches,
        shares=shares,
        before=before,
        backward=placement.backward,
        together=placement.together,
        around=lambda number: placement.waiting(run.forward, last=number + 1 == len(batches)),
    )


def score(job: Job, model: nn.Module, placement: Placement) -> dict[str, Any]:
    """The scores of ``model`` as it is now on the validation rows."""
    out = logits(model, job.encoded["validation"], pad_id=job.pad_id, placement=placement)
    return scores(job.task, Outputs(out, job.targets("validation")))


def _not_finite(plan: StagePlan, step: int, loss: float, model: nn.Module) -> RunError:
    are = "finite" if finite(model) else "not finite either"
    fault = Fault(
        f"{plan.name}, step {step + 1}",
        "the loss must be a finite number",
        str(loss),
        f"The weights before this step are {are}.  {_ANEW}",
    )
    return NotFinite.of([fault], "the run")  # type: ignore[return-value]


def _last_step(plan: StagePlan) -> RunError:
    fault = Fault(f"{plan.name}, step {plan.steps}", "must leave finite weights", do=_ANEW)
    return NotFinite.of([fault], "the run")  # type: ignore[return-value]


def finite(model: nn.Module) -> bool:
    """Whether all weights that this process holds are finite."""
    mine = (
        getattr(weight, "to_local", lambda weight=weight: weight)() for weight in model.parameters()
    )  # of a sharded one a part
    return all(bool(torch.isfinite(weight).all()) for weight in mine)


class NotFinite(RunError):
    """The loss is not a number; the step was not taken."""
