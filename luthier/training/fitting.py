"""Fitting: the stages of one run in order, what is saved on the way, and going on from it."""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from luthier import checkpoint
from luthier.core.anatomy import Anatomy
from luthier.folder import RunFolder
from luthier.jsonfile import plain
from luthier.narrate import Narrator
from luthier.placement import Placement
from luthier.planning.plan import StagePlan
from luthier.report import Report
from luthier.run import Run
from luthier.signals import answered
from luthier.training import probing, rates, replay, stages
from luthier.training.job import Job
from luthier.training.movement import movement
from luthier.training.results import conclude
from luthier.training.stages import Paused, Stopped
from luthier.training.trace import Hooks, Trace
from luthier.units import forget_peak, memory_peak

SAVE_SECONDS = 120.0  # between checkpoints, when no number of steps is given


@dataclass(frozen=True)
class Saving:
    """When a run writes what it goes on from; the fields are arguments of ``fit``."""

    every: int | None = None
    share: float | None = None
    keep_stages: bool = False
    pause_at: float | None = None

    def due(self, step: int, since: float, took: float) -> bool:
        """Whether a checkpoint is due after ``step``, ``since`` seconds after the last one, which took ``took`` seconds."""
        if self.every:
            return step % self.every == 0
        return since > (SAVE_SECONDS if self.share is None else min(SAVE_SECONDS, took / self.share))


