"""What a comparison found: runs, differences, cost. A frozen value that is saved as comparison.json and read back.

Light on purpose, as ``report`` is: reading one loads neither torch nor matplotlib.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from luthier.errors import Fault, LuthierError
from luthier.jsonfile import expanded, plain, read_as, write_whole

SCHEMA = 3  # of comparison.json; a field more is a new number
WIDTH = 80  # columns of summary()


@dataclass(frozen=True)
class TrialRow:
    """One run of a comparison.

    Args:
        name: of its folder in ``runs/``.
        setting: data and model, as ``Setting.name``.
        seeds: ``{"seed": 3}``, or the streams that vary: ``{"head": 0, "order": 2}``.
        state: done, failed (it ended with an error), stopped (early, as a bad one), or open (not run yet, or under way).
        scores: by split (validation, test, ood_NAME), by metric.
        calibrated: the same after calibration; empty where there is none.
        seconds: of training, what was shared counted in full.
        peak_bytes: the most memory that a stage took.
        trainable: the most weights that learn in one stage.
        why: of a run that failed.
    """

    name: str
    setting: str
    recipe: str
    seeds: dict[str, int]
    state: str
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    calibrated: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0
    peak_bytes: int = 0
    trainable: int = 0
    why: str = ""


@dataclass(frozen=True)
class Setting:
    """One data set and model.

    Args:
        name: as in folders; sizes: rows by split.
        splits: those with scores, in the order of a table.
        shown: the split that is looked at first.
        majority: by split, the share of the most frequent class; empty for regression.
        chosen_on: the split by which some recipe chose weights or rates; its scores are optimistic.
    """

    name: str
    data: str
    model: str
    sizes: dict[str, int]
    splits: tuple[str, ...]
    shown: str
    majority: dict[str, float]
    chosen_on: str = ""


@dataclass(frozen=True)
class Level:
    """A recipe's scores of the metric on one split over its seeds.

    Args:
        seeds: runs behind mean, worst and best.
        sd: of one run (divisor n - 1), from runs that are independent: where streams vary apart those whose streams all have the same
            number; None with one of these.
        failed: names of runs at or under the majority class, or that ended with an error.
        why: of those, what they did not get past; empty where there are none.
    """

    setting: str
    recipe: str
    split: str
    seeds: int
    mean: float
    sd: float | None
    worst: float
    best: float
    failed: tuple[str, ...] = ()
    why: str = ""


def failures(levels: Sequence[Level]) -> tuple[str, ...]:
    """A sentence for each setting and split on which runs failed; settings are named where there are several.

    >>> one, other = (Level("data", name, "test", 2, 0.5, 0.0, 0.5, 0.5, (f"{name}-seed0",), "accuracy at 0.5") for name in ("ft", "lp"))
    >>> failures([one])
    ('ft failed in 1 of 2 runs on test (ft-seed0): accuracy at 0.5',)
    >>> failures([one, other])
    ('2 recipes failed on test (accuracy at 0.5): 1 of 2 runs of ft, lp',)
    """
    told = []
    several = len({level.setting for level in levels}) > 1
    for setting, split, why in dict.fromkeys((one.setting, one.split, one.why) for one in levels if one.failed):
        here = [one for one in levels if (one.setting, one.split, one.why) == (setting, split, why) and one.failed]
        first = here[0]
        many = f"{len(first.failed)} of {first.seeds} runs"
        sentence = f"{first.recipe} failed in {many} on {split} ({', '.join(first.failed)}): {why}"
        if len(here) > 1:
            shares = sorted({(len(one.failed), one.seeds) for one in here}, reverse=True)
            parts = [
                f"{gone} of {runs} runs of {', '.join(one.recipe for one in here if (len(one.failed), one.seeds) == (gone, runs))}"
                for gone, runs in shares
            ]
            sentence = f"{len(here)} recipes failed on {split} ({why}): {'; '.join(parts)}"
        told.append(f"{setting}: {sentence}" if several else sentence)
    return tuple(told)


@dataclass(frozen=True)
class Versus:
    """One recipe minus another on one split, paired by seed and test row; larger is better for the first.

    Args:
        value, low, high: the difference seen and its interval, in the metric's own unit (0.02 is two points of accuracy); nan where
            the metric is not defined for one of the runs.
        by_seed: the difference of each seed; where streams vary apart, of each number that all of them have.
        p: of ``test``; p_adjusted: corrected by Holm over ``comparisons``.
        claimed: whether p_adjusted < alpha and 0 lies outside the interval.
        detectable: the smallest true difference that would be claimed with chance 0.8; None where none would.
        seeds_needed: seeds that would claim the difference seen with chance 0.8; None where no number would.
        sentence: the outcome in plain words.
    """

    setting: str
    split: str
    one: str
    other: str
    value: float
    low: float
    high: float
    by_seed: tuple[float, ...]
    p: float
    p_adjusted: float
    comparisons: int
    test: str
    claimed: bool
    detectable: float | None
    seeds_needed: int | None
    sentence: str


@dataclass(frozen=True)
class Comparison:
    """Everything that is told about a comparison.

    Args:
        outcome: plain sentences, what can be claimed first.
        metric: what is compared; higher_is_better: whether more of it is.
        unit: how a difference is told: name (``points``), factor (100), digits (1).
        recipes: in the order given.
        settings: each data set and model.
        trials: every run, done or not.
        levels, versus: the recipes' scores, and their differences.
        best_of: by setting, by recipe: [{"n", "expected", "standard_deviation"}], E[best of n runs] on validation, of independent
            runs.
        reliability: by setting, by recipe, ``{"before": bins, "after": bins}`` on the shown split, all seeds together.
        variance: by setting, by recipe, where the spread comes from when streams vary apart; else empty.
        chosen: by recipe, how its settings were searched for: tried, space, values, validation; else empty.
        early: how bad runs were stopped early, by recipe: started, share, kept, steps_taken, steps_full (had all been finished), saved
            (a share), runs_equivalent (full runs that cost as much); else empty.
        notes: what else to know; failed runs are named here.
        asked: the design, as design.json has it.
        path: the comparison's folder; None when nothing was kept.
    """

    metric: str
    higher_is_better: bool
    unit: dict[str, Any]
    recipes: tuple[str, ...]
    settings: tuple[Setting, ...]
    trials: tuple[TrialRow, ...]
    levels: tuple[Level, ...]
    versus: tuple[Versus, ...]
    outcome: tuple[str, ...]
    notes: tuple[str, ...] = ()
    best_of: dict[str, Any] = field(default_factory=dict)
    reliability: dict[str, Any] = field(default_factory=dict)
    variance: dict[str, Any] = field(default_factory=dict)
    chosen: dict[str, Any] = field(default_factory=dict)
    early: dict[str, Any] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)
    path: str | None = None

    def save(self, folder: str | Path) -> Path:
        """Writes comparison.json into ``folder``, whole or not at all."""
        path = expanded(folder) / "comparison.json"
        told = plain({"schema": SCHEMA, **asdict(self)})
        write_whole(path, json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        return path

    @classmethod
    def load(cls, place: str | Path) -> Comparison:
        """The comparison in a folder, or in a file.

        Raises:
            LuthierError: there is none, or it cannot be read as a comparison of this version.
        """
        path = expanded(place)
        path = path / "comparison.json" if path.is_dir() else path
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            do = "luthier compare writes it."
            raise LuthierError.of([Fault(str(path), "must be there", "", do)], "the comparison") from None
        except (OSError, ValueError) as error:
            raise LuthierError.of([Fault(str(path), "must be JSON", str(error))], "the comparison") from None
        if not isinstance(told, dict) or told.get("schema") != SCHEMA:
            got = f"schema {told.get('schema')!r}" if isinstance(told, dict) else type(told).__name__
            raise LuthierError.of([Fault(str(path), f"must have schema {SCHEMA}", got)], "the comparison")
        return read_as(cls, {name: value for name, value in told.items() if name != "schema"}, inside=str(path))

    def summary(self) -> str:
        """The outcome and a table a setting, as text of at most 80 columns."""
        return "\n".join(_lines(self))

    def __str__(self) -> str:
        return self.summary()


def _lines(found: Comparison) -> list[str]:
    lines = [line for sentence in found.outcome for line in _wrapped(sentence, "  ")]
    for setting in found.settings:
        rows = {(level.recipe, level.split): level for level in found.levels if level.setting == setting.name}
        splits = [split for split in setting.splits if any((name, split) in rows for name in found.recipes)]
        lines += ["", f"{found.metric} on {setting.name}: mean over seeds (standard deviation)"]
        shown = splits[:4]
        marks = {setting.chosen_on: "*"}
        lines.append(
            f"  {'':<18}"
            + "".join(f"{split.replace('ood_', 'ood ', 1)[:12] + marks.get(split, ''):>14}" for split in shown)
        )
        for recipe in found.recipes:
            cells = "".join(f"{_cell(rows.get((recipe, split)), found.unit):>14}" for split in shown)
            lines.append(f"  {recipe[:18]:<18}{cells}")
        if setting.chosen_on in shown:
            lines.append(f"  * weights or rates were chosen on {setting.chosen_on}: its scores are optimistic")
        if len(splits) > len(shown):
            lines.append(f"  and {', '.join(splits[len(shown) :])}: see the page")
    for note in found.notes:
        lines += _wrapped(f"to know: {note}", "  ")
    if found.path:
        lines.append(f"page: {Path(found.path) / 'compare.html'}")
    return lines


def _cell(level: Level | None, unit: dict[str, Any]) -> str:
    if level is None:
        return "-"
    factor, digits = unit["factor"], unit["digits"]
    sd = "" if level.sd is None else f" ({factor * level.sd:.{digits}f})"
    return f"{factor * level.mean:.{digits}f}{sd}"


def _wrapped(text: str, further: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=further, break_on_hyphens=False)
