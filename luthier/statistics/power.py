"""What a comparison over so many seeds can see: the smallest difference, and the seeds a difference needs.

All of it holds for differences that are normal from seed to seed with the spread that is given. A spread seen over 5 seeds is itself
rough: the true one may be 0.6 to 2.9 times as large (95 %), so these numbers are for planning and are said with an "about".

Source: Hillis, Obuchowski, Berbaum, Academic Radiology 18, 2011 (power with readers and cases); with ``shared`` = 0 it is the power of
the paired t test.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from scipy import special, stats

from luthier.core.scores import Array
from luthier.statistics.arrays import refuse, share
from luthier.statistics.paired import freedom

MOST_SEEDS = 10_000  # beyond, a difference is called out of reach


def power(effect: float, sd: float, seeds: int, *, alpha: float = 0.05, shared: float = 0.0) -> float:
    """P(|T| > t_(1 - alpha/2, nu)), T noncentral t with nu degrees of freedom around effect / sqrt(sd^2 / S + shared).

    It is the mean over s of P(|Z + centre| > edge s), s^2 a chi-square over its nu: scipy's noncentral t is not a number for some values.

    Args:
        effect: the true difference of the recipes.
        sd: of the difference from seed to seed.
        seeds: S, 2 or more.
        shared: see ``paired.Difference``; 0 asks about these very test rows only.
    """
    check(sd, seeds, alpha, shared)
    of_seeds = sd**2 / seeds
    error = math.sqrt(of_seeds + shared)
    if not error:
        return float(effect != 0)
    free, centre = freedom(of_seeds, shared, seeds), abs(effect) / error
    scales, weights = _scales(free)
    edges = float(stats.t.ppf(1 - alpha / 2, free)) * scales
    return float(weights @ (special.ndtr(centre - edges) + special.ndtr(-centre - edges)))


@functools.lru_cache(maxsize=64)
def _scales(free: float) -> tuple[Array, Array]:
    """Values of sqrt(chi-square / nu) and their weights, for means over it."""
    if math.isinf(free):
        return np.ones(1), np.ones(1)
    below, weights = _shares()
    return np.sqrt(stats.chi2.ppf(below, free) / free), weights


@functools.cache
def _shares() -> tuple[Array, Array]:
    """Gauss-Legendre over an angle whose sine's square is the share below, as quantiles bend at both ends."""
    at, weights = np.polynomial.legendre.leggauss(200)
    angle = np.pi / 4 * (at + 1)
    return np.sin(angle) ** 2, np.pi / 4 * weights * np.sin(2 * angle)


def smallest_detectable(
    sd: float, seeds: int, *, alpha: float = 0.05, power_wanted: float = 0.8, shared: float = 0.0
) -> float:
    """The minimal detectable effect: the true difference that ``power`` sees with chance ``power_wanted``; in the metric's unit."""
    check(sd, seeds, alpha, shared)
    share(power_wanted, "power_wanted")
    error = math.sqrt(sd**2 / seeds + shared)
    return error and least(lambda effect: power(effect, sd, seeds, alpha=alpha, shared=shared), power_wanted, error)


def seeds_needed(
    effect: float, sd: float, *, alpha: float = 0.05, power_wanted: float = 0.8, shared: float = 0.0
) -> int | None:
    """The fewest seeds with which ``power`` sees ``effect`` with chance ``power_wanted``; None where ``MOST_SEEDS`` would not do.

    None comes also where the test rows are too few: however many seeds, their common error sqrt(shared) stays.
    """
    check(sd, 2, alpha, shared)
    share(power_wanted, "power_wanted")

    def enough(seeds: int) -> bool:
        return power(effect, sd, seeds, alpha=alpha, shared=shared) >= power_wanted

    if not enough(MOST_SEEDS):
        return None
    low, high = 1, 2
    while not enough(high):
        low, high = high, min(2 * high, MOST_SEEDS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def least(seen: Callable[[float], float], wanted: float, step: float, *, precision: float = 1e-9) -> float:
    """Where ``seen``, which grows with the effect, first reaches ``wanted``: by doubling ``step`` and halving, to ``precision`` of it."""
    low, high = 0.0, step
    while seen(high) < wanted:
        low, high = high, 2 * high
    while high - low > precision * high:
        middle = (low + high) / 2
        low, high = (low, middle) if seen(middle) >= wanted else (middle, high)
    return high


def check(sd: float, seeds: int, alpha: float, shared: float) -> None:
    """Refuses a design that is none.

    Raises:
        DataError: alpha outside (0, 1), fewer than 2 seeds, a spread that is negative or not finite.
    """
    share(alpha, "alpha")
    if seeds < 2:
        raise refuse("seeds", "must be 2 or more", seeds)
    if not (0 <= sd < math.inf and 0 <= shared < math.inf):
        raise refuse("sd, shared", "must be finite and not negative", (sd, shared))
