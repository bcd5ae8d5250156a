"""What a run found: scores, curves, movement, provenance. A frozen value that is saved as report.json and read back.

Light on purpose: reading a report loads neither torch nor matplotlib, so that many runs can be compared in a moment.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from luthier.errors import Fault, LuthierError
from luthier.jsonfile import expanded, plain, read_as, write_whole

SCHEMA = 3  # of report.json; a field more is a new number
WIDTH = 80  # columns of summary()


@dataclass(frozen=True)
class StageReport:
    """How one stage went. ``seconds`` is training time alone; ``steps`` is 0 where the head is solved."""

    name: str
    steps: int
    seconds: float
    examples_per_second: float
    trainable_parameters: int
    peak_memory_bytes: int
    solver: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Movement:
    """How far one depth moved in one stage.

    Args:
        distance: L2 norm of the change of its weights.
        relative: the same over the norm at the stage's start; 0.02 is two per cent.
    """

    stage: str
    depth: int
    name: str
    weights: int
    trainable: bool
    distance: float
    relative: float


@dataclass(frozen=True)
class Report:
    """Everything that is told about a run.

    Args:
        recipe, recipe_digest, seed: what was done.
        task: classification or regression; labels: the classes' names, or the target's.
        metric: the name of the metric that is looked at first.
        metrics: scores by split: ``{"validation": {...}, "test": {...}, "ood": {NAME: {...}}}``.
        calibrated: the same after calibration; empty when there is none.
        calibration: what calibration found, such as ``{"temperature": 1.31, "at_bound": False}``.
        stages, movement: what each stage took, and how far it moved the weights of each depth.
        curves: ``loss`` and ``learning_rate`` as [step, value], ``validation`` as [step, scores], ``stage_starts`` as
            [step, name]; steps are counted over the whole run.
        confusion: by split, counts; row = true class, column = predicted class.
        reliability: by split, ``{"before": bins, "after": bins}``; a bin has low, high, count, confidence, accuracy.
        mistakes: rows with split, text, pair, label, prediction, confidence.
        data: source, digest, digests and sizes by split, notes; constant, the RMSE by split of always answering the mean training label.
        model: source, digest, parameters.
        plan: the plan as JSON; only the page looks inside.
        warnings: what else to know, as sentences.
        seconds: of the whole run, all its sessions together.
        path: the run folder; None when nothing was kept.
        scatter: (true, predicted) of a regression, at most 500.
        environment: versions and hardware, as environment.json has them.
        trust: by split, ``{"before": numbers, "after": numbers}`` of a classification: ece with ece_low and ece_high (95 %, basic
            bootstrap), ece_mass (bins of equal mass), mce, aurc, accuracy_at_80 and accuracy_at_50 (of the surest 80 and 50 % of the rows).
        selective: by split, ``{"before": points, "after": points}`` of a classification: [coverage, risk], the share of the rows that are
            answered, the surest first, and the share of these that is wrong; at most 50.
        chosen_on: the split by whose scores weights or rates were chosen, so that its own scores are optimistic; empty for none.
    """

    recipe: str
    recipe_digest: str
    seed: int
    task: str
    labels: tuple[str, ...]
    metric: str
    metrics: dict[str, Any]
    calibrated: dict[str, Any]
    calibration: dict[str, Any]
    stages: tuple[StageReport, ...]
    movement: tuple[Movement, ...]
    curves: dict[str, Any]
    confusion: dict[str, Any]
    reliability: dict[str, Any]
    mistakes: list[dict[str, Any]]
    data: dict[str, Any]
    model: dict[str, Any]
    plan: dict[str, Any]
    warnings: tuple[str, ...]
    seconds: float
    path: str | None
    scatter: list[list[float]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    chosen_on: str = ""
    trust: dict[str, Any] = field(default_factory=dict)
    selective: dict[str, Any] = field(default_factory=dict)

    @property
    def shown(self) -> str | None:
        """The split that is looked at first: test, else validation, else None."""
        return next((name for name in ("test", "validation") if name in self.metrics), None)

    @property
    def splits(self) -> dict[str, dict[str, Any]]:
        """The scores by split, flat and in the order of a table: validation, test, then ``ood_NAME``."""
        return flat(self.metrics)

    def baseline(self, split: str) -> tuple[str, float, str] | None:
        """What is reached on ``split`` without a look at the text: metric, score, what is always answered; None if not known."""
        rows = [sum(row) for row in self.confusion.get(split, [])]
        if self.task == "classification" and sum(rows) and len(rows) == len(self.labels):
            if max(rows) == sum(rows):
                return None  # of one class: who always says it makes no mistake
            return "accuracy", max(rows) / sum(rows), self.labels[rows.index(max(rows))]
        constant = self.data.get("constant", {}).get(split)
        return None if constant is None else ("rmse", constant, "the mean of the training labels")

    def no_better(self, split: str) -> bool:
        """Whether the run is known to be no better on ``split`` than its baseline."""
        known = self.baseline(split)
        score = self.splits.get(split, {}).get(known[0]) if known else None
        if known is None or score is None:
            return False
        return bool(score <= known[1] + 1e-12 if known[0] == "accuracy" else score >= known[1])

    def to_json(self) -> dict[str, Any]:
        """Plain values that JSON has; a number that is not finite becomes None."""
        told: dict[str, Any] = plain({"schema": SCHEMA, **asdict(self)})
        return told

    def save(self, folder: str | Path) -> Path:
        """Writes report.json into ``folder``, whole or not at all.

        Raises:
            RunError: it cannot be written; what stood there is untouched.
        """
        path = expanded(folder) / "report.json"
        write_whole(path, json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        return path

    @classmethod
    def load(cls, place: str | Path) -> Report:
        """The report in a run folder, or in a file.

        Raises:
            LuthierError: there is none, or it cannot be read as a report of this version.
        """
        path = expanded(place)
        if path.is_dir():
            path = path / "report.json"
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise _unreadable(path, "must be there", "", "A run writes it when it has ended.") from None
        except (OSError, ValueError) as error:
            raise _unreadable(path, "must be a report in JSON", str(error), "") from None
        if not isinstance(told, dict) or "schema" not in told:
            raise _unreadable(path, "must be a report with its schema", "no schema", "Give a run folder.")
        if told["schema"] != SCHEMA:
            do = "Read it with the version of luthier that wrote it."
            raise _unreadable(path, f"must have schema {SCHEMA}", f"schema {told['schema']!r}", do)
        return read_as(cls, {name: value for name, value in told.items() if name != "schema"}, inside=str(path))

    def summary(self) -> str:
        """The scores as text, at most 80 columns wide."""
        return "\n".join(_lines(self))

    def __str__(self) -> str:
        return self.summary()


def flat(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Scores by split, with the shifted tests as ``ood_NAME``.

    >>> list(flat({"ood": {"bbc": {}}, "test": {}, "validation": {}}))
    ['validation', 'test', 'ood_bbc']
    """
    order = [name for name in ("validation", "test") if name in metrics]
    order += [name for name in metrics if name not in ("validation", "test", "ood")]
    shifted = {f"ood_{name}": scores for name, scores in metrics.get("ood", {}).items()}
    return {**{name: metrics[name] for name in order}, **shifted}


