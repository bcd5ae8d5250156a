"""From run folders to a Comparison: levels, differences, cost. Reads finished runs only; trains nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from luthier import evaluate
from luthier.comparison import Comparison, Level, Setting, TrialRow, Versus, failures
from luthier.core.ingredient import Findings, Outputs
from luthier.core.scores import HIGHER_IS_BETTER
from luthier.errors import Fault, LuthierError, RunError, did_you_mean
from luthier.outputs import adjusted, kept
from luthier.report import Report, flat
from luthier.statistics import runs
from luthier.statistics.budget import best_of
from luthier.statistics.variance import decompose, grid
from luthier.trials.design import Design, Trial, independent
from luthier.trials.desk import Desk
from luthier.trials.early import Early, picked, stopped
from luthier.trials.outcome import listed, outcome
from luthier.trials.pairs import ALPHA, Seen, couples, unit_of, versus
from luthier.trials.searched import chosen, searches
from luthier.trials.spared import cost
from luthier.trials.stale import mixed


def gather(folder: str | Path, design: Design | None = None, *, metric: str | None = None) -> Comparison:
    """What the runs in ``folder`` that have ended say. Args and errors are those of ``luthier.gather``, which also writes it there."""
    desk = Desk(Path(folder))
    known = design or Design.load(desk.path)
    trials = known.trials()
    reports = {trial.name: Report.load(desk.run(trial)) for trial in trials if desk.done(trial)}
    stop, gone, these = Early.of(known), stopped(desk, known), picked(desk, known)
    rows = [_row(desk, trial, reports.get(trial.name), trial in gone) for trial in trials]
    reports = {trial.name: reports[trial.name] for trial in trials if trial in these and trial.name in reports}
    if not reports:
        failed = next((row for row in rows if row.why), None)
        kind = RunError if failed else LuthierError
        why = f"{failed.name}: {_last(failed.why)}" if failed else "none is done"
        raise kind(f"{folder}: no run has ended, so there is nothing to compare.  {why}")
    metric = _metric(known, metric, next(iter(reports.values())))
    for asked in known.settings:
        mixed({one.name: reports[one.name] for one in trials if one.setting == asked.name and one.name in reports})
    found = [
        _Told(asked.name, known, metric, rows, desk, {t: reports[t.name] for t in trials if t.name in reports})
        for asked in known.settings
        if any(trial.setting == asked.name and trial.name in reports for trial in trials)
    ]
    pairs = [pair for one in found for pair in one.versus()]
    levels = [level for one in found for level in one.levels()]
    return Comparison(
        metric=metric,
        higher_is_better=HIGHER_IS_BETTER[metric],
        unit=asdict(unit_of(metric)),
        recipes=tuple(known.recipes),
        settings=tuple(one.setting for one in found),
        trials=tuple(rows),
        levels=tuple(levels),
        versus=tuple(pairs),
        outcome=outcome(pairs, metric, several=len(found) > 1) + tuple(told for one in found for told in one.apart()),
        notes=(
            *_searched(desk, known),
            *([stop.sentence(metric)] if stop else []),
            *_varied(known),
            *_notes(rows, levels, found),
        ),
        best_of={one.setting.name: one.best_of() for one in found},
        reliability={one.setting.name: one.reliability() for one in found},
        variance={one.setting.name: parts for one in found if (parts := one.variance())},
        chosen=chosen(desk, known),
        early=cost(desk, known),
        asked={"seeds": list(known.seeds), "against": known.against, "alpha": ALPHA, "recipes": known.recipes},
        path=str(folder),
    )


def _metric(design: Design, asked: str | None, report: Report) -> str:
    """The metric that is compared: what is asked for, else the design's, else the task's own."""
    own = design.metric or report.metric
    known = [name for name in HIGHER_IS_BETTER if any(name in scores for scores in report.splits.values())]
    faults = []
    if asked is not None and asked not in known:
        faults.append(Fault("--metric", f"must be of {', '.join(known)}", asked, did_you_mean(asked, known)))
    elif asked not in (None, own) and design.more:
        faults.append(Fault("--metric", f"must be {own}, as runs were chosen by it", str(asked), "Leave it out."))
    if faults:
        raise LuthierError.of(faults, "the comparison")
    return asked or own


class _Told:
    """What the runs of one setting that have ended say."""

    def __init__(
        self,
        name: str,
        design: Design,
        metric: str,
        rows: Sequence[TrialRow],
        desk: Desk,
        reports: dict[Trial, Report],
    ) -> None:
        self.design, self.metric, self.selected = design, metric, Early.of(design) is not None
        self.rows = [row for row in rows if row.setting == name]
        self.runs = {trial: report for trial, report in reports.items() if trial.setting == name}
        self.outputs = {trial: kept(desk.run(trial)) for trial in self.runs}
        first = next(iter(self.runs.values()))
        outputs = next(iter(self.outputs.values()))
        classes = first.task == "classification"
        self.setting = Setting(
            name=name,
            data=str(first.data["source"]),
            model=str(first.model["source"]),
            sizes=dict(first.data["sizes"]),
            splits=tuple(first.splits),
            shown=first.shown or "",
            majority=_majorities(outputs) if classes else {},
            chosen_on="validation"
            if self.selected or any(one.setting == name for one in searches(desk, design))
            else next((report.chosen_on for report in self.runs.values() if report.chosen_on), ""),
        )

    def of(self, recipe: str) -> list[Trial]:
        return [trial for trial in self.runs if trial.recipe == recipe]

    def versus(self) -> list[Versus]:
        if not self.setting.shown:
            return []
        seen = [Seen(trial.recipe, trial.seeds, out) for trial, out in self.outputs.items()]
        recipes = [recipe for recipe in self.design.recipes if self.of(recipe)]
        return versus(self.setting, seen, recipes, self.metric, self.design.against, selected=self.selected)

    def apart(self) -> list[str]:
        """Of recipes whose runs were chosen: which have too few seeds in common to be paired."""
        made = []
        recipes = [recipe for recipe in self.design.recipes if self.of(recipe)] if self.selected else []
        for one, other in couples(recipes, self.design.against):
            both = {trial.seeds for trial in self.of(one)} & {trial.seeds for trial in self.of(other)}
            if len(both) < 2:
                many = f"{len(both) or 'no'} seed{'' if len(both) == 1 else 's'} in common"
                made.append(f"{one} and {other} cannot be paired: the runs that they kept have {many}")
        several = len(self.design.settings) > 1
        return [f"{self.setting.name}: {told}" if several else told for told in made]

    def levels(self) -> list[Level]:
        return [
            self._level(recipe, split)
            for recipe in self.design.recipes
            for split in self.setting.splits
            if any(self._score(trial, split) is not None for trial in self.of(recipe))
        ]

    def _score(self, trial: Trial, split: str, metric: str = "") -> float | None:
        value = self.runs[trial].splits.get(split, {}).get(metric or self.metric)
        return None if value is None else float(value)

    def _level(self, recipe: str, split: str) -> Level:
        scored = {trial.name: value for trial in self.of(recipe) if (value := self._score(trial, split)) is not None}
        told = runs.summary(list(scored.values()), higher_is_better=HIGHER_IS_BETTER[self.metric])
        apart = [scored[trial.name] for trial in self.of(recipe) if trial.name in scored and independent(trial.seeds)]
        names, why = list(scored), ""
        gone: tuple[int, ...] = ()
        if split in self.setting.majority:
            accuracies = [self._score(trial, split, "accuracy") for trial in self.of(recipe) if trial.name in scored]
            majority = self.setting.majority[split]
            gone = runs.failed(accuracies, majority)
            why = f"accuracy at or under {majority:.3f}, the share of the majority class"
        elif (known := self.runs[self.of(recipe)[0]].baseline(split)) and known[0] == "rmse":
            errors = [self._score(trial, split, "rmse") for trial in self.of(recipe) if trial.name in scored]
            gone = runs.failed(errors, known[1], higher_is_better=False)
            why = f"RMSE at or over {known[1]:.4g}, that of {known[2]}"
        return Level(
            setting=self.setting.name,
            recipe=recipe,
            split=split,
            seeds=told.seeds,
            mean=told.mean,
            sd=runs.summary(apart).sd if apart else None,
            worst=told.worst,
            best=told.best,
            failed=tuple(names[at] for at in gone),
            why=why if gone else "",
        )

    def best_of(self) -> dict[str, Any]:
        """E[best of n] on validation by recipe, of independent runs; not of runs that were chosen, which are no draws."""
        made = {}
        for recipe in self.design.recipes if not self.selected else ():
            apart = [trial for trial in self.of(recipe) if independent(trial.seeds)]
            scored = [value for trial in apart if (value := self._score(trial, "validation")) is not None]
            if len(scored) > 1:
                found = best_of(scored, higher_is_better=HIGHER_IS_BETTER[self.metric])
                made[recipe] = [asdict(one) for one in found]
        return made

    def reliability(self) -> dict[str, Any]:
        """Confidence and accuracy on the shown split, all seeds of a recipe together."""
        if not self.setting.majority:
            return {}
        made = {}
        for recipe in self.design.recipes:
            runs_of = self.of(recipe)
            before = [self.outputs[trial][self.setting.shown] for trial in runs_of]
            after = [_calibrated(self.runs[trial], out) for trial, out in zip(runs_of, before, strict=True)]
            if before:
                every = [raw if out is None else out for raw, out in zip(before, after, strict=True)]
                changed = any(out is not None for out in after)
                made[recipe] = {"before": _bins(before), "after": _bins(every) if changed else []}
        return made

    def variance(self) -> dict[str, Any]:
        """Of recipes whose head and order vary apart, on the shown split."""
        made = {}
        for recipe in self.design.recipes:
            cells = {}
            for trial in self.of(recipe):
                seeds, value = dict(trial.seeds), self._score(trial, self.setting.shown)
                if value is not None and set(seeds) == {"head", "order"}:
                    cells[seeds["head"], seeds["order"]] = value
            sides = [len({key[at] for key in cells}) for at in (0, 1)]
            if cells and min(sides) > 1 and len(cells) == sides[0] * sides[1]:
                found = decompose(grid(cells))
                made[recipe] = {**asdict(found), "shares": asdict(found.squares.shares)}
        return made


def _majorities(outputs: Mapping[str, Outputs]) -> dict[str, float]:
    """By split, the share of the most frequent class; where there is one class only, always saying it is no baseline."""
    shares = {split: runs.majority_share(out.targets) for split, out in outputs.items()}
    return {split: share for split, share in shares.items() if share < 1}


def _row(desk: Desk, trial: Trial, report: Report | None, gone: bool) -> TrialRow:
    seeds = dict(trial.seeds)
    if gone:
        seconds = float((desk.paused(trial) or {}).get("seconds", 0.0))
        return TrialRow(trial.name, trial.setting, trial.recipe, seeds, "stopped", seconds=seconds)
    if report is None:
        why = desk.failure(trial)
        state = "open" if why is None else "failed"
        return TrialRow(trial.name, trial.setting, trial.recipe, seeds, state, why=why or "")
    return TrialRow(
        name=trial.name,
        setting=trial.setting,
        recipe=trial.recipe,
        seeds=seeds,
        state="done",
        scores=report.splits,
        calibrated=flat(report.calibrated) if report.calibrated else {},
        seconds=sum(stage.seconds for stage in report.stages),
        peak_bytes=max((stage.peak_memory_bytes for stage in report.stages), default=0),
        trainable=max((stage.trainable_parameters for stage in report.stages), default=0),
    )


def _calibrated(report: Report, out: Outputs) -> Outputs | None:
    found = Findings.of(report.calibration)
    return adjusted(out, found) if found.changes else None


def _bins(outputs: Sequence[Outputs]) -> list[dict[str, Any]]:
    if not outputs:
        return []
    logits = np.concatenate([out.logits for out in outputs])
    targets = np.concatenate([out.targets for out in outputs])
    return [asdict(one) for one in evaluate.reliability(logits, targets)]


def _notes(rows: Sequence[TrialRow], levels: Sequence[Level], found: Sequence[_Told]) -> list[str]:
    notes = [f"{row.name} ended with an error: {_last(row.why)}" for row in rows if row.why]
    left = [row.name for row in rows if row.state == "open"]
    if left:
        notes.append(f"{len(left)} of {len(rows)} runs are not done yet; the same command goes on")
    against = found[0].design.against if found else None
    for one in found:
        if against and not one.of(against):
            notes.append(f"all are compared with {against}, of which no run on {one.setting.name} has ended")
    shown = {one.setting.name: one.setting.shown for one in found}
    notes += failures([level for level in levels if level.split == shown[level.setting]])
    return list(dict.fromkeys(notes))


def _varied(design: Design) -> list[str]:
    """Which runs the numbers of a comparison whose streams vary apart are of."""
    streams = list(design.seeds[0])
    if len(streams) < 2:
        return []
    return [
        f"{listed(streams)} vary apart: means are of all runs; differences, standard deviations and the best of n are of those whose "
        f"{listed(streams)} have the same number, as no others are independent of each other"
    ]


def _searched(desk: Desk, design: Design) -> list[str]:
    """How many trials each winner was chosen from, and which searches go on."""
    notes = [
        f"{name}: its settings were chosen from {one['tried']} trials"
        + (f" ({one['failed']} failed)" if one["failed"] else "")
        + " by validation; a score on the selecting split is optimistic"
        for name, one in chosen(desk, design).items()
    ]
    left = [one.name for one in searches(desk, design) if not one.over]
    return notes + ([f"the search of {', '.join(left)} is not over; the same command goes on"] if left else [])


def _last(why: str) -> str:
    return why.strip().splitlines()[-1] if why.strip() else "no reason given"
