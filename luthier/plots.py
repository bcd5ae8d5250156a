"""The plots of the report page: each function gives one SVG, the same bytes for the same numbers.

Colours differ in lightness, and lines also in dash or marker, so that a grey print and colour-blind eyes can tell them
apart.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from luthier.svg import INK, SOFT, clipped, draw, smoothed, thinned

BAND = "#f3f1ec"
DARK, AMBER, PALE = "#163a5f", "#d98a00", "#a9bccd"
SERIES = ((DARK, "o"), (AMBER, "s"), ("#7b5ea7", "^"), ("#7fb8ad", "D"))


def loss(curves: Mapping[str, Any], *, unit: str, name: str = "loss") -> str:
    """The training loss, raw and smoothed, with the validation loss (NLL) where there is one; stages as bands."""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        smooth: list[float] = []
        for steps, values in _by_stage(curves["loss"], curves["stage_starts"]):
            axes.plot(*thinned(steps, values), color=PALE, linewidth=0.9, label=_once(axes, "each step"))
            middle = smoothed(values)
            smooth += middle.tolist()
            axes.plot(*thinned(steps, middle), color=DARK, linewidth=2.2, label=_once(axes, "smoothed"))
        told = [(step, scores["nll"]) for step, scores in curves["validation"] if scores.get("nll") is not None]
        if told:
            axes.plot(*zip(*told, strict=True), "s--", color=AMBER, markersize=6, linewidth=1.3, label="validation")
        every = [value for value in smooth + [value for _, value in told] if value > 0]
        if every and max(every) > 50 * min(every):
            _log(axes.yaxis, axes.set_yscale)
        else:
            raw = [value for _, value in curves["loss"] if value is not None]
            axes.set_ylim(min(0.0, *smooth), 1.12 * max([float(np.quantile(raw, 0.99)), *every], default=1.0) or 1.0)
        _stages(axes, curves)
        axes.set_ylabel(f"loss ({unit})" if unit else "loss")
        axes.legend(loc="upper right", bbox_to_anchor=(1, 0.92))

    return draw(paint, name=name, label="Loss by optimizer step: training, smoothed, and validation", height=5.0)


def rate(curves: Mapping[str, Any], *, name: str = "rate") -> str:
    """The highest learning rate of any group, by step; a log axis when stages differ more than twentyfold."""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        parts = _by_stage(curves["learning_rate"], curves["stage_starts"])
        for steps, values in parts:
            axes.plot(*thinned(steps, values), color=DARK, linewidth=2)
        peaks = [float(values.max()) for _, values in parts if values.max() > 0]
        if peaks and max(peaks) > 20 * min(peaks):
            _log(axes.yaxis, axes.set_yscale)
            axes.set_ylim(min(peaks) / 30, max(peaks) * 4)
        else:
            axes.set_ylim(0, 1.15 * max(peaks, default=1.0))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tidy(value)))
        _stages(axes, curves)
        axes.set_ylabel("learning rate (per step)")

    return draw(paint, name=name, label="Learning rate by optimizer step", height=2.5)


def validation(curves: Mapping[str, Any], *, metric: str, title: str, name: str = "validation") -> str | None:
    """The first metric on the validation split, by step; None when it was not measured on the way."""
    told = [(step, scores[metric]) for step, scores in curves["validation"] if scores.get(metric) is not None]
    if not told:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.plot(*zip(*told, strict=True), "s-", color=AMBER, markersize=6, linewidth=1.6, clip_on=False)
        axes.annotate(f"{told[-1][1]:.3f}", told[-1], (0, 8), textcoords="offset points", ha="center", weight="bold")
        axes.margins(y=0.25)
        _stages(axes, curves)
        axes.set_ylabel(f"validation {title}")

    return draw(
        paint, name=name, label=f"Validation {title} by optimizer step; {told[-1][1]:.3f} at the end", height=2.5
    )


def movement(rows: Sequence[Any], *, absolute: bool = False, name: str = "movement") -> str:
    """How far each depth moved, a bar for each stage; the head on top; what did not move has no bar.

    Args:
        rows: ``luthier.report.Movement``.
        absolute: the L2 norm of the change; else that norm in per cent of the norm at the stage's start.
    """
    stages = list(dict.fromkeys(row.stage for row in rows))
    depths = sorted({row.depth: row.name for row in rows}.items())
    place = {depth: at for at, (depth, _) in enumerate(depths)}
    told = [(row, row.distance if absolute else 100 * row.relative) for row in rows]
    moved = [(row, value) for row, value in told if value > 0 and math.isfinite(value)]
    values = [value for _, value in moved]
    wide = bool(values) and max(values) > 30 * min(values)
    what = "L2 norm of the change" if absolute else "change, % of the norm at the stage's start"

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        if wide:
            _log(axes.xaxis, axes.set_xscale)
            axes.set_xlim(min(values) / 2, max(values) * (max(values) / min(values)) ** 0.2)
        thick = 0.8 / len(stages)
        for row, x in moved:
            at = stages.index(row.stage)
            colour, marker = SERIES[at % len(SERIES)]
            y, number = place[row.depth] + 0.4 - (at + 0.5) * thick, _tidy(float(f"{x:.2g}"))
            axes.barh(y, x, 0.55 * thick, color=colour, alpha=0.55)
            axes.plot([x], [y], marker, color=colour, markersize=5.5, label=_once(axes, row.stage))
            axes.annotate(number, (x, y), (7, 0), textcoords="offset points", va="center", size=8.5)
        axes.set_yticks(list(place.values()), [clipped(label, 22) for _, label in depths])
        axes.set_ylim(-0.6, len(depths) - 0.4)
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.18)
        axes.set_xlabel(what + (" (log scale)" if wide else ""))
        if len(stages) > 1 and moved:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)

    height = 1.2 + max(0.24, 0.2 * len(stages)) * len(depths)
    return draw(paint, name=name, label=f"By depth and stage: {what}", height=height)


def reliability(bins: Sequence[Mapping[str, Any]], *, label: str, name: str) -> str:
    """Accuracy against confidence in bins, the gap to the diagonal, and how many rows each bin holds."""
    full = [one for one in bins if one["count"]]

    def paint(figure: Figure) -> None:
        top, low = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
        top.plot([0, 1], [0, 1], "--", color=SOFT, linewidth=1, label="confidence = accuracy")
        for one in full:
            gap = [one["confidence"], one["accuracy"]]
            top.plot([gap[0]] * 2, gap, color=AMBER, linewidth=4, label=_once(top, "gap"), solid_capstyle="butt")
        points = [[one["confidence"] for one in full], [one["accuracy"] for one in full]]
        top.plot(*points, "o-", color=DARK, markersize=6, linewidth=1.6, label="this model")
        top.set(xlim=(0, 1), ylim=(0, 1.03), ylabel="accuracy (share right)")
        top.legend(loc="upper left")
        for one in full:
            middle, count = (one["low"] + one["high"]) / 2, one["count"]
            low.bar(middle, count, 0.86 * (one["high"] - one["low"]), color=PALE)
            low.annotate(f"{count}", (middle, count), (0, 2), textcoords="offset points", ha="center", size=8)
        low.margins(y=0.35)
        low.grid(visible=False)
        low.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        low.set(xlabel="confidence (probability of the predicted class)", ylabel="rows")

    return draw(paint, name=name, label=f"Reliability diagram, {label}", height=4.4)


def scatter(points: Sequence[Sequence[float]], *, name: str = "scatter") -> str:
    """True against predicted values, with the line on which they agree."""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        true, predicted = np.asarray(points, dtype=float).T
        ends = [float(np.nanmin(points)), float(np.nanmax(points))]
        axes.plot(ends, ends, "--", color=SOFT, linewidth=1, label="predicted = true")
        axes.plot(true, predicted, "o", color=DARK, alpha=0.4, markersize=5, markeredgewidth=0, label="a row")
        axes.set(xlabel="true value (units of the label)", ylabel="predicted value", aspect="equal")
        axes.legend(loc="upper left")

    return draw(paint, name=name, label=f"True against predicted value of {len(points)} rows", height=5.2)


def errors(points: Sequence[Sequence[float]], *, name: str = "errors") -> str:
    """How the errors of a regression are spread, with their mean."""
    true, predicted = np.asarray(points, dtype=float).T
    gaps = predicted - true

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.hist(gaps, bins=25, color=PALE, edgecolor="white")
        axes.axvline(0, color=SOFT, linestyle="--", linewidth=1, label="no error")
        axes.axvline(float(gaps.mean()), color=AMBER, linewidth=2.2, label=f"mean {gaps.mean():+.2g}")
        axes.set(xlabel="predicted minus true (units of the label)", ylabel="rows")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.legend(loc="upper left")

    return draw(paint, name=name, label=f"Histogram of errors; mean {gaps.mean():+.2g}", height=5.2)


def _by_stage(points: Sequence[Sequence[Any]], starts: Sequence[Sequence[Any]]) -> list[tuple[Any, Any]]:
    """(steps, values) for each stage that took steps; what is not a number is left out."""
    told = np.array([[step, value] for step, value in points if value is not None], dtype=float).reshape(-1, 2)
    edges = [step for step, _ in starts] or [0]
    parts = []
    for at, begin in enumerate(edges):
        end = edges[at + 1] if at + 1 < len(edges) else math.inf
        part = told[(told[:, 0] > begin) & (told[:, 0] <= end)]
        if len(part):
            parts.append((part[:, 0], part[:, 1]))
    return parts


def _stages(axes: Axes, curves: Mapping[str, Any]) -> None:
    """Every other stage shaded, each with its name; a stage without steps has no band."""
    last = max([step for step, _ in [*curves["loss"], *curves["validation"]]], default=1)
    edges = [*curves["stage_starts"], [last, ""]]
    bands = [(a[0], b[0], a[1]) for a, b in itertools.pairwise(edges) if b[0] > a[0]]
    for at, (begin, end, told) in enumerate(bands):
        if at % 2 == 0 and len(bands) > 1:
            axes.axvspan(begin, end, color=BAND, zorder=0, linewidth=0)
        most = max(3, int(52 * (end - begin) / last))
        axes.annotate(
            clipped(told, most), (begin, 1), (4, -4), xycoords=("data", "axes fraction"), textcoords="offset points",
            va="top", size=9.5, color=SOFT,
        )  # fmt: skip
    axes.set_xlim(0, last)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("optimizer step (whole run)")


def _log(axis: Any, scale: Callable[[str], None]) -> None:
    scale("log")
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tidy(value)))
    axis.set_minor_formatter(NullFormatter())


def _once(axes: Axes, label: str) -> str:
    """The label for the legend, the first time only."""
    return f"_{label}" if label in axes.get_legend_handles_labels()[1] else label


def _tidy(value: float) -> str:
    """
    >>> _tidy(1e-05), _tidy(0.25)
    ('1e-5', '0.25')
    """
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
