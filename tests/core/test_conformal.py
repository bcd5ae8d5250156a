"""Prediction sets: by hand, and what they promise, over many draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.conformal import conformal_scores, conformal_threshold, coverage_range
from luthier.core.scores import softmax
from tests.logits import drawn

# Prediction sets


def test_by_hand_lac_and_aps():
    likely = np.array([[0.5, 0.3, 0.2], [0.1, 0.7, 0.2]])
    assert conformal_scores(likely, "lac") == pytest.approx(np.array([[0.5, 0.7, 0.8], [0.9, 0.3, 0.8]]))
    # aps: from the likeliest down: .5, .8, 1 and .7, .9, 1.
    assert conformal_scores(likely, "aps") == pytest.approx(np.array([[0.5, 0.8, 1.0], [1.0, 0.7, 0.9]]))
    # Half of the class' own share: .25, .5 + .15, .8 + .1; u = 0 leaves it out: 0, .7, .9.
    half = conformal_scores(likely, "aps", chance=np.array([0.5, 0.0]))
    assert half == pytest.approx(np.array([[0.25, 0.65, 0.9], [0.9, 0.0, 0.7]]))


def test_by_hand_among_equals_the_lower_class_comes_first():
    assert conformal_scores(np.full((1, 4), 0.25), "aps") == pytest.approx(np.array([[0.25, 0.5, 0.75, 1.0]]))


def test_by_hand_the_threshold_counts_one_row_more_than_there_are():
    # Nine scores, alpha 1/10: ceil(10 * .9) = the 9th; alpha 2/10: the 8th; eight scores: ceil(9 * .9) = 9 > 8, no bound.
    scores = np.array([0.9, 0.1, 0.8, 0.2, 0.7, 0.3, 0.6, 0.4, 0.5])
    assert conformal_threshold(scores, 0.1) == 0.9
    assert conformal_threshold(scores, 0.2) == 0.8
    assert conformal_threshold(scores[1:], 0.1) == math.inf
    assert conformal_threshold(scores, 1.0) == -math.inf


@pytest.mark.parametrize(
    ("n", "alpha", "rank"), [(99, 0.07, 93), (99, 0.29, 71), (9, 0.7, 3), (19, 0.05, 19), (999, 0.001, 999)]
)
def test_ranks_are_those_of_the_decimal_number(n, alpha, rank):
    # In floating point 10 * (1 - .7) = 3.0000000000000004, whose ceiling is 4, and 100 * .29 = 28.999999999999996.
    assert conformal_threshold(np.arange(1.0, n + 1), alpha) == rank


def test_the_threshold_is_numpys_higher_quantile_at_the_corrected_level():
    scores = np.random.default_rng(16).random(57)
    level = math.ceil(58 * 0.9) / 57
    assert conformal_threshold(scores, 0.1) == np.quantile(scores, level, method="inverted_cdf")


def test_sets_can_be_empty_and_full():
    likely = np.array([[0.5, 0.5], [0.95, 0.05]])
    lac = conformal_scores(likely, "lac")
    assert (lac <= 0.1).sum(axis=1).tolist() == [0, 1]  # no class of the first row is as likely as .9
    assert (lac <= math.inf).sum(axis=1).tolist() == [2, 2]
    assert (lac <= -math.inf).sum() == 0
    assert (conformal_scores(likely, "aps") <= 1.0).all()  # the last class completes the sum exactly


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6))
def test_aps_takes_classes_in_the_order_of_their_chances(seed, classes):
    likely = softmax(drawn(seed, 20, classes)[0])
    scores = conformal_scores(likely, "aps")
    for chances, row in zip(likely, scores, strict=True):
        order = np.argsort(-chances)
        assert (np.diff(row[order]) > 0).all()
        assert row[order] == pytest.approx(np.cumsum(chances[order]), rel=1e-12)
    assert scores.max(axis=1).tolist() == [1.0] * 20
    random = conformal_scores(likely, "aps", chance=np.random.default_rng(seed).random(20))
    assert (random <= scores).all()
    assert conformal_scores(likely, "aps", chance=np.ones(20)) == pytest.approx(scores, rel=1e-12)


@pytest.mark.parametrize("how", ["lac", "aps", "aps, random"])
@pytest.mark.parametrize("n", [19, 50])
def test_coverage_is_what_was_promised_over_many_draws(how, n):
    """Of models that are far too sure: the promise does not depend on them."""
    alpha, draws, new = 0.1, 600, 100
    logits, labels = drawn(17, draws * (n + new), 4, heat=3.0)
    chance = np.random.default_rng(18).random(len(labels)) if "random" in how else None
    scores = conformal_scores(softmax(logits), "lac" if how == "lac" else "aps", chance=chance)
    scores = scores[np.arange(len(labels)), labels].reshape(draws, n + new)
    held = [(row[n:] <= conformal_threshold(row[:n], alpha)).mean() for row in scores]
    least, most = 1 - alpha, 1 - alpha + 1 / (n + 1)
    # The coverage of a draw is Beta: its deviation is below .07 for 19 rows; over 600 draws four standard errors are .012.
    error = 4 * np.std(held) / math.sqrt(draws)
    assert error < 0.013
    assert least - error <= np.mean(held) <= most + error


def test_without_the_correction_the_promise_would_be_broken():
    # Ten rows: the plain 90 % quantile is the 9th smallest, above which a new one of eleven lies 2 times in 11: .818, not .9.
    draw = np.random.default_rng(19).random((4000, 11))
    ours = np.mean([row[10] <= conformal_threshold(row[:10], 0.1) for row in draw])
    plain = np.mean(draw[:, 10] <= np.sort(draw[:, :10], axis=1)[:, 8])
    assert ours == pytest.approx(10 / 11, abs=0.019)  # four standard errors
    assert plain == pytest.approx(9 / 11, abs=0.025)


def test_the_range_holds_its_share_of_the_thresholds():
    # Of even scores on [0, 1] the coverage on endless new rows is the threshold itself.
    draw = np.random.default_rng(20).random((4000, 30))
    low, high = coverage_range(30, 0.1, 0.9)
    inside = np.mean([low <= conformal_threshold(row, 0.1) <= high for row in draw])
    assert inside == pytest.approx(0.9, abs=0.019)  # four standard errors


def test_by_hand_the_range_of_one_rows_coverage_is_that_of_its_rank():
    # One row, alpha 1/2: l = 1, Beta(1, 1), even on [0, 1]. Nine rows, alpha 1/10: Beta(9, 1), whose p-quantile is p^(1/9).
    assert coverage_range(1, 0.5, 0.9) == pytest.approx((0.05, 0.95))
    assert coverage_range(9, 0.1, 0.9) == pytest.approx((0.05 ** (1 / 9), 0.95 ** (1 / 9)))
    assert coverage_range(8, 0.1) == (1.0, 1.0)
