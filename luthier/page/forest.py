"""The forest plot of a comparison: each difference with its interval, what can be claimed filled, the rest hollow."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from luthier.comparison import Versus
from luthier.page.labels import Scale, chance, columns, cut, known, short, width
from luthier.svg import DARK, GRID, SOFT, WIDTH, draw

MOST_ROWS = 20
ROW, FOOT, HEAD = 21.0, 42.0, 22.0  # units of 1/72 inch
BESIDE = 24  # columns of a label beside its row; longer ones stand above it
SIZE = 9.5

Limits = tuple[float, float]


def chosen(rows: Sequence[Versus], order: Sequence[tuple[str, str]] = ()) -> list[Versus]:
    """The rows that are drawn: all, or the MOST_ROWS that say most: claims, then the smallest p, then the largest difference.

    Args:
        order: of pairs, from above; those not in it come last.
    """
    loud = sorted(rows, key=lambda one: (not one.claimed, one.p_adjusted, -abs(one.value)))[:MOST_ROWS]
    place = {pair: at for at, pair in enumerate(order)}
    return sorted(loud, key=lambda one: place.get((one.one, one.other), len(place)))


def ordered(rows: Sequence[Versus]) -> list[tuple[str, str]]:
    """Pairs from the largest difference to the smallest."""
    return [(one.one, one.other) for one in sorted(rows, key=lambda one: -one.value)]


def reach(rows: Sequence[Versus]) -> Limits:
    """From the lowest to the highest bound, 0 included."""
    bounds = [bound for one in rows for bound in (one.low, one.value, one.high) if known(bound)]
    return min([0.0, *bounds]), max([0.0, *bounds])


def limits(of: Sequence[Limits]) -> list[Limits]:
    """The same axis for all plots that are read side by side, unless one of them is three times as wide as another."""
    spans = [high - low for low, high in of]
    if spans and max(spans) <= 3 * min(spans):
        return [(min(low for low, _ in of), max(high for _, high in of))] * len(of)
    return list(of)


def forest(rows: Sequence[Versus], scale: Scale, *, title: str, within: Limits, label: str, name: str) -> str:
    """One row for each difference, from above; the interval's text and p on the right.

    Args:
        title: above the rows.
        within: the ends of the axis, in the metric's own unit.
        label: what a screen reader says.
    """
    names = [recipe for row in rows for recipe in (row.one, row.other)]
    sign = "−" if scale.higher else "over"
    beside = max(columns(row.one) + columns(row.other) for row in rows) + columns(sign) + 2 <= BESIDE
    called = short(names, 26)
    labels = [f"{called[row.one]} {sign} {called[row.other]}" for row in rows]
    seen = [f"{scale.gap(row.value)} [{_bound(row.low, scale)}, {_bound(row.high, scale)}]" for row in rows]
    row_height = ROW if beside else 1.75 * ROW
    tall = row_height * len(rows) + FOOT + HEAD
    left = 12 + (max(width(one, SIZE) for one in labels) if beside else 6.0)
    right = 18 + max(width(one, SIZE) for one in [*seen, "difference"])
    whole = 72 * WIDTH
    wide = whole - left - right - 44

    def paint(figure: Figure) -> None:
        figure.set_layout_engine("none")
        axes = figure.add_axes((left / whole, FOOT / tall, wide / whole, (tall - FOOT - HEAD) / tall))
        axes.axvline(0, color=SOFT, linewidth=1.2)
        for at, row in enumerate(rows):
            y = len(rows) - 1 - at
            _row(axes, row, y, scale)
            if beside:
                _beside(axes, labels[at], (0, y), (-8, 0), ha="right")
            else:
                _beside(axes, labels[at], (0, y + 0.37), (2, 0), over=True)
            _beside(axes, seen[at], (1, y), (10, 0), strong=row.claimed)
            _beside(axes, chance(row.p_adjusted), (1, y), (whole - left - wide - 4, 0), ha="right", strong=row.claimed)
        top = len(rows) - 0.5 + (0.2 if not beside else 0)
        figure.text(6 / whole, 1 - 12 / tall, cut(title, 34), size=10.5, weight="bold")
        for text, far, ha in (("difference", 10.0, "left"), ("p (Holm)", whole - left - wide - 4, "right")):
            axes.annotate(
                text, (1, 1), (far, 9), xycoords="axes fraction", textcoords="offset points", size=9, color=SOFT, ha=ha
            )
        axes.set(ylim=(-0.6, top), yticks=[], xlabel=_axis(scale))
        axes.xaxis.label.set_fontsize(SIZE)
        axes.tick_params(axis="x", labelsize=SIZE)
        axes.spines["left"].set_visible(False)
        axes.grid(visible=True, axis="x")
        low, high = (scale.factor * end for end in within)
        room = 0.06 * (high - low) or 10.0**-scale.digits
        axes.set_xlim(low - room, high + room)
        axes.xaxis.set_major_locator(MaxNLocator(max(2, int(wide / 42))))

    return draw(paint, name=name, label=label, height=tall / 72)


def _row(axes: Axes, row: Versus, y: float, scale: Scale) -> None:
    low, value, high = (scale.factor * number for number in (row.low, row.value, row.high))
    axes.plot([low, high], [y, y], color=DARK, linewidth=2.6 if row.claimed else 1.1, solid_capstyle="butt")
    look = {"marker": "s", "markersize": 7.5} if row.claimed else {"marker": "o", "markersize": 6.5}
    face = DARK if row.claimed else "white"
    axes.plot([value], [y], linestyle="none", color=DARK, markerfacecolor=face, markeredgewidth=1.4, **look)  # type: ignore[arg-type]
    axes.axhline(y - 0.5, color=GRID, linewidth=0.6, zorder=0)


def _beside(
    axes: Axes,
    text: str,
    at: tuple[float, float],
    off: tuple[float, float],
    *,
    ha: str = "left",
    strong: bool = False,
    over: bool = False,
) -> None:
    back = {"facecolor": "white", "edgecolor": "none", "pad": 0.6} if over else None
    axes.annotate(
        text, at, off, xycoords=("axes fraction", "data"), textcoords="offset points", ha=ha, va="center", size=SIZE,
        weight="bold" if strong else "normal", annotation_clip=False, bbox=back,
    )  # fmt: skip


def _bound(value: float, scale: Scale) -> str:
    return scale.score(value)


def _axis(scale: Scale) -> str:
    if scale.higher:
        return f"{scale.apart}; right of 0 the first is better"
    return f"how much lower the first's {scale.apart} is; right of 0 it is better"


def told(row: Versus, scale: Scale, most: int = 40) -> str:
    """A row for a screen reader: ``lp-ft − ft +2.1``."""
    return f"{cut(row.one, most)} − {cut(row.other, most)} {scale.gap(row.value)}"
