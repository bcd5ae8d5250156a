"""diff: what two finished runs do not have in common, and what came of it. Reads their folders and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.finished.changes import Change, between_recipes, changes, surroundings, wrapped
from luthier.jsonfile import expanded, plain
from luthier.report import Report, flat

if TYPE_CHECKING:
    from luthier.finished.weights import Weights


@dataclass(frozen=True)
class Score:
    """One metric of one split, in both runs; None where a run has none. ``calibrated``: after calibration."""

    split: str
    metric: str
    one: float | None
    other: float | None
    calibrated: bool = False

    @property
    def difference(self) -> float | None:
        """The second's minus the first's."""
        return None if self.one is None or self.other is None else self.other - self.one

    def __str__(self) -> str:
        split = self.split.replace("ood_", "ood ", 1) + (", calibrated" if self.calibrated else "")
        gap, whole = self.difference, self.metric == "n"
        told = "" if gap is None else "same" if gap == 0 else f"{gap:+.{0 if whole else 4}f}"
        if gap and abs(gap) < 5e-5:
            told = f"{gap:+.1e}"
        values = ("-" if value is None else f"{value:.{0 if whole else 4}f}" for value in (self.one, self.other))
        return f"{split:<26.26} {self.metric:<12.12}" + "".join(f"{value:>12}" for value in (*values, told))


@dataclass(frozen=True)
class Differences:
    """What two runs do not have in common, and what came of it.

    Args:
        one, other: the run folders.
        recipe: fields, ingredients and stages, by path.
        environment: versions, hardware, threads, processes.
        identity: data, model, task and labels: digests, sources, sizes.
        scores: of every split, before and after calibration, equal or not.
        weights: how the saved weights compare.
        parted: the first training step whose loss differs; None when none does.
        seconds: that each run took.
    """

    one: str
    other: str
    recipe: tuple[Change, ...]
    environment: tuple[Change, ...]
    identity: tuple[Change, ...]
    scores: tuple[Score, ...]
    weights: Weights
    parted: int | None
    seconds: tuple[float, float]

    @property
    def scored_alike(self) -> bool:
        """Whether every score of every split is the same number."""
        return all(score.one == score.other for score in self.scores)

    def lines(self) -> list[str]:
        """The same as text, at most 80 columns wide."""
        told = [f"first:  {self.one}", f"second: {self.other}"]
        parts = {"recipe": self.recipe, "environment": self.environment, "data and model": self.identity}
        for title, found in parts.items():
            told += ["", title, *(f"  {change}" for change in found or ("the same",))]
        told += ["", *self.outcome(), f"seconds: {self.seconds[0]:.1f} and {self.seconds[1]:.1f}"]
        return wrapped(told)

    def outcome(self, *, equal: bool = True) -> list[str]:
        """Scores, losses and weights as text; ``equal``: whether scores that are the same are told one by one."""
        shown = [score for score in self.scores if equal or score.one != score.other]
        same = len(self.scores) - len(shown)
        heads = "".join(f"{name:>12}" for name in ("first", "second", "difference"))
        told = [f"{'scores':<39}  {heads}", *(f"  {score}" for score in shown)] if shown else []
        told += [f"scores: {same} of {len(self.scores)} are the same to the last digit"] if same and not equal else []
        parted = "the same at every step" if self.parted is None else f"differ from step {self.parted} on"
        return [*told, f"training losses: {parted}", "weights", *(f"  {line}" for line in self.weights.lines())]

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON has."""
        told: dict[str, Any] = plain(asdict(self))
        return told


def diff(one: str | Path, other: str | Path) -> Differences:
    """What differs between two finished runs.

    Args:
        one, other: run folders.
    Raises:
        LuthierError: a folder holds no run that has ended, or a file in it cannot be read.
    """
    first, second = expanded(one), expanded(other)
    before, after = Report.load(first), Report.load(second)
    from luthier.finished.weights import weights_between

    return Differences(
        str(one),
        str(other),
        between_recipes(first, second),
        changes(surroundings(first), surroundings(second)),
        changes(_identity(before), _identity(after)),
        tuple(chain(_scores(before.metrics, after.metrics), _scores(before.calibrated, after.calibrated, True))),
        weights_between(first, second),
        _parted(before.curves.get("loss", []), after.curves.get("loss", [])),
        (before.seconds, after.seconds),
    )


def _identity(report: Report) -> dict[str, Any]:
    data, model = report.data, report.model
    return {
        "data": {name: data.get(name) for name in ("digest", "source", "sizes", "columns")},
        "model": {
            "start weights": model.get("digest"),
            **{name: model.get(name) for name in ("pretrained", "source", "parameters", "max_length")},
        },
        "task": report.task,
        "labels": list(report.labels),
    }


def _scores(one: Mapping[str, Any], other: Mapping[str, Any], calibrated: bool = False) -> Iterator[Score]:
    ours, theirs = flat(one), flat(other)
    for split in dict.fromkeys((*ours, *theirs)):
        a, b = ours.get(split, {}), theirs.get(split, {})
        for metric in dict.fromkeys((*a, *b)):
            if all(isinstance(value, (int, float, type(None))) for value in (a.get(metric), b.get(metric))):
                yield Score(split, metric, a.get(metric), b.get(metric), calibrated)


def _parted(one: list[list[float]], other: list[list[float]]) -> int | None:
    """The first step at which one of two loss curves, as [step, loss], has what the other has not."""
    for a, b in zip(one, other, strict=False):
        if a != b:
            return int(min(a[0], b[0]))
    longer = max(one, other, key=len)
    return None if len(one) == len(other) else int(longer[min(len(one), len(other))][0])
