"""The report as one HTML page: no script, no network, opens from a mail or a USB stick, prints on one or two sheets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from luthier.jsonfile import write_whole
from luthier.page import curves as curve_plots
from luthier.page import plots, tables, words
from luthier.report import Report, flat
from luthier.svg import clipped, tidy
from luthier.units import count, duration, size

TEXT_LETTERS = 280  # of a mistake's text
SHOWN_SPLITS = 3  # with a confusion matrix and reliability diagrams


@dataclass(frozen=True)
class Figure:
    """An SVG and the sentence under it."""

    svg: str
    caption: str


def render(report: Report, studies: Sequence[Figure] = ()) -> str:
    """The page; the same text for the same report.

    Args:
        studies: pictures of studies of the run, each with what it says.
    """
    template = environment().get_template("page.html.j2")
    splits = _splits(report)
    return template.render(
        report=report,
        cards=words.cards(report),
        sentences=words.sentences(report),
        scores=tables.scores(report),
        calibration=words.calibration_name(report),
        curves=_curves(report),
        movement=_movement(report),
        confusions=tables.confusions(report, splits),
        reliability=_reliability(report, splits) + _selective(report, splits),
        trust=tables.trust(report),
        trust_columns=tables.TRUST,
        scatter=_scatter(report),
        plans=tables.plans(report.plan),
        studies=studies,
    )


def save(report: Report, folder: str | Path) -> Path:
    """Writes report.html into ``folder``, whole or not at all, with the studies that ``folder/study`` holds.

    Raises:
        RunError: it cannot be written; what stood there is untouched.
    """
    path = Path(folder) / "report.html"
    write_whole(path, render(report, _studies(Path(folder) / "study")))
    return path


def _studies(folder: Path) -> list[Figure]:
    told = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    return [Figure(one["svg"], one["title"] + "\n\n" + "\n".join(one["lines"])) for one in told]


def environment() -> Environment:
    """The templates of this folder, escaped, with the house's filters."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(count=count, size=size, duration=duration, clipped=_clipped, split=words.split_title)
    return made


def _clipped(text: Any, most: int = TEXT_LETTERS) -> str:
    return clipped(str(text), most)


def _splits(report: Report) -> list[str]:
    """Which splits have pictures: the one that counts, then shifted tests."""
    return [split for split in report.splits if split == report.shown or split.startswith("ood_")][:SHOWN_SPLITS]


def _curves(report: Report) -> list[Figure]:
    curves = {name: report.curves.get(name, []) for name in ("loss", "learning_rate", "validation", "stage_starts")}
    if not curves["loss"]:
        return []
    unit = "nats" if report.task == "classification" else ""
    told = "The training loss of each step and its moving average"
    told += "; the loss on validation." if any("nll" in scores for _, scores in curves["validation"]) else "."
    found = [Figure(curve_plots.loss(curves, unit=unit), told)]
    name = words.title(report.metric)
    measured = curve_plots.validation(curves, metric=report.metric, title=name)
    if measured:
        found.append(Figure(measured, f"The {name} on validation while training."))
    if curves["learning_rate"]:
        found.append(Figure(curve_plots.rate(curves), "The learning rate of the fastest weights."))
    return found


def _movement(report: Report) -> list[Figure]:
    moved = [row for row in report.movement if row.relative > 0]
    if not moved:
        return []
    most, least = max(moved, key=lambda row: row.relative), min(moved, key=lambda row: row.relative)
    told = f"The {most.name} moved most for its size, in {most.stage}: {_percent(most.relative)}\u00a0% of its norm."
    if least != most:
        told += f" {least.name.capitalize()} in {least.stage} moved least: {_percent(least.relative)}\u00a0%."
    absolute = plots.movement(report.movement, absolute=True, name="distance")
    return [
        Figure(plots.movement(report.movement), told + " No bar: did not move."),
        Figure(absolute, "The same change as a distance, not relative to the layer's own norm."),
    ]


def _percent(share: float) -> str:
    return tidy(float(f"{100 * share:.2g}"))


def _scatter(report: Report) -> list[Figure]:
    if not report.scatter:
        return []
    told = f"{len(report.scatter)} rows of {report.shown}."
    return [
        Figure(plots.scatter(report.scatter), told),
        Figure(plots.errors(report.scatter), "How far off the same rows are, and to which side."),
    ]


def _reliability(report: Report, splits: list[str]) -> list[Figure]:
    found = []
    for at, split in enumerate(splits):
        bins = report.reliability.get(split, {})
        where = words.split_title(split)
        for when, scores in (("before", report.splits), ("after", flat(report.calibrated))):
            if not bins.get(when):
                continue
            how = "as trained" if when == "before" else f"after {words.calibration_name(report)}"
            ece = words.shown("ece", scores.get(split, {}).get("ece"))
            told = f"{where}, {how}: ECE {ece}"
            svg = plots.reliability(bins[when], label=told, name=f"reliability-{at}-{when}")
            found.append(Figure(svg, told))
    return found


def _selective(report: Report, splits: list[str]) -> list[Figure]:
    found = []
    for at, split in enumerate(splits):
        curves, areas = report.selective.get(split, {}), report.trust.get(split, {})
        if not curves.get("before"):
            continue
        changed = bool(curves.get("after")) and curves["after"] != curves["before"]
        how = f"after {words.calibration_name(report)}"
        told = f"{words.split_title(split)}: how often it is wrong if only its surest rows are answered"
        if areas.get("before"):
            told += f"; the mean over all shares (AURC) is {words.shown('aurc', areas['before'].get('aurc'))}"
            if changed and areas.get("after"):
                told += f", {words.shown('aurc', areas['after'].get('aurc'))} {how}"
        if curves.get("after") and not changed:
            told += "; calibration leaves the order of the rows as it is"
        svg = plots.selective(
            curves["before"],
            curves["after"] if changed else [],
            how=how,
            label=words.split_title(split),
            name=f"selective-{at}",
        )
        found.append(Figure(svg, told + "."))
    return found
