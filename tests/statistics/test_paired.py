"""Paired differences and their interval: by hand, against analysis of variance, scipy and a published example."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import f1_score

from luthier.errors import DataError
from luthier.statistics.paired import Difference, difference, difference_by, freedom, interval, row_variances


def drawn(seed: int, seeds: int, rows: int, of_seed: float = 1.0, of_row: float = 1.0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return (
        of_seed * draw.standard_normal((seeds, 1))
        + of_row * draw.standard_normal((1, rows))
        + draw.standard_normal((seeds, rows))
    )


# By hand


def test_rows_that_all_seeds_agree_on_are_the_shared_variance():
    # differences (1, 0) for both seeds: covariance 1/2 of two rows (n - 1 = 1), by 2 rows: 1/4
    found = difference(np.array([[True, True], [True, False]]), np.array([[False, True], [False, False]]))
    assert found == Difference(by_seed=(0.5, 0.5), rows=2, shared=0.25)
    assert (found.mean, found.sd, found.seeds) == (0.5, 0.0, 2)


def test_rows_on_which_seeds_disagree_share_nothing():
    assert row_variances(np.array([[1.0, -1.0], [-1.0, 1.0]])) == (0.0, 1.0)


def test_seeds_that_agree_by_chance_have_the_error_of_the_rows_noise():
    # Each of two seeds has one of four rows right that the other recipe has wrong: 1/4 for both, sd 0. Variances over rows 1/4 each,
    # covariance below zero: noise 1/4 / 4. Error sqrt(1/16 / 2) = .17678, (2 - 1)(4 - 1) = 3 degrees of freedom, t(.975, 3) = 3.1824.
    found = difference(np.array([[1, 0, 0, 0], [0, 1, 0, 0]]), np.zeros((2, 4)))
    assert (found.by_seed, found.sd, found.shared, found.noise) == ((0.25, 0.25), 0.0, 0.0, 0.0625)
    seen = interval(found)
    assert (seen.freedom, seen.error) == (3, pytest.approx(0.17678, abs=1e-5))
    assert seen.high == pytest.approx(0.25 + 3.1824 * 0.17678, abs=1e-4)
    assert seen.p == pytest.approx(2 * stats.t.sf(2**0.5, 3))
    assert found.spread == 0.25


def test_the_interval_of_differences_that_vary_by_seed_only():
    # 1, 3, 5: mean 3, sd 2, error 2 / sqrt 3 = 1.1547; t(.975, 2) = 4.3027; 4.3027 x 1.1547 = 4.9683
    seen = interval(Difference((1.0, 3.0, 5.0), rows=100, shared=0.0))
    assert seen.freedom == 2
    assert (seen.low, seen.high) == (pytest.approx(-1.9683, abs=1e-4), pytest.approx(7.9683, abs=1e-4))


def test_the_interval_of_differences_that_vary_by_row_only():
    # error sqrt(1/4); 2 rows leave 1 degree of freedom: t(.975, 1) = 12.7062
    seen = interval(Difference((0.5, 0.5), rows=2, shared=0.25))
    assert seen.freedom == 1
    assert seen.high == pytest.approx(0.5 + 12.7062 / 2, abs=1e-4)


def test_without_any_spread_the_interval_is_a_point():
    same, apart = (interval(Difference((value,) * 3, rows=5, shared=0.0)) for value in (0.0, 0.25))
    assert (same.low, same.high, same.p) == (0.0, 0.0, 1.0)
    assert (apart.low, apart.high, apart.p) == (0.25, 0.25, 0.0)


# Identity


def test_a_recipe_is_as_good_as_itself():
    scores = drawn(0, 4, 9)
    found = difference(scores, scores)
    assert found.mean == 0.0 and found.shared == 0.0 and interval(found).p == 1.0


def test_exchanged_recipes_have_the_mirrored_interval():
    one, other = drawn(1, 4, 9), drawn(2, 4, 9)
    here, there = interval(difference(one, other)), interval(difference(other, one))
    assert (here.low, here.high) == pytest.approx((-there.high, -there.low))
    assert here.p == pytest.approx(there.p)


# Invariants


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(2, 30), st.floats(0, 3), st.floats(0, 3))
def test_the_shared_variance_is_that_of_the_analysis_of_variance(seed, seeds, rows, of_seed, of_row):
    scores = drawn(seed, seeds, rows, of_seed, of_row)
    by_seed, by_row, mean = scores.mean(axis=1), scores.mean(axis=0), scores.mean()
    rest = scores - by_seed[:, None] - by_row + mean
    ms_rows = seeds * np.square(by_row - mean).sum() / (rows - 1)
    ms_rest = np.square(rest).sum() / ((seeds - 1) * (rows - 1))
    expected = max(0.0, (ms_rows - ms_rest) / (seeds * rows))
    shared, noise = row_variances(scores)
    assert shared == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert shared + noise == pytest.approx(scores.var(axis=1, ddof=1).mean() / rows, rel=1e-9)
    if shared:
        assert noise == pytest.approx(ms_rest / rows, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(-5, 5), st.floats(0.1, 10))
def test_the_interval_moves_and_grows_with_the_scores(seed, shift, factor):
    one, other = drawn(seed, 3, 8), drawn(seed + 1, 3, 8)
    here, there = interval(difference(one, other)), interval(difference(factor * one + shift, factor * other))
    assert there.low == pytest.approx(factor * here.low + shift, rel=1e-7, abs=1e-7)
    assert there.high == pytest.approx(factor * here.high + shift, rel=1e-7, abs=1e-7)


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-6, 10), st.floats(0, 10), st.integers(2, 20), st.integers(2, 1000))
def test_the_degrees_of_freedom_lie_between_the_fewest_and_all(of_seeds, shared, seeds, rows):
    least = min(seeds - 1, rows - 1)
    assert least * (1 - 1e-12) <= freedom(of_seeds, shared, seeds, rows) <= (seeds + rows - 2) * (1 + 1e-12)


def test_p_is_below_alpha_exactly_where_the_interval_excludes_nothing_but_zero():
    for seed in range(200):
        seen = interval(difference(drawn(seed, 3, 6) + 1.0, np.zeros((3, 6))), level=0.9)
        assert (seen.p < 0.1) == (seen.low > 0 or seen.high < 0)


# Parity


def test_without_rows_it_is_the_paired_t_test_of_scipy():
    one, other = drawn(3, 6, 1)[:, 0], drawn(4, 6, 1)[:, 0]
    theirs = stats.ttest_rel(one, other)
    seen = interval(Difference(tuple(one - other), rows=50, shared=0.0))
    assert seen.p == pytest.approx(theirs.pvalue, rel=1e-12)
    assert (seen.low, seen.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)), rel=1e-12)


def test_it_is_the_analysis_of_the_van_dyke_data():
    """5 readers, 114 cases, 2 modalities: mean squares and results as the RJafroc book prints them (DBM analysis, chapter 9).

    Their mean squares of the modality's interactions are those of the difference by 2; our own term for the rows is switched off.
    """
    readers, cases, ms_readers, ms_cases, ms_rest = 5, 114, 0.06281749, 0.09984808, 0.0399716
    spread = math.sqrt(2 * ms_readers / cases)
    by_reader = np.array([-2.0, -1.0, 0.0, 1.0, 2.0]) / math.sqrt(2.5) * spread - 0.043800322
    shared = 2 * (ms_cases - ms_rest) / (readers * cases)
    seen = interval(Difference(tuple(by_reader), rows=10**12, shared=shared))
    assert seen.freedom == pytest.approx(15.259675, rel=1e-6)
    assert seen.p == pytest.approx(0.051665686, rel=1e-5)
    assert (seen.low, seen.high) == pytest.approx((-0.087959499, 0.00035885444), rel=1e-4)


def test_a_metric_by_function_agrees_with_the_mean_over_rows():
    """The bootstrap's covariance of 4000 resamples is within 10 % (its error is about sqrt(2 / 4000) = 2 %) of N - 1 by N of ours."""
    one, other = drawn(5, 3, 80), drawn(6, 3, 80)
    exact = difference(one, other)
    by = difference_by(lambda at: one[:, at].mean(axis=1), lambda at: other[:, at].mean(axis=1), 80, resamples=4000)
    assert by.by_seed == pytest.approx(exact.by_seed, rel=1e-12)
    assert by.rows == 80
    assert by.shared == pytest.approx(exact.shared * 79 / 80, rel=0.1)


