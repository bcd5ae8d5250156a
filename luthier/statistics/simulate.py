"""The power of the whole rule for a claim (``verdict``), by simulation: what sign flips with few seeds, and test rows, take from it.

With 6 seeds sign flips see only differences a quarter larger than the t test does; from 8 on the two hardly differ.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from luthier.core.scores import Array
from luthier.core.seeds import derive
from luthier.statistics.arrays import share
from luthier.statistics.exact import fewest_seeds, smallest_p
from luthier.statistics.power import check, least, seeds_needed

COARSE = 10  # up to so many seeds, sums of sign flips are so few that the t test's power is not theirs


def simulated_power(
    effect: float,
    sd: float,
    seeds: int,
    *,
    alpha: float = 0.05,
    shared: float = 0.0,
    comparisons: int = 1,
    draws: int = 2000,
    seed: int = 0,
) -> float:
    """The chance of a claim by the rule of ``verdict``: sign flips' p times ``comparisons`` below alpha, and 0 outside the interval.

    The share of ``draws`` simulated comparisons, d_s = effect + sqrt(shared) z + sd z_s with normal z, in which ``shared`` is known; its
    own error is at most 0.5 / sqrt(draws), 0.011.

    Args:
        comparisons: Holm's largest factor, so that the claim holds whatever the other recipes do.
        seed: of the simulation; the same normal numbers for every effect.
    Differs: above ``COARSE`` seeds 4095 flips are drawn, the same for all simulated comparisons, instead of the exact test.
    """
    check(sd, seeds, alpha, shared)
    draw = np.random.default_rng(derive(seed, "statistics", "power"))
    common, own = draw.standard_normal((draws, 1)), draw.standard_normal((draws, seeds))
    differences = effect + math.sqrt(shared) * common + sd * own
    p = flipped(differences, derive(seed, "statistics", "power", "signs"))
    of_seeds = differences.var(axis=1, ddof=1) / seeds
    loss = of_seeds**2 / (seeds - 1)
    free = np.divide((of_seeds + shared) ** 2, loss, out=np.full(draws, np.inf), where=loss > 0)
    half = stats.t.ppf(1 - alpha / 2, free) * np.sqrt(of_seeds + shared)
    return float(np.mean((p * comparisons < alpha) & (np.abs(differences.mean(axis=1)) > half)))


def smallest_detectable_simulated(
    sd: float,
    seeds: int,
    *,
    alpha: float = 0.05,
    power_wanted: float = 0.8,
    shared: float = 0.0,
    comparisons: int = 1,
    draws: int = 2000,
    seed: int = 0,
) -> float:
    """The true difference that is claimed with chance ``power_wanted`` by ``simulated_power``; infinite with too few seeds to claim any."""
    check(sd, seeds, alpha, shared)
    share(power_wanted, "power_wanted")
    if smallest_p(seeds) * comparisons >= alpha:
        return math.inf
    error = math.sqrt(sd**2 / seeds + shared)

    def seen(effect: float) -> float:
        return simulated_power(
            effect, sd, seeds, alpha=alpha, shared=shared, comparisons=comparisons, draws=draws, seed=seed
        )

    return error and least(seen, power_wanted, error, precision=1e-3)


def seeds_to_claim(
    effect: float,
    sd: float,
    *,
    alpha: float = 0.05,
    power_wanted: float = 0.8,
    shared: float = 0.0,
    comparisons: int = 1,
    flips: bool = True,
) -> int | None:
    """The seeds with which ``effect`` is claimed by the rule of ``verdict`` with chance ``power_wanted``, about.

    ``seeds_needed`` at alpha / comparisons; by sign flips no fewer than they need to fall below it, and up to ``COARSE``
    seeds as many more as ``simulated_power`` asks for (within 0.02, its own error twice).

    Args:
        flips: whether the rule's p is that of sign flips, or of the t distribution.
    """
    found = seeds_needed(effect, sd, alpha=alpha / comparisons, power_wanted=power_wanted, shared=shared)
    if found is None or not flips:
        return found
    seeds = max(found, fewest_seeds(alpha / comparisons))
    while seeds <= COARSE:
        seen = simulated_power(effect, sd, seeds, alpha=alpha, shared=shared, comparisons=comparisons)
        if seen >= power_wanted - 0.02:
            break
        seeds += 1
    return seeds


def flipped(differences: Array, seed: int) -> Array:
    """p of sign flips for each row of ``differences``, shape (draws, seeds)."""
    seeds = differences.shape[1]
    if seeds <= COARSE:
        bits = np.arange(2 ** (seeds - 1))[:, None] >> np.arange(seeds) & 1  # the last sign stays: mirror images
        signs, seen = 1.0 - 2.0 * bits, 0
    else:
        signs, seen = np.random.default_rng(seed).choice([-1.0, 1.0], (4095, seeds)), 1
    edge = np.abs(differences.sum(axis=1, keepdims=True)) * (1 - 1e-9)
    hits = np.concatenate([np.sum(np.abs(part @ signs.T) >= edge[at], axis=1) for at, part in _parts(differences)])
    return np.asarray((seen + hits) / (seen + len(signs)))


def _parts(differences: Array) -> list[tuple[slice, Array]]:
    cuts = [slice(start, start + 500) for start in range(0, len(differences), 500)]
    return [(cut, differences[cut]) for cut in cuts]
