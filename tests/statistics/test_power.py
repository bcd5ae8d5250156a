"""Power by the t distribution and by simulation: known numbers, each against the other, and designs that can see nothing."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from luthier.errors import DataError
from luthier.statistics.exact import sign_flips
from luthier.statistics.paired import Difference, interval
from luthier.statistics.power import power, seeds_needed, smallest_detectable
from luthier.statistics.simulate import COARSE, flipped, seeds_to_claim, simulated_power, smallest_detectable_simulated

# By hand, and numbers that are in every table


@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_seeds_for_a_paired_t_test_of_an_effect_in_standard_deviations(effect, seeds):
    # Cohen's small, medium and large effects: the tables of G*Power
    assert seeds_needed(effect, 1.0) == seeds_needed(-3 * effect, 3.0) == seeds


def test_known_rows_make_it_a_z_test():
    # no spread over seeds: error 0.5 whatever the seeds; 1.95996 + 0.84162 = 2.80159, halved; the other tail is 1e-6
    assert smallest_detectable(0.0, 5, shared=0.25) == pytest.approx(1.40079, abs=1e-4)


def test_an_effect_of_nothing_is_seen_with_chance_alpha():
    assert power(0.0, 1.0, 7, alpha=0.03) == pytest.approx(0.03)


def test_without_any_error_every_effect_is_seen():
    assert (power(0.1, 0.0, 3), power(0.0, 0.0, 3), smallest_detectable(0.0, 3)) == (1.0, 0.0, 0.0)


# Invariants


@settings(max_examples=50, deadline=None)
@given(st.floats(0.01, 10), st.integers(2, 60), st.floats(0, 1), st.sampled_from([0.05, 0.01, 0.05 / 3]))
def test_the_smallest_detectable_effect_is_seen_with_the_power_wanted(sd, seeds, shared, alpha):
    effect = smallest_detectable(sd, seeds, alpha=alpha, shared=shared)
    assert power(effect, sd, seeds, alpha=alpha, shared=shared) == pytest.approx(0.8, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.1, 4), st.floats(0.1, 0.9))
def test_the_seeds_needed_are_enough_and_one_less_is_not(effect, wanted):
    seeds = seeds_needed(effect, 1.0, power_wanted=wanted)
    assert seeds is not None and power(effect, 1.0, seeds) >= wanted
    assert seeds == 2 or power(effect, 1.0, seeds - 1) < wanted


@settings(max_examples=80, deadline=None)
@given(st.floats(0, 50), st.integers(2, 10_000), st.floats(0, 3))
def test_power_is_a_chance_for_every_design(effect, seeds, shared):
    assert 0.0499 <= power(effect, 1.0, seeds, shared=shared) <= 1 + 1e-12


def test_few_rows_cannot_be_mended_by_seeds():
    # sqrt(shared) = 0.1; 0.2 is only two of it, and a test wants 2.8
    assert seeds_needed(0.2, 0.1, shared=0.01) is None
    assert seeds_needed(0.3, 0.1, shared=0.01) is not None
    assert seeds_needed(0.0, 1.0) is None


# Parity


@pytest.mark.parametrize(("effect", "seeds"), [(1.0, 3), (1.0, 8), (0.5, 20)])
def test_power_is_the_share_of_scipys_t_tests_that_reject(effect, seeds):
    drawn = effect + np.random.default_rng(0).standard_normal((20_000, seeds))
    rejected = int(np.sum(stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < 0.05))
    low, high = stats.binom.ppf([0.0005, 0.9995], 20_000, power(effect, 1.0, seeds))
    assert low <= rejected <= high


def test_the_flips_of_a_simulation_are_those_of_the_test():
    drawn = np.random.default_rng(1).standard_normal((30, COARSE))
    assert flipped(drawn, 0) == pytest.approx([sign_flips(one).p for one in drawn], abs=1e-12)
    wide = 0.3 + np.random.default_rng(2).standard_normal((30, 14))
    # 4095 flips: 4 errors are at most 4 x 0.5 / 64
    assert flipped(wide, 0) == pytest.approx([sign_flips(one).p for one in wide], abs=0.032)


def test_simulated_power_is_that_of_the_interval_and_the_flips_one_by_one():
    draw, hits, shared = np.random.default_rng(5), 0, 0.05
    for _ in range(1000):
        drawn = 1.2 + math.sqrt(shared) * draw.standard_normal() + draw.standard_normal(8)
        seen = interval(Difference(tuple(drawn), rows=10**9, shared=shared))
        hits += 2 * sign_flips(drawn).p < 0.05 and (seen.low > 0 or seen.high < 0)
    ours = simulated_power(1.2, 1.0, 8, shared=shared, comparisons=2)
    # two samples, of 1000 and 2000: 3.3 errors of their difference
    assert hits / 1000 == pytest.approx(ours, abs=3.3 * math.sqrt(0.25 / 1000 + 0.25 / 2000))


@pytest.mark.parametrize("seeds", [8, 10, 15])
def test_from_eight_seeds_on_flips_see_what_the_t_test_sees(seeds):
    assert smallest_detectable_simulated(1.0, seeds, draws=1000) == pytest.approx(
        smallest_detectable(1.0, seeds), rel=0.1
    )


# It matters


def test_six_seeds_see_less_by_flips_than_by_the_t_test():
    assert smallest_detectable_simulated(1.0, 6) > 1.15 * smallest_detectable(1.0, 6)


def test_five_seeds_see_nothing_by_flips():
    assert smallest_detectable_simulated(1.0, 5) == math.inf
    assert simulated_power(1e9, 1.0, 5) == 0.0
    assert smallest_detectable_simulated(1.0, 6, comparisons=2) == math.inf


def test_a_huge_difference_still_needs_the_seeds_that_flips_need():
    assert seeds_needed(50.0, 1.0) == 2
    assert seeds_to_claim(50.0, 1.0) == 6 and seeds_to_claim(50.0, 1.0, comparisons=3) == 7
    assert seeds_to_claim(50.0, 1.0, flips=False) == 2
    assert seeds_to_claim(0.01, 1.0, shared=1.0) is None


@pytest.mark.parametrize("effect", [2.0, 1.5, 1.2, 1.0])
def test_the_seeds_to_claim_claim(effect):
    seeds = seeds_to_claim(effect, 1.0)
    assert seeds is not None
    # 4000 new draws: 3.3 errors are 0.021, and 0.02 the function's own allowance
    assert simulated_power(effect, 1.0, seeds, draws=4000, seed=1) > 0.8 - 0.041


def test_a_seed_fixes_the_simulation():
    one, again, other = (simulated_power(1.0, 1.0, 7, draws=300, seed=seed) for seed in (1, 1, 2))
    assert one == again != other


# Refused


def test_designs_that_are_none_are_refused():
    with pytest.raises(DataError, match="seeds  must be 2 or more; got 1"):
        power(1.0, 1.0, 1)
    with pytest.raises(DataError, match="finite and not negative"):
        smallest_detectable(-1.0, 3)
    with pytest.raises(DataError, match="alpha"):
        seeds_needed(1.0, 1.0, alpha=5)
    with pytest.raises(DataError, match="power_wanted"):
        smallest_detectable(1.0, 3, power_wanted=1.0)


def test_power_is_a_number_where_scipys_noncentral_t_is_none():
    # freedom 344: between effects of .115 and .135 its tail is nan, and the search for the smallest effect ended there
    sees = [power(effect / 1000, 0.0166, 5, alpha=0.05 / 39, shared=4.563e-4) for effect in range(10, 200)]
    assert all(one < other for one, other in pairwise(sees)) and 0 < sees[0] < sees[-1] < 1
    least = [smallest_detectable(sd, 5, alpha=0.05 / 39, shared=4.563e-4) for sd in (0.01, 0.0166, 0.02)]
    assert least == sorted(least) and power(least[1], 0.0166, 5, alpha=0.05 / 39, shared=4.563e-4) == pytest.approx(0.8)