# It matters


def test_macro_f1_is_compared_by_a_function_of_the_rows():
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, 60)
    good, bad = (np.where(draw.random((4, 60)) < right, labels, draw.integers(0, 3, (4, 60))) for right in (0.9, 0.3))

    def scorer(said):
        return lambda at: [f1_score(labels[at], one[at], average="macro") for one in said]

    found = difference_by(scorer(good), scorer(bad), 60, resamples=100)
    seen = interval(found)
    assert found.by_seed[0] == f1_score(labels, good[0], average="macro") - f1_score(labels, bad[0], average="macro")
    assert found == difference_by(scorer(good), scorer(bad), 60, resamples=100)
    assert found.shared > 0 and seen.low > 0.2


def test_more_seeds_do_not_make_the_rows_part_smaller():
    # one row effect that every seed has: 3 or 300 seeds, the error stays
    rows = np.random.default_rng(1).standard_normal((1, 50))
    errors = [interval(difference(np.repeat(rows, seeds, axis=0), np.zeros((seeds, 50)))).error for seeds in (3, 300)]
    assert errors[0] == pytest.approx(errors[1]) == pytest.approx(rows.std(ddof=1) / math.sqrt(50))


# Refused


def test_what_cannot_be_paired_is_refused():
    with pytest.raises(DataError, match=r"must be paired with one, shape \(2, 3\); got shape \(2, 4\)"):
        difference(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(DataError, match="Run more seeds; mcnemar compares two single runs"):
        difference(np.zeros((1, 3)), np.zeros((1, 3)))
    with pytest.raises(DataError, match="rows  must be 2 or more"):
        difference(np.zeros((2, 1)), np.zeros((2, 1)))
    with pytest.raises(DataError, match=r"one\[1, 2\]  must be a finite number"):
        difference([[0, 1, 2], [0, 1, math.nan]], np.zeros((2, 3)))
    with pytest.raises(DataError, match=r"shape \(seeds, rows\)"):
        difference(np.zeros(3), np.zeros(3))
    with pytest.raises(DataError, match="level"):
        interval(Difference((0.0, 1.0), 10, 0.0), level=95)
    with pytest.raises(DataError, match="other"):
        difference_by(lambda at: [0.0, 1.0], lambda at: [0.0], 5)
