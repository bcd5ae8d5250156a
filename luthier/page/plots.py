"""The plots of the report page but the curves: each function gives one SVG, the same bytes for the same numbers.

Colours differ in lightness, and lines also in dash or marker, so that a grey print and colour-blind eyes can tell them
apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from luthier.svg import AMBER, DARK, PALE, SOFT, clipped, draw, log_axis, once, tidy

SERIES = ((DARK, "o"), (AMBER, "s"), ("#7b5ea7", "^"), ("#7fb8ad", "D"))


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
            log_axis(axes.xaxis, axes.set_xscale)
            axes.set_xlim(min(values) / 2, max(values) * (max(values) / min(values)) ** 0.2)
        thick = 0.8 / len(stages)
        for row, x in moved:
            at = stages.index(row.stage)
            colour, marker = SERIES[at % len(SERIES)]
            y, number = place[row.depth] + 0.4 - (at + 0.5) * thick, tidy(float(f"{x:.2g}"))
            axes.barh(y, x, 0.55 * thick, color=colour, alpha=0.55)
            axes.plot([x], [y], marker, color=colour, markersize=5.5, label=once(axes, row.stage))
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
            top.plot([gap[0]] * 2, gap, color=AMBER, linewidth=4, label=once(top, "gap"), solid_capstyle="butt")
        points = [[one["confidence"] for one in full], [one["accuracy"] for one in full]]
        top.plot(*points, "o-", color=DARK, markersize=6, linewidth=1.6, label="this model", clip_on=False)
        top.set(xlim=(0, 1), ylim=(0, 1.03), ylabel="accuracy (share right)")
        below = sum(one["count"] * (one["confidence"] - one["accuracy"]) for one in full) >= 0
        top.legend(loc="upper left" if below else "lower right")
        for one in full:
            middle, count = (one["low"] + one["high"]) / 2, one["count"]
            low.bar(middle, count, 0.86 * (one["high"] - one["low"]), color=PALE)
            low.annotate(f"{count}", (middle, count), (0, 2), textcoords="offset points", ha="center", size=8)
        low.margins(y=0.35)
        low.grid(visible=False)
        low.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        low.set(xlabel="confidence (probability of the predicted class)", ylabel="rows")

    return draw(paint, name=name, label=f"Reliability diagram, {label}", height=4.4)


def selective(
    before: Sequence[Sequence[float]], after: Sequence[Sequence[float]], *, how: str, label: str, name: str
) -> str:
    """The share of wrong rows among the surest against how many are answered, beside no order and the best one.

    Args:
        before, after: [coverage, risk] with coverage rising to 1; ``after`` may be empty.
        how: what stands between the two.
    """
    wrong = before[-1][1]

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.axhline(wrong, color=SOFT, linestyle=":", linewidth=1.4, label=f"all rows: {wrong:.3f}")
        share = np.linspace(0.005, 1, 200)
        axes.plot(
            share, np.maximum(0, 1 - (1 - wrong) / share), "-.", color=SOFT, linewidth=1.2, label="the best order"
        )
        axes.plot(*zip(*before, strict=True), "-", color=DARK, linewidth=2, label="this model", clip_on=False)
        if after:
            axes.plot(*zip(*after, strict=True), "--", color=AMBER, linewidth=2, label=how, clip_on=False)
        axes.plot([1], [wrong], "o", color=DARK, markersize=6, clip_on=False)
        most = max(risk for _, risk in [*before, *after])
        axes.set(xlim=(0, 1), ylim=(0, 1.05 * most or 0.1))
        axes.set(xlabel="coverage (share of the rows answered, surest first)", ylabel="risk (share of these wrong)")
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2)

    return draw(
        paint, name=name, label=f"Risk against coverage, {label}; {wrong:.3f} where all are answered", height=4.4
    )


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
