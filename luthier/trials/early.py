"""Start many, stop early, continue some: all runs of a recipe pause at a share of their steps, and the best of them go on.

What is to be done follows from the folder alone, so any number of processes come to the same answer: a recipe's runs are first brought
to their pause; when each has paused or ended, those with the best validation scores go on from there, the others stay stopped.

Source: Dodge, Ilharco, Schwartz, Farhadi, Hajishirzi, Smith 2020 (arXiv:2002.06305).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from luthier.core.scores import HIGHER_IS_BETTER
from luthier.errors import Fault, LuthierError
from luthier.report import flat
from luthier.trials.design import Design, Trial
from luthier.trials.desk import Desk

Turn = tuple[Trial, float | None]  # a run to be done, and the share of its steps at which it pauses: None is its end
Standing = Literal["starts", "waits", "goes on", "stopped", "ended"]


@dataclass(frozen=True)
class Early:
    """Of ``start`` runs of each recipe (and setting) that pause after ``share`` of their trained steps, the ``keep`` best go on."""

    start: int
    share: float
    keep: int

    @classmethod
    def of(cls, design: Design) -> Early | None:
        """What ``design`` asks for; None where all runs go to their end."""
        told = design.more.get("early")
        return None if told is None else cls(**told)

    @classmethod
    def read(cls, text: str) -> Early:
        """
        >>> Early.read("start=20, share=0.3, keep=5")
        Early(start=20, share=0.3, keep=5)

        Raises:
            LuthierError: a number is missing, unknown or cannot be; all of these.
        """
        told = {name.strip(): value.strip() for name, _, value in (part.partition("=") for part in text.split(","))}
        known: dict[str, float] = {}
        faults = [Fault(name, "must be start, share or keep") for name in told if name not in _KINDS]
        for name, (must, fits) in _KINDS.items():
            try:
                known[name] = float(told.get(name, "nan"))
            except ValueError:
                known[name] = math.nan
            if not fits(known[name]):
                faults.append(Fault(name, f"must be {must}", told.get(name, "none")))
        if known["keep"] > known["start"]:
            faults.append(Fault("keep", f"must be at most the {told['start']} runs that start", told["keep"]))
        if faults:
            raise LuthierError.of(faults, f"--early {text}")
        return cls(int(known["start"]), known["share"], int(known["keep"]))

    def sentence(self, metric: str) -> str:
        """What the levels of such a comparison are."""
        which = f"the best {self.keep} of {self.start} runs of each recipe by {metric} on validation"
        return f"levels are of {which} at {100 * self.share:g} % of the steps: no random sample of seeds, so no difference is claimed"


_KINDS = {
    "start": ("a number of runs", lambda value: value >= 1 and value % 1 == 0),
    "share": ("in (0, 1)", lambda value: 0 < value < 1),
    "keep": ("a number of runs", lambda value: value >= 1 and value % 1 == 0),
}


def turns(desk: Desk, design: Design) -> list[Turn]:
    """What is left to be done now, runs that others have under way among it; when there is none, the comparison is made."""
    early = Early.of(design)
    if early is None:
        return [(trial, None) for trial in design.trials() if not _ended(desk, trial)]
    stand = standing(desk, design)
    shares: dict[Standing, float | None] = {"starts": early.share, "goes on": None}
    return [(trial, shares[stand[trial]]) for trial in design.trials() if stand[trial] in shares]


def stopped(desk: Desk, design: Design) -> frozenset[Trial]:
    """The runs that stay at their pause; none without early stopping."""
    if Early.of(design) is None:
        return frozenset()
    return frozenset(trial for trial, stand in standing(desk, design).items() if stand == "stopped")


def picked(desk: Desk, design: Design) -> frozenset[Trial]:
    """The runs that a comparison is of: all, or those that were chosen to go on, once they are."""
    if Early.of(design) is None:
        return frozenset(design.trials())
    stand = standing(desk, design)
    whole = [group for group in groups(design).values() if not any(stand[trial] == "starts" for trial in group)]
    return frozenset(trial for group in whole for trial in kept(desk, design, group))


def standing(desk: Desk, design: Design) -> dict[Trial, Standing]:
    """Where each run stands between its start and its end."""
    found: dict[Trial, Standing] = {}
    for group in groups(design).values():
        ended = {trial for trial in group if _ended(desk, trial)}
        starts = {trial for trial in group if trial not in ended and desk.paused(trial) is None}
        best = set() if starts else set(kept(desk, design, group))
        for trial in group:
            if trial in ended:
                found[trial] = "ended"
            elif trial in starts:
                found[trial] = "starts"
            else:
                found[trial] = "waits" if starts else "goes on" if trial in best else "stopped"
    return found


def kept(desk: Desk, design: Design, group: Sequence[Trial]) -> list[Trial]:
    """The runs of ``group`` that go on: the best at their pause, of equal ones the first; never one without a score.

    A run that ended before its pause counts by the score it ended with; one that failed after it keeps its place, so that the choice
    never changes once it can be made.
    """
    early = Early.of(design)
    scores = {trial: value for trial in group if (value := _score(desk, design, trial)) is not None}
    return sorted(scores, key=lambda trial: scores[trial], reverse=True)[: early.keep if early else None]


def groups(design: Design) -> dict[tuple[str, str], list[Trial]]:
    """The runs among which is chosen: those of one recipe in one setting, by seed."""
    found: dict[tuple[str, str], list[Trial]] = {}
    for trial in design.trials():
        found.setdefault((trial.setting, trial.recipe), []).append(trial)
    return found


def _ended(desk: Desk, trial: Trial) -> bool:
    return desk.done(trial) or desk.failure(trial) is not None


def _score(desk: Desk, design: Design, trial: Trial) -> float | None:
    """What the run is chosen by, larger is better; None where it is no number."""
    told = desk.paused(trial)
    if told is None:
        if not desk.done(trial):
            return None
        report = desk.report(trial)
        told = {"metric": report["metric"], "scores": flat(report["metrics"]).get("validation", {})}
    metric = design.metric or told["metric"]
    value = told["scores"].get(metric)
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value) if HIGHER_IS_BETTER[metric] else -float(value)
