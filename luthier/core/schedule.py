"""Schedules: pure functions from the fraction of the stage, in [0, 1], to a factor on the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    """A frozen, printable function. ``fraction`` is 0 before the first step and 1 after the last."""

    def __call__(self, fraction: float) -> float: ...


@dataclass(frozen=True)
class Constant:
    """The same factor throughout."""

    factor: float = 1.0

    def __call__(self, fraction: float) -> float:
        return self.factor


@dataclass(frozen=True)
class WarmUp:
    """Linear from 0 to 1 over the first ``share`` of the stage, then ``after`` stretched over the rest."""

    share: float
    after: Schedule

    def __call__(self, fraction: float) -> float:
        if fraction < self.share:
            return fraction / self.share
        rest = (fraction - self.share) / (1.0 - self.share) if self.share < 1.0 else 1.0
        return self.after(rest)


@dataclass(frozen=True)
class Linear:
    """From 1 to ``end`` in a straight line."""

    end: float = 0.0

    def __call__(self, fraction: float) -> float:
        return 1.0 + (self.end - 1.0) * fraction


@dataclass(frozen=True)
class Cosine:
    """From 1 to ``end`` along half a cosine wave."""

    end: float = 0.0

    def __call__(self, fraction: float) -> float:
        return self.end + (1.0 - self.end) * 0.5 * (1.0 + math.cos(math.pi * fraction))


@dataclass(frozen=True)
class Switch:
    """``before`` until the fraction ``at``, then ``after``: the way one ingredient takes the end of a stage over."""

    at: float
    before: Schedule
    after: Schedule

    def __call__(self, fraction: float) -> float:
        return self.before(fraction) if fraction < self.at else self.after(fraction)


@dataclass(frozen=True)
class Product:
    """The product of two schedules."""

    first: Schedule
    second: Schedule

    def __call__(self, fraction: float) -> float:
        return self.first(fraction) * self.second(fraction)