def _unreadable(path: Path, must: str, got: str, do: str) -> LuthierError:
    return LuthierError.of([Fault(str(path), must, got, do)], "the report")


def _lines(report: Report) -> list[str]:
    shown = report.shown
    if shown is None:
        title = f"{report.recipe}, seed {report.seed}: no split was held out, so nothing was measured"
    else:
        value = _number(report.metrics[shown].get(report.metric))
        title = f"{report.recipe}, seed {report.seed}: {report.metric} {value} on {shown}"
    lines = [*_wrapped(title, ""), *_table(report.splits, report.metric, report.chosen_on)]
    if shown and (known := report.baseline(shown)) and (report.task == "regression" or report.no_better(shown)):
        what = repr(known[2]) if report.task == "classification" else known[2]
        told = f"  always answering {what}: {known[0]} {_number(known[1])} on {shown}"
        lines += _wrapped(told + ("; this run is no better" if report.no_better(shown) else ""), "    ")
    after = report.calibrated.get(shown, {}) if shown else {}
    if shown and "ece" in after:
        heat = report.calibration.get("temperature")
        how = "calibration" if heat is None else f"temperature {_number(heat)}"
        before = _number(report.metrics[shown].get("ece"))
        lines.append(f"  after {how}: ece {before} -> {_number(after['ece'])} on {shown}")
    for warning in report.warnings:
        lines += _wrapped(f"  to know: {warning}", "    ")
    return [*lines, f"  report: {Path(report.path) / 'report.html'}" if report.path else "  nothing was kept on disk"]


def _table(splits: Mapping[str, Mapping[str, Any]], metric: str, chosen_on: str = "") -> list[str]:
    every = dict.fromkeys((metric, "accuracy", "f1_macro", "nll", "ece", "rmse", "mae", "pearson", "spearman"))
    names = [name for name in every if any(name in scores for scores in splits.values())][:4]
    lines = [f"  {'':<20}{''.join(f' {name:>9}' for name in names)}{'rows':>10}"] if splits else []
    for split, scores in splits.items():
        row = "".join(f" {_number(scores.get(name)):>9}" for name in names)
        name = f"{split.replace('ood_', 'ood ', 1)[:18]}{'*' if split == chosen_on else ''}"
        lines.append(f"  {name:<20}{row}{scores.get('n', '-'):>10}")
    if chosen_on in splits:
        lines.append(f"  * weights or rates were chosen on {chosen_on}: its scores are optimistic")
    return lines


def _wrapped(text: str, further: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=further)


def _number(value: Any) -> str:
    """At most 9 letters, but for numbers of more than a hundred digits.

    >>> _number(0.91234), _number(None), _number(-210679.2785), _number(2_106_792_785)
    ('0.9123', '-', '-210679', '2.11e+09')
    """
    if value is None or not math.isfinite(value):
        return "-"
    return next(told for form in (".4f", ".6g", ".3g") if len(told := f"{value:{form}}") <= 9 or form == ".3g")
