"""A dot for each seed, a row for each recipe: what the means are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from luthier.comparison import Comparison
from luthier.page.labels import Scale, cut, known, short, width
from luthier.svg import AMBER, DARK, GRID, PALE, SOFT, WIDTH, draw

ROW, FOOT, HEAD = 25.0, 40.0, 40.0  # units of 1/72 inch
NAME = 26  # columns
SIZE = 9.5
MARKER = 6.2


@dataclass(frozen=True)
class Row:
    """A recipe's runs on one split.

    Args:
        scores: of the runs that count as whole.
        failed: scores of runs that are no better than always giving the same answer.
        gone: how many ended without a score.
    """

    recipe: str
    scores: tuple[float, ...]
    failed: tuple[float, ...] = ()
    gone: int = 0
    mean: float | None = None
    sd: float | None = None


def rows(comparison: Comparison, setting: str, split: str) -> list[Row]:
    """A row for each recipe that has a run in this setting, in the order given; none where no run has a score."""
    found = []
    levels = {(one.setting, one.recipe, one.split): one for one in comparison.levels}
    for recipe in comparison.recipes:
        level = levels.get((setting, recipe, split))
        bad = set(level.failed) if level else set()
        whole: list[float] = []
        failed: list[float] = []
        gone = 0
        for trial in comparison.trials:
            if (trial.setting, trial.recipe) != (setting, recipe):
                continue
            score = trial.scores.get(split, {}).get(comparison.metric)
            if known(score):
                (failed if trial.name in bad or trial.state == "failed" else whole).append(score)
            else:
                gone += trial.state == "failed"
        if whole or failed or gone:
            mean, sd = (level.mean, level.sd) if level else (None, None)
            found.append(Row(recipe, tuple(whole), tuple(failed), gone, mean, sd))
    return found if any(row.scores or row.failed for row in found) else []


def swarm(values: Sequence[float], reach: float) -> list[int]:
    """How far each dot moves off its row so that none within ``reach`` covers another: 0, 1, -1, 2, ...

    >>> swarm([1.0, 1.01, 2.0, 1.02], 0.1)
    [0, 1, 0, -1]
    """
    found: list[int] = []
    for at, value in enumerate(values):
        near = {found[other] for other in range(at) if abs(values[other] - value) < reach}
        step = 0
        while step in near:
            step = -step if step > 0 else 1 - step
        found.append(step)
    return found


def dots(found: Sequence[Row], scale: Scale, *, majority: float | None, title: str, label: str, name: str) -> str:
    """The rows from above, means as bars with their numbers on the right, failed runs as crosses.

    Args:
        title: above the rows.
        majority: score of always giving the most frequent class; drawn when it lies near the runs (see ``near``).
    """
    called = short([row.recipe for row in found], NAME)
    seen = [scale.score(row.mean) + ("" if row.sd is None else f" ({scale.score(row.sd)})") for row in found]
    tall = ROW * len(found) + FOOT + HEAD
    left = 14 + max(width(text, SIZE) for text in called.values())
    right = 14 + max(width(text, SIZE) for text in [*seen, "mean (sd)"])
    whole = 72 * WIDTH
    wide = whole - left - right
    every = [scale.factor * value for row in found for value in (*row.scores, *row.failed)]
    line = scale.factor * majority if majority is not None and near(found, majority) else None
    low, high = _ends(every if line is None else [*every, line], scale)
    if any(row.gone for row in found):
        low -= 0.1 * (high - low)  # a place for runs without a score

    def paint(figure: Figure) -> None:
        figure.set_layout_engine("none")
        axes = figure.add_axes((left / whole, FOOT / tall, wide / whole, (tall - FOOT - HEAD) / tall))
        if line is not None:
            axes.axvline(line, color=SOFT, linestyle=(0, (5, 3)), linewidth=1.3)
        for at, row in enumerate(found):
            y = len(found) - 1 - at
            _row(axes, row, y, scale, MARKER / wide * (high - low))
            for text, place, far, ha in ((called[row.recipe], 0, -8, "right"), (seen[at], 1, 10, "left")):
                axes.annotate(
                    text, (place, y), (far, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                    ha=ha, va="center", size=SIZE, annotation_clip=False,
                )  # fmt: skip
        figure.text(6 / whole, 1 - 32 / tall, cut(title, 34), size=10.5, weight="bold")
        head = "mean (sd)" if any(row.sd is not None for row in found) else "score"
        axes.annotate(head, (1, 1), (10, 6), xycoords="axes fraction", textcoords="offset points", size=9, color=SOFT)
        axes.set(xlim=(low, high), ylim=(-0.6, len(found) - 0.4), yticks=[], xlabel=scale.axis)
        axes.xaxis.label.set_fontsize(SIZE)
        axes.tick_params(axis="x", labelsize=SIZE)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(max(2, int(wide / 46))))
        figure.legend(
            handles=_legend(found, line is not None), loc="upper left", ncols=4, fontsize=9, handletextpad=0.2,
            columnspacing=1.2, borderaxespad=0.1, handlelength=1.4,
        )  # fmt: skip

    return draw(paint, name=name, label=label, height=tall / 72)


def near(found: Sequence[Row], majority: float | None) -> bool:
    """Whether the majority class can be drawn without pressing the runs together: within one and a half spans of them."""
    every = [value for row in found for value in (*row.scores, *row.failed)]
    if majority is None or not known(majority) or not every:
        return False
    span = max(every) - min(every)
    return min(every) - 1.5 * span <= majority <= max(every) + 1.5 * span


def _row(axes: Axes, row: Row, y: float, scale: Scale, reach: float) -> None:
    values = sorted(scale.factor * value for value in row.scores)
    moved = swarm(values, reach)
    step = min(0.23, 0.36 / max([1, *map(abs, moved)]))
    axes.axhline(y - 0.5, color=GRID, linewidth=0.6, zorder=0)
    if row.mean is not None and known(row.mean):
        axes.plot([scale.factor * row.mean] * 2, [y - 0.4, y + 0.4], color=DARK, linewidth=2.6, zorder=2)
    axes.plot(
        values, [y + step * off for off in moved], "o", color=PALE, markeredgecolor=DARK, markeredgewidth=0.9,
        markersize=MARKER, alpha=0.85, clip_on=False, zorder=3,
    )  # fmt: skip
    crosses = sorted(scale.factor * value for value in row.failed)
    off = [y + 0.23 * step for step in swarm(crosses, 1.3 * reach)]
    axes.plot(crosses, off, "x", color=AMBER, markeredgewidth=2.2, markersize=7, clip_on=False, zorder=4)
    gone = [0.02 + 0.035 * at for at in range(min(row.gone, 3))]  # at the left edge, where no score is
    where = axes.get_yaxis_transform()
    axes.plot(gone, [y] * len(gone), "x", color=AMBER, markeredgewidth=2.2, markersize=7, transform=where, zorder=4)


def _legend(found: Sequence[Row], line: bool) -> list[Line2D]:
    told = [Line2D([], [], marker="o", linestyle="none", color=PALE, markeredgecolor=DARK, markersize=6, label="a run")]
    if any(row.mean is not None for row in found):
        told.append(
            Line2D([], [], marker="|", linestyle="none", color=DARK, markersize=10, markeredgewidth=2.6, label="mean")
        )
    if any(row.failed or row.gone for row in found):
        told.append(
            Line2D([], [], marker="x", linestyle="none", color=AMBER, markeredgewidth=2.2, markersize=6, label="failed")
        )
    if line:
        told.append(Line2D([], [], color=SOFT, linestyle=(0, (3, 2)), linewidth=1.3, label="majority class"))
    return told


def _ends(every: Sequence[float], scale: Scale) -> tuple[float, float]:
    if not every:
        return 0.0, 1.0
    room = 0.05 * (max(every) - min(every)) or 10.0 ** (1 - scale.digits)
    return min(every) - room, max(every) + room
