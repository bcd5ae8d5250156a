"""What the best of n runs is worth, by recipe: expected validation performance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from luthier.page.labels import Scale, known, short, spread, width
from luthier.svg import AMBER, DARK, PALE, SOFT, WIDTH, draw

MOST_LINES = 6  # with a look of their own; the others are pale
MOST_BANDS = 3
LEFT, FOOT, HEAD = 48.0, 42.0, 10.0  # units of 1/72 inch
TALL = 290.0
SIZE = 9.5
LOOKS: tuple[tuple[str, Any, str], ...] = (
    (DARK, "-", "o"),
    (AMBER, (0, (6, 2)), "s"),
    ("#7b5ea7", (0, (2, 1.5)), "^"),
    ("#2f8f83", (0, (7, 2, 1.5, 2)), "D"),
    ("#8a4b2a", (0, (1, 1)), "v"),
    ("#4a4f57", (0, (9, 3)), "P"),
)

Curves = Mapping[str, Sequence[Mapping[str, Any]]]


def usable(curves: Curves) -> dict[str, list[tuple[int, float, float]]]:
    """(n, expected, standard deviation) by recipe, of those with more than one run."""
    found = {}
    for recipe, told in curves.items():
        points = [
            (one["n"], one["expected"], one["standard_deviation"] or 0.0) for one in told if known(one["expected"])
        ]
        if len(points) > 1:
            found[recipe] = points
    return found


def expected(curves: Curves, scale: Scale, *, label: str, name: str) -> str:
    """E[best validation score of n runs] over n; the bands of the best few are one standard deviation either way."""
    lines = usable(curves)
    sign = -1 if scale.higher else 1
    ranked = sorted(lines, key=lambda recipe: sign * lines[recipe][-1][1])
    loud = ranked[:MOST_LINES]
    called = short(loud, 22)
    whole, tall = 72 * WIDTH, TALL - FOOT - HEAD
    wide = whole - LEFT - 26 - max(width(text, SIZE) for text in called.values())
    heights = [scale.factor * (mean + side * (sd if recipe in ranked[:MOST_BANDS] else 0))
               for recipe in ranked for _, mean, sd in lines[recipe] for side in (-1, 1)]  # fmt: skip
    room = 0.05 * (max(heights) - min(heights)) or 2 * 10.0**-scale.digits
    low, high = min(heights) - room, max(heights) + room
    most = max(n for points in lines.values() for n, _, _ in points)

    def up(value: float) -> float:
        return (scale.factor * value - low) / (high - low) * tall

    places = spread([up(lines[recipe][-1][1]) for recipe in loud], 12.5, 5.0, tall - 5.0)

    def paint(figure: Figure) -> None:
        figure.set_layout_engine("none")
        axes = figure.add_axes((LEFT / whole, FOOT / TALL, wide / whole, tall / TALL))
        for recipe in ranked[MOST_LINES:]:
            axes.plot(*_line(lines[recipe], scale), color=PALE, linewidth=1)
        for at, recipe in reversed(list(enumerate(loud))):
            colour, dash, marker = LOOKS[at]
            ns, means = _line(lines[recipe], scale)
            if at < MOST_BANDS:
                sds = [scale.factor * sd for _, _, sd in lines[recipe]]
                under = [mean - sd for mean, sd in zip(means, sds, strict=True)]
                over = [mean + sd for mean, sd in zip(means, sds, strict=True)]
                axes.fill_between(ns, under, over, color=colour, alpha=0.11, linewidth=0)
                for end in (under, over):
                    axes.plot(ns, end, color=colour, linewidth=0.5, alpha=0.5)
            axes.plot(ns, means, color=colour, linestyle=dash, linewidth=1.8)
            axes.plot(ns, means, marker, color=colour, markersize=5, clip_on=False)
            begin = (ns[-1] - 0.7) / (most - 0.4), up(lines[recipe][-1][1]) / tall
            end_at = (1 + 12 / wide, places[at] / tall)
            axes.annotate(
                called[recipe], end_at, (3, 0), xycoords="axes fraction", textcoords="offset points", va="center",
                size=SIZE, annotation_clip=False,
            )  # fmt: skip
            joint = [(begin[0], end_at[0]), (begin[1], end_at[1])]
            axes.plot(*joint, color=colour, linewidth=0.7, alpha=0.7, transform=axes.transAxes, clip_on=False)
        axes.set(xlim=(0.7, most + 0.3), ylim=(low, high))
        axes.xaxis.set_major_locator(MaxNLocator(min(10, most), integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.tick_params(labelsize=SIZE)
        axes.set_xlabel("runs tried, n", size=SIZE)
        axes.set_ylabel(f"best validation {scale.axis}", size=SIZE)
        axes.spines["bottom"].set_color(SOFT)

    return draw(paint, name=name, label=label, height=TALL / 72)


def _line(points: Sequence[tuple[int, float, float]], scale: Scale) -> tuple[list[int], list[float]]:
    return [n for n, _, _ in points], [scale.factor * mean for _, mean, _ in points]
