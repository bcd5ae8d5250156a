"""Names and numbers in the pictures of a comparison: how wide a text is, how it is cut, where it finds room."""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from luthier.page.words import title

LETTER = 0.56  # of the font size: about the width of a column in the fonts that pages have

Box = tuple[float, float, float, float]  # left, bottom, right, top


@dataclass(frozen=True)
class Scale:
    """How scores and differences of one metric are told; see ``Comparison.unit``.

    >>> points = Scale("accuracy", True, "points", 100.0, 1)
    >>> points.score(0.912), points.gap(-0.0213), points.score(None), points.axis
    ('91.2', '−2.1', '–', 'accuracy, %')
    """

    metric: str
    higher: bool
    name: str
    factor: float
    digits: int

    @property
    def title(self) -> str:
        return title(self.metric)

    @property
    def axis(self) -> str:
        """What an axis of scores says."""
        unit = "%" if self.factor == 100 else self.name
        return f"{self.title}, {unit}" if unit else self.title

    @property
    def apart(self) -> str:
        """What an axis of differences says."""
        return f"{self.name} of {self.title}" if self.name else self.title

    def score(self, value: Any) -> str:
        if not known(value):
            return "–"
        return f"{self.factor * value:z.{self.digits}f}".replace("-", "−")

    def gap(self, value: Any) -> str:
        told = self.score(value)
        nothing = not known(value) or not any(letter in "123456789" for letter in told)
        return told if nothing or value < 0 else f"+{told}"


def known(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def chance(p: Any) -> str:
    """A p value.

    >>> chance(0.0312), chance(0.5), chance(0.00001), chance(1.0)
    ('0.031', '0.50', '<0.001', '1')
    """
    if not known(p):
        return "–"
    return "<0.001" if p < 0.001 else "1" if p > 0.995 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def columns(text: str) -> int:
    """How many columns a text takes: letters of East Asian scripts take two, combining marks none.

    >>> columns("lp-ft"), columns("微调")
    (5, 4)
    """
    wide = sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
    return wide - sum(1 for letter in text if unicodedata.combining(letter))


def cut(text: str, most: int) -> str:
    """The text in at most ``most`` columns: the middle goes, for names often differ at their ends.

    >>> cut("lp-ft with a very long name, b", 14)
    'lp-ft w…ame, b'
    """
    told = " ".join(text.split())
    if columns(told) <= most:
        return told
    first, last = most // 2, most - most // 2 - 1
    return _begin(told, first) + "…" + _begin(told[::-1], last)[::-1]


def _begin(text: str, most: int) -> str:
    ends = itertools.accumulate(columns(letter) for letter in text)
    return "".join(letter for letter, end in zip(text, ends, strict=True) if end <= most)


def short(names: Iterable[str], most: int) -> dict[str, str]:
    """Each name in at most ``most`` columns, no two alike: those that cutting makes alike are numbered.

    >>> short(["aaaa-1-bbbb", "aaaa-2-bbbb", "c"], 8)
    {'aaaa-1-bbbb': 'aaa…bb·1', 'aaaa-2-bbbb': 'aaa…bb·2', 'c': 'c'}
    """
    every = list(dict.fromkeys(names))
    told = {name: cut(name, most) for name in every}
    for alike in {text for text in told.values() if list(told.values()).count(text) > 1}:
        for at, name in enumerate([one for one in every if told[one] == alike], 1):
            told[name] = f"{cut(name, most - len(str(at)) - 1)}·{at}"
    return told


def width(text: str, size: float) -> float:
    """About how wide a text is, in the unit of ``size``."""
    return columns(text) * LETTER * size


def spread(places: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """Places moved as little as needed to be ``apart`` from each other, between ``low`` and ``high`` if there is room.

    >>> spread([1.0, 1.0, 5.0], 1.0, 0.0, 9.0)
    [0.5, 1.5, 5.0]
    """
    order = sorted(range(len(places)), key=lambda at: places[at])
    blocks: list[list[float]] = []  # [middle of the block, its members]
    for at in order:
        blocks.append([min(max(places[at], low), high), 1])
        while len(blocks) > 1 and _top(blocks[-2], apart) + apart > _bottom(blocks[-1], apart) + 1e-9:
            (m, n), (k, j) = blocks[-2], blocks[-1]
            blocks[-2:] = [[(m * n + k * j) / (n + j), n + j]]
            block = blocks[-1]
            block[0] += max(0.0, low - _bottom(block, apart)) - max(0.0, _top(block, apart) - high)
    flat = [_bottom(block, apart) + apart * step for block in blocks for step in range(int(block[1]))]
    found = [0.0] * len(places)
    for at, place in zip(order, flat, strict=True):
        found[at] = place
    return found


def _bottom(block: Sequence[float], apart: float) -> float:
    return block[0] - apart * (block[1] - 1) / 2


def _top(block: Sequence[float], apart: float) -> float:
    return block[0] + apart * (block[1] - 1) / 2


def beside(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    area: Box,
    *,
    clear: float,
    full: Sequence[Box] = (),
) -> list[Box]:
    """A box for the label of each point: the nearest place within ``area`` that covers no point and no other label.

    Args:
        points: in the unit of ``sizes`` (width, height) and of ``area``.
        clear: what stays free around each point.
        full: boxes that labels keep off, such as error bars.
    """
    taken = [*full, *((x - clear, y - clear, x + clear, y + clear) for x, y in points)]
    found: list[Box] = []
    for (x, y), (wide, high) in zip(points, sizes, strict=True):
        best: tuple[float, Box] | None = None
        for far, turn in itertools.product((0, 7, 15, 25, 37, 52, 70, 90, 112, 140), range(16)):
            side, up = math.cos(turn * math.pi / 8), math.sin(turn * math.pi / 8)
            left = x + side * (clear + 3 + far + wide / 2) - wide / 2
            low = y + up * (clear + 1 + far + high / 2) - high / 2
            box = (left, low, left + wide, low + high)
            bad = sum(_overlap(box, other) for other in taken) + 4 * _outside(box, area)
            if best is None or bad < best[0] - 1e-9:
                best = (bad, box)
            if bad <= 0:
                break
        if best is not None:
            found.append(best[1])
            taken.append(best[1])
    return found


def _overlap(one: Box, other: Box) -> float:
    across, along = min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1])
    return across * along if across > 0 and along > 0 else 0.0


def _outside(box: Box, area: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, area)
