"""Simulated comparisons: intervals cover at their stated rate, and noise earns no claim.

The model is d_si = true + seed_s + row_i + rest_si. Of 400 simulations a 95 % interval covers between 365 and 393, 99.9 % of the time
(binomial); each number below has that band unless it says otherwise.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from luthier.statistics.exact import holm, sign_flips
from luthier.statistics.paired import difference, interval
from luthier.statistics.resample import bootstrap
from luthier.statistics.simulate import simulated_power
from luthier.statistics.verdict import Pair, verdicts

CALLS = 400
LOW, HIGH = (int(edge) for edge in stats.binom.ppf([0.0005, 0.9995], CALLS, 0.95))
SEED, ROW, BOTH, NOISE = (1.0, 0.0, 0.5), (0.0, 1.0, 0.3), (0.1, 1.0, 1.0), (0.0, 0.0, 1.0)


def scores(draw: np.random.Generator, seeds: int, rows: int, spread: tuple[float, float, float], true: float):
    """Two recipes; what they have in common (how hard a row is, how lucky a seed) is large, and must cancel."""
    of_seed, of_row, of_rest = (one / math.sqrt(2) for one in spread)
    common = 5 * draw.standard_normal((seeds, 1)) + 5 * draw.standard_normal((1, rows))
    made = [
        common
        + shift
        + of_seed * draw.standard_normal((seeds, 1))
        + of_row * draw.standard_normal((1, rows))
        + of_rest * draw.standard_normal((seeds, rows))
        for shift in (true, 0.0)
    ]
    return made[0], made[1]


def right(draw: np.random.Generator, seeds: int, rows: int, spread: tuple[float, float, float], shift: float):
    """Right or wrong: a row is right where a normal sum is above 0. Also the true difference of the accuracies."""
    of_seed, common, of_row = spread
    hard, wide = common * draw.standard_normal((1, rows)), math.sqrt(1 + sum(one**2 for one in spread))
    made = [
        mean
        + of_seed * draw.standard_normal((seeds, 1))
        + hard
        + of_row * draw.standard_normal((1, rows))
        + draw.standard_normal((seeds, rows))
        > 0
        for mean in (1 + shift, 1.0)
    ]
    return made[0], made[1], float(stats.norm.cdf((1 + shift) / wide) - stats.norm.cdf(1 / wide))


def covered(spread: tuple[float, float, float], seeds: int, true: float, *, rows: int = 60) -> int:
    draw = np.random.default_rng(seeds)
    seen = [interval(difference(*scores(draw, seeds, rows, spread, true))) for _ in range(CALLS)]
    return sum(one.low <= true <= one.high for one in seen)


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("spread", [SEED, ROW, BOTH, NOISE], ids=["seed", "row", "both", "noise"])
@pytest.mark.parametrize("true", [0.0, 0.7])
def test_the_interval_covers_at_its_rate(spread, seeds, true):
    most = CALLS if spread == NOISE else HIGH  # .97 to .99 of noise, of whose two errors the larger is taken
    assert LOW <= covered(spread, seeds, true) <= most


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize(
    ("spread", "shift"), [((0.3, 1.0, 0.05), 0.0), ((0.05, 1.0, 0.8), 0.3), ((0.1, 1.5, 0.3), 0.2)]
)
def test_the_interval_covers_at_its_rate_for_accuracies(spread, shift, seeds):
    draw, hits = np.random.default_rng(seeds), 0
    for _ in range(CALLS):
        one, other, true = right(draw, seeds, 150, spread, shift)
        seen = interval(difference(one, other))
        hits += seen.low <= true <= seen.high
    assert LOW <= hits <= HIGH


@pytest.mark.parametrize("spread", [SEED, ROW, BOTH, NOISE], ids=["seed", "row", "both", "noise"])
def test_with_two_seeds_the_interval_covers_at_its_rate(spread):
    assert covered(spread, 2, 0.0) >= LOW


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("flips", [1, 3])
def test_among_recipes_that_part_on_a_few_rows_hardly_any_comparison_claims_anything(flips, seeds):
    """Of 300 rows each seed has about ``flips`` right that the other recipe has wrong, and as many the other way round.

    The same difference by all of 2 or 3 seeds is common then, by whose spread alone p is 0: 12 comparisons claim something in 79 and 22 of
    100 cases with one flip, in 62 and 12 with three.
    """
    draw, any_of = np.random.default_rng(seeds), 0
    for _ in range(100):
        drawn = draw.random((12, seeds, 300)) * 300
        pairs = [Pair("a", str(at), "", difference(one < flips, one > 300 - flips)) for at, one in enumerate(drawn)]
        any_of += any(found.claimed for found in verdicts(pairs, test="t"))
    assert any_of <= stats.binom.ppf(0.9995, 100, 0.05)


def test_where_seeds_matter_the_bootstrap_of_few_seeds_is_much_too_narrow():
    """Why claims do not rest on it: below .90 with 3 and with 5 seeds; 200 simulations, one-sided 99.9 %."""
    for seeds, below in ((3, 0.85), (5, 0.93)):
        draw, hits = np.random.default_rng(seeds), 0
        for call in range(200):
            low, high = bootstrap(*scores(draw, seeds, 40, SEED, 0.0), resamples=300, seed=call)
            hits += low <= 0.0 <= high
        assert hits / 200 < below


def test_where_only_noise_matters_the_bootstrap_is_too_wide():
    # noise is resampled twice, by seed and by row; more than .975 of 200
    draw, hits = np.random.default_rng(0), 0
    for call in range(200):
        low, high = bootstrap(*scores(draw, 5, 40, NOISE, 0.0), resamples=300, seed=call)
        hits += low <= 0.0 <= high
    assert hits > 195


def test_rows_that_favour_one_recipe_by_chance_earn_no_claim():
    """No true difference, but on these rows all seeds agree on one: sign flips reject nearly always, the interval does not."""
    draw, flips, both = np.random.default_rng(3), 0, 0
    for _ in range(CALLS):
        found = difference(*scores(draw, 8, 60, ROW, 0.0))
        seen, rejected = interval(found), sign_flips(found.by_seed).p < 0.05
        flips += rejected
        both += rejected and (seen.low > 0 or seen.high < 0)
    assert flips > 0.6 * CALLS
    assert both <= stats.binom.ppf(0.9995, CALLS, 0.05)


def test_over_four_recipes_that_are_alike_hardly_any_comparison_claims_anything():
    """Three comparisons with one baseline, 10 seeds: the chance of any claim is at most 5 %, with the 99.9 % band of 400."""
    draw, any_of = np.random.default_rng(4), 0
    for _ in range(CALLS):
        base, *others = (draw.standard_normal((10, 1)) + draw.standard_normal((10, 40)) for _ in range(4))
        found = [difference(one, base) for one in others]
        p = holm([sign_flips(one.by_seed).p for one in found])
        seen = [interval(one) for one in found]
        any_of += any(
            corrected < 0.05 and (one.low > 0 or one.high < 0) for corrected, one in zip(p, seen, strict=True)
        )
    assert any_of <= stats.binom.ppf(0.9995, CALLS, 0.05)


def test_a_true_difference_is_claimed_as_often_as_the_plan_says():
    """12 seeds, 200 comparisons: the share of claims is that of ``simulated_power``, within 3.3 errors."""
    draw, claims = np.random.default_rng(6), 0
    for _ in range(200):
        pair = Pair("a", "b", "", difference(*scores(draw, 12, 60, (1.0, 0.3, 0.5), 0.95)))
        claims += verdicts([pair])[0].claimed
    shared, sd = 0.3**2 / 60, math.sqrt(1 + 0.25 / 60)
    assert claims / 200 == pytest.approx(simulated_power(0.95, sd, 12, shared=shared), abs=3.3 * math.sqrt(0.25 / 200))
