"""Quality against cost: a point a recipe, its name beside it where there is room."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from luthier.comparison import Comparison, Setting, TrialRow
from luthier.page.labels import Scale, beside, known, short, width
from luthier.svg import DARK, SOFT, WIDTH, draw, tidy

LEFT, RIGHT, FOOT, HEAD = 48.0, 10.0, 42.0, 10.0  # units of 1/72 inch
TALL = 290.0
SIZE = 9.5
ALIKE = 1.05  # costs whose largest is at most so many times the smallest tell recipes apart in nothing


@dataclass(frozen=True)
class Point:
    """A recipe: what it costs, its mean score and standard deviation."""

    recipe: str
    cost: float
    mean: float
    sd: float | None


@dataclass(frozen=True)
class Cost:
    """What is on the axis, and what a screen reader calls it."""

    points: tuple[Point, ...]
    axis: str
    name: str


def costs(comparison: Comparison, setting: Setting) -> list[Cost]:
    """Of more than one recipe: seconds of training; then peak memory, or the weights that learn where memory is alike for all."""
    seconds = _points(comparison, setting, lambda trial: trial.seconds)
    memory = _points(comparison, setting, lambda trial: trial.peak_bytes / 1e6)
    weights = _points(comparison, setting, lambda trial: float(trial.trainable))
    found = [Cost(seconds, "seconds of training (log scale)", "seconds of training")]
    if _apart(memory) or not _apart(weights):
        found.append(Cost(memory, "peak memory, MB (log scale)", "peak memory"))
    else:
        found.append(Cost(weights, "weights that learn (log scale)", "weights that learn"))
    return [cost for cost in found if len(cost.points) > 1]


def _points(comparison: Comparison, setting: Setting, of: Callable[[TrialRow], float]) -> tuple[Point, ...]:
    levels = {one.recipe: one for one in comparison.levels if (one.setting, one.split) == (setting.name, setting.shown)}
    found = []
    for recipe in comparison.recipes:
        runs = [one for one in comparison.trials if (one.setting, one.recipe) == (setting.name, recipe)]
        spent = [of(one) for one in runs if one.state == "done" and of(one) > 0]
        level = levels.get(recipe)
        if spent and level is not None and known(level.mean):
            found.append(Point(recipe, sum(spent) / len(spent), level.mean, level.sd))
    return tuple(found)


def _apart(points: Sequence[Point]) -> bool:
    spent = [point.cost for point in points]
    return bool(spent) and max(spent) > ALIKE * min(spent)


def cost(found: Cost, scale: Scale, *, label: str, name: str) -> str:
    """Mean score over cost (log axis), standard deviations over seeds as bars."""
    whole = 72 * WIDTH
    wide, tall = whole - LEFT - RIGHT, TALL - FOOT - HEAD
    called = short([point.recipe for point in found.points], 22)
    ends = [point.cost for point in found.points]
    factor = max(max(ends) / min(ends), 1.5) ** 0.12
    across = (math.log(min(ends) / factor), math.log(max(ends) * factor))
    scores = [scale.factor * (point.mean + side * (point.sd or 0)) for point in found.points for side in (-1, 1)]
    room = 0.12 * (max(scores) - min(scores)) or 2 * 10.0**-scale.digits
    along = (min(scores) - room, max(scores) + room)

    def place(point: Point) -> tuple[float, float]:
        x = (math.log(point.cost) - across[0]) / (across[1] - across[0])
        y = (scale.factor * point.mean - along[0]) / (along[1] - along[0])
        return x * wide, y * tall

    at = [place(point) for point in found.points]
    sizes = [(width(called[point.recipe], SIZE), 11.0) for point in found.points]
    half = [scale.factor * (point.sd or 0.0) / (along[1] - along[0]) * tall for point in found.points]
    bars = [(x - 1.5, y - bar, x + 1.5, y + bar) for (x, y), bar in zip(at, half, strict=True)]
    boxes = beside(at, sizes, (0.0, 0.0, wide, tall), clear=5.0, full=bars)

    def paint(figure: Figure) -> None:
        figure.set_layout_engine("none")
        axes = figure.add_axes((LEFT / whole, FOOT / TALL, wide / whole, tall / TALL))
        axes.set(xscale="log", xlim=tuple(math.exp(end) for end in across), ylim=along)
        for point, here, box in zip(found.points, at, boxes, strict=True):
            y, sd = scale.factor * point.mean, scale.factor * (point.sd or 0.0)
            side = "left" if box[0] > here[0] else "right" if box[2] < here[0] else "center"
            x = {"left": box[0], "right": box[2], "center": (box[0] + box[2]) / 2}[side]
            axes.plot([point.cost] * 2, [y - sd, y + sd], color=SOFT, linewidth=1)
            axes.plot([point.cost], [y], "o", color=DARK, markersize=7)
            nearest = (min(max(here[0], box[0]), box[2]), min(max(here[1], box[1]), box[3]))
            if math.dist(here, nearest) > 12:
                ends = [(here[0] / wide, nearest[0] / wide), (here[1] / tall, nearest[1] / tall)]
                axes.plot(*ends, color=SOFT, linewidth=0.6, transform=axes.transAxes, zorder=1)
            axes.annotate(
                called[point.recipe], (x / wide, (box[1] + box[3]) / 2 / tall), xycoords="axes fraction", size=SIZE,
                ha=side, va="center", annotation_clip=False,
            )  # fmt: skip
        _ticks(axes.xaxis, *(math.exp(end) for end in across))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.tick_params(labelsize=SIZE)
        axes.set_xlabel(found.axis, size=SIZE)
        axes.set_ylabel(scale.axis, size=SIZE)

    return draw(paint, name=name, label=label, height=TALL / 72)


def _ticks(axis: Axis, low: float, high: float) -> None:
    """Plain numbers at 1, 2 and 5, or others where the axis is short."""
    places = [value for value in LogLocator(subs=(1.0, 2.0, 5.0)).tick_values(low, high) if low <= value <= high]
    if len(places) < 2:
        places = [value for value in MaxNLocator(4).tick_values(low, high) if low <= value <= high]
    while len(places) > 7:
        places = places[::2]
    axis.set_major_locator(FixedLocator(places))
    axis.set_minor_locator(FixedLocator([]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: tidy(value)))
    axis.set_minor_formatter(NullFormatter())
