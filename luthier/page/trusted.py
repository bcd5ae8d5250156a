"""Reliability by recipe: confidence against accuracy as small multiples, before and after calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from luthier.page.labels import short
from luthier.svg import AMBER, DARK, SOFT, WIDTH, draw

Bins = Sequence[Mapping[str, Any]]
Dash = Literal["-", "--"]
WHEN: tuple[tuple[str, str, str, str, Dash, float], ...] = (
    ("before", "as trained", DARK, "o", "-", 5.0),
    ("after", "calibrated", AMBER, "s", "--", 4.0),
)
FOOT, HEAD, LEFT = 46.0, 20.0, 42.0  # units of 1/72 inch
SIZE = 9.0


def ece(bins: Bins) -> float | None:
    """Expected calibration error: the mean gap between confidence and accuracy, weighted by rows.

    >>> ece([{"count": 3, "confidence": 0.9, "accuracy": 0.8}, {"count": 1, "confidence": 0.5, "accuracy": 0.5}])
    0.075
    """
    rows = sum(one["count"] for one in bins)
    if not rows:
        return None
    gaps = [one["count"] * abs(one["confidence"] - one["accuracy"]) for one in bins if one["count"]]
    return float(round(sum(gaps) / rows, 12))


def trusted(recipes: Mapping[str, Mapping[str, Bins]], *, label: str, name: str) -> str:
    """A panel a recipe; on the dashed line a model is right as often as it says."""
    across = min(len(recipes), 4 if len(recipes) > 6 else 3)
    down = math.ceil(len(recipes) / across)
    called = short(recipes, {1: 60, 2: 34, 3: 20, 4: 14}[across])
    whole = 72 * WIDTH
    wide = (whole - LEFT - 8) / across
    high = min(wide, 190.0) + 26
    tall = HEAD + FOOT + down * high

    def paint(figure: Figure) -> None:
        figure.set_layout_engine("none")
        for at, (recipe, told) in enumerate(recipes.items()):
            row, column = divmod(at, across)
            left, low = LEFT + column * wide, tall - HEAD - (row + 1) * high
            axes = figure.add_axes((left / whole, low / tall, (wide - 12) / whole, (high - 36) / tall))
            _panel(axes, told)
            axes.annotate(
                called[recipe], (0, 1), (0, 15), xycoords="axes fraction", textcoords="offset points", size=SIZE,
                weight="bold",
            )  # fmt: skip
            axes.annotate(
                _error(told), (0, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", size=SIZE - 0.5
            )
            last = at + across >= len(recipes)
            axes.tick_params(labelsize=SIZE - 0.5, labelbottom=last, labelleft=column == 0, length=2)
        figure.text(LEFT / whole, 14 / tall, "confidence (probability of the predicted class)", size=SIZE)
        figure.text(4 / whole, 0.5, "accuracy (share right)", size=SIZE, rotation=90, va="center")
        when = [one for one in WHEN if any(told.get(one[0]) for told in recipes.values())]
        lines = [Line2D([], [], color=c, marker=m, linestyle=dash, markersize=s) for _, _, c, m, dash, s in when]
        figure.legend(
            lines, [called for _, called, *_ in when], loc="upper left", ncols=2, fontsize=SIZE, borderaxespad=0.0
        )

    return draw(paint, name=name, label=label, height=tall / 72)


def _panel(axes: Axes, told: Mapping[str, Bins]) -> None:
    axes.plot([0, 1], [0, 1], "--", color=SOFT, linewidth=0.9)
    for when, _, colour, marker, dash, size in WHEN:
        full = [one for one in told.get(when) or () if one["count"]]
        points = [[one["confidence"] for one in full], [one["accuracy"] for one in full]]
        axes.plot(*points, color=colour, linestyle=dash, linewidth=1.3)
        axes.plot(*points, marker, color=colour, markersize=size, clip_on=False)
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    axes.set_xticklabels(["0", "0.5", "1"])
    axes.set_yticklabels(["0", "0.5", "1"])


def _error(told: Mapping[str, Bins]) -> str:
    errors = [ece(told[when]) for when, *_ in WHEN if told.get(when)]
    return "ECE " + " → ".join(f"{error:.3f}" for error in errors if error is not None)