class Fitting:
    """The state of one call of ``fit``."""

    def __init__(
        self,
        job: Job,
        placement: Placement,
        folder: RunFolder | None,
        narrator: Narrator,
        saving: Saving,
    ) -> None:
        self.job, self.placement, self.folder, self.say, self.saving = job, placement, folder, narrator, saving
        self.trace = Trace()
        self.notes: list[str] = list(job.warnings)
        self.stopping = False
        self._begun = self._saved_at = time.monotonic()
        self._save_took = 0.0
        self._track: Callable[[dict[str, float], int], None] = lambda values, step: None

    def go(self, *, resume: bool) -> Report:
        self._begun = time.monotonic()
        first, step = self._restore() if resume and self.folder else (0, None)
        self._begun -= self.trace.wall  # what the run took before it was stopped counts
        self._track = self.placement.track(
            self.job.recipe.name, {"seed": self.job.recipe.seed, "recipe": self.job.recipe.digest}
        )
        with answered(self._asked):
            for plan in self.job.plan.stages[first:]:
                self._stage(plan, step)
                step = None
        self.placement.end()
        report = conclude(
            self.job, self.trace, self.placement, self.folder, self.notes, self.say, time.monotonic() - self._begun
        )
        if self.folder and self.placement.main:
            checkpoint.clear(self.folder.checkpoints)
        return report

    def _asked(self) -> None:
        """The run stops between two steps; asked once more it stops at once."""
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        self.say.line("stopping after this step (once more to stop at once)")

    def _restore(self) -> tuple[int, checkpoint.Checkpoint | None]:
        """Puts back the weights at the start of the stage that was under way; gives its number and the checkpoint inside it."""
        assert self.folder is not None
        start, step = self.folder.latest(self.say.line)
        found = step or start
        if found is None:
            self.say.line("nothing was saved yet: starting from the beginning")
            self.folder.rewind_log(0)
            return 0, None
        if start is not None:
            self.job.loaded.model.load_state_dict(start.load()["model"])
            self._keep_end(start.stage - 1)  # before it was stopped, the run may not have been asked to
        state = found.load()
        self.trace = Trace(**json.loads(state["trace"]))
        self.notes = list(state["notes"])
        if self.trace.rates:
            self.job = dataclasses.replace(self.job, plan=rates.rated(self.job, self.trace.rates))
        self.placement.load_state_dict(state.get("placement", {}))
        self.folder.rewind_log(state["logged"])
        at = f"step {step.step}" if step else "its start"
        if found.stage < len(self.job.plan.stages):
            self.say.line(f"going on with stage {self.job.plan.stages[found.stage].name!r} from {at}")
        return found.stage, step

    def _stage(self, plan: StagePlan, step: checkpoint.Checkpoint | None) -> None:
        forget_peak(self.placement.device)
        plan = self._rated(plan)
        job, placement = self.job, self.placement
        model = job.loaded.model
        before = {part.canonical: weight.detach().cpu().clone() for part, weight in _weights(model, plan)}
        whole = None
        if plan.stage.carry is not None:
            whole = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
        seconds, steps = (self.trace.seconds, self.trace.steps) if step is None else _since(self.trace)
        if step is None:
            self.trace.starts.append([self.trace.steps, plan.name])
        if plan.stage.solver == "exact":
            notes = probing.solve(job, plan, model, placement, self.trace, self.say)
        else:
            notes = self._steps(plan, model, step)
        model = job.loaded.model
        self.trace.movement += movement(plan, before, dict(_weights_named(model, plan)))
        if whole is not None and plan.stage.carry is not None:
            stages.put_back(model, whole, plan)
            notes = [*notes, f"only {', '.join(plan.stage.carry)} goes on; the rest is as it was before the stage"]
        used = self.trace.seconds - seconds
        taken = self.trace.steps - steps
        rows = taken * plan.stage.batch_size if taken else len(job.encoded["train"])
        self.trace.stages.append(
            {
                "name": plan.name,
                "steps": taken,
                "seconds": used,
                "examples_per_second": rows / used if used else 0.0,
                "trainable_parameters": plan.trainable,
                "peak_memory_bytes": memory_peak(placement.device),
                "solver": plan.stage.solver,
                "notes": notes,
            }
        )
        self._keep_end(plan.index)
        self._write_state(plan.index + 1, None, {"model": model.state_dict()})

    def _keep_end(self, stage: int) -> None:
        """Keeps the model as the end of a stage, where that is asked for; the last one's is the run's own model."""
        if (
            self.saving.keep_stages
            and self.folder
            and self.placement.main
            and 0 <= stage < len(self.job.plan.stages) - 1
        ):
            replay.keep(self.folder.path, self.job.plan.stages[stage].name, self.job.loaded.model)

    def _rated(self, plan: StagePlan) -> StagePlan:
        """The stage with the learning rate that it asks for; as it is when that is written."""
        tries = rates.asked(plan)
        if tries is None:
            return plan
        found = self.trace.rates.get(plan.name)
        if found is None:
            found = rates.choose(self.job, plan, tries, self.placement, self.say, lambda: self.stopping)
            self.trace.rates[plan.name] = found
            told = rates.told(plan.name, found)
            self.say.line(told)
            self.notes.append(told)
            self.job = dataclasses.replace(self.job, plan=rates.rated(self.job, self.trace.rates))
        return self.job.plan.stages[plan.index]

    def _steps(self, plan: StagePlan, model: nn.Module, step: checkpoint.Checkpoint | None) -> list[str]:
        run, inner = stages.attach(
            self.job,
            plan,
            model,
            self.placement,
            folder=self.folder.path if self.folder and self.placement.main else None,
        )
        if step is not None:
            state = step.load()
            run.model.load_state_dict(state["model"])
            run.load_state_dict(state["run"])
            self._pause(run)  # it may have been killed between its last checkpoint and the look at its scores
        kept = stages.keep_frozen(self.job, run, inner, self.placement, self.say)
        if kept:
            if kept not in run.notes:  # as it is where the run goes on
                run.notes.append(kept)
            self.say.line(kept)
        hooks = Hooks(save=self._save_step, stop=lambda: self.stopping, log=self._log)
        try:
            stages.train(self.job, run, self.placement, self.trace, hooks, self.say)
        except (Stopped, stages.NotFinite) as error:
            self._give_up(run, error)
        self.placement.settle(run.model)
        said = len(run.notes)
        run.finish()
        for note in run.notes[said:]:
            self.say.line(f"{plan.name}: {note}")
        self.placement.whole(run.model, model)
        self.job.stock.forget("frozen")
        return run.notes

    def _save_step(self, step: int, run: Run) -> None:
        self._pause(run)
        if step < run.plan.steps and self.saving.due(step, time.monotonic() - self._saved_at, self._save_took):
            self._write_step(run)

    def _pause(self, run: Run) -> None:
        """Stops the run where it is to pause, with a checkpoint; scores are made after it, so that what goes on is as it was."""
        plans = self.job.plan.stages
        whole = sum(plan.steps for plan in plans)
        at = sum(plan.steps for plan in plans[: run.plan.index]) + run.progress.step
        pause = self.saving.pause_at
        if pause is None or run.progress.over or not stages.pause_step(pause, whole) <= at < whole:
            return
        self._write_step(run)
        scores = plain(run.validate())
        if self.folder:
            steps = {"share": pause, "steps": self.trace.steps, "of": whole}
            told = {**steps, "metric": self.job.metric, "scores": scores, "seconds": self.trace.seconds}
            self.folder.write_json("paused.json", told)
        raise Paused(scores, self.trace.steps, whole)

    def _write_step(self, run: Run) -> None:
        if self.placement.sharded:
            return  # a sharded stage goes on from its start, which is as exact
        self._write_state(run.plan.index, run.progress.step, {"model": run.model.state_dict(), "run": run.state_dict()})

    def _write_state(self, stage: int, step: int | None, state: dict[str, Any]) -> None:
        if self.folder is None or not self.placement.main:
            return
        self.trace.wall = time.monotonic() - self._begun
        state |= {
            "trace": json.dumps(dataclasses.asdict(self.trace)),
            "notes": list(self.notes),
            "placement": self.placement.state_dict(),
            "logged": self.folder.logged,
        }
        begun = time.monotonic()
        checkpoint.save(self.folder.checkpoints, state, stage=stage, step=step)
        self._saved_at = time.monotonic()
        self._save_took = self._saved_at - begun

    def _give_up(self, run: Run, error: Exception) -> None:
        """Saves where the run stands, if its weights are finite, and says how to go on."""
        if stages.finite(run.model) and run.progress.step:
            self._write_step(run)
        if isinstance(error, Stopped) and self.folder:
            keep = " --keep-stages" if self.saving.keep_stages else ""
            again = f"luthier fit --out {shlex.quote(str(self.folder.path))}{keep} --resume"
            raise Stopped(f"stopped on request at step {run.progress.step}; {again} goes on from there") from None
        raise error

    def _log(self, values: dict[str, Any]) -> None:
        if self.folder:
            self.folder.log(values)
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float)) and name != "step"}
        self._track(numbers, self.trace.steps)


def _since(trace: Trace) -> tuple[float, int]:
    """Seconds and steps before the stage that is under way."""
    steps = sum(stage["steps"] for stage in trace.stages)
    return sum(stage["seconds"] for stage in trace.stages), steps


def _weights(model: nn.Module, plan: StagePlan) -> Iterator[tuple[Any, Tensor]]:
    weights = dict(model.named_parameters())
    for part in Anatomy.of(model, plan.family).parts:
        yield part, weights[part.name]


def _weights_named(model: nn.Module, plan: StagePlan) -> Iterator[tuple[str, Tensor]]:
    for part, weight in _weights(model, plan):
        yield part.canonical, weight
