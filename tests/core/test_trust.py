"""Calibration errors with intervals, and abstention: by hand, by law, against others' code."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.scores import brier, ece, nll, softmax
from luthier.core.trust import accuracy_at, aurc, bootstrap, ece_equal_mass, risk_coverage
from tests.logits import drawn, two_way

SURE = np.array([0.9, 0.8, 0.7, 0.6])


# ECE with bins of equal mass


def test_by_hand_two_halves_of_four_rows():
    # sure .9 .8 .7 .6, right yes yes no no. Halves: |1 - .85| and |0 - .65|; (.15 + .65) / 2 = .40.
    # Two bins of equal width: all four in (.5, 1]; |.5 - .75| = .25.
    logits, labels = two_way([0.9, 0.8, 0.7, 0.6]), np.array([0, 0, 1, 1])
    assert ece_equal_mass(logits, labels, bins=2) == pytest.approx(0.40, abs=1e-12)
    assert ece(logits, labels, bins=2) == pytest.approx(0.25, abs=1e-12)


def test_by_hand_pieces_that_are_not_even_and_more_bins_than_rows():
    # Surest last: .6 .7 | .8 with gaps -.6, -.7 (wrong) and +.2 (right): (1.3 + .2) / 3 = .5; so too with a bin a row.
    logits, labels = two_way([0.8, 0.7, 0.6]), np.array([0, 1, 1])
    assert ece_equal_mass(logits, labels, bins=2) == pytest.approx(0.5, abs=1e-12)
    assert ece_equal_mass(logits, labels, bins=15) == pytest.approx(0.5, abs=1e-12)


def test_by_hand_rows_of_one_confidence_share_their_accuracy():
    # All .75, three of four right: nothing is amiss, however the bins cut them.
    logits, labels = two_way([0.75] * 4), np.array([0, 0, 0, 1])
    assert ece_equal_mass(logits, labels, bins=4) == pytest.approx(0.0, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 20))
def test_equal_mass_does_not_depend_on_the_order_and_one_bin_is_the_mean_gap(seed, bins):
    logits, labels = drawn(seed, 40, 3)
    logits = np.round(logits)  # many ties
    order = np.random.default_rng(seed).permutation(40)
    found = ece_equal_mass(logits, labels, bins)
    assert 0 <= found <= 1
    assert ece_equal_mass(logits[order], labels[order], bins) == pytest.approx(found, abs=1e-12)
    assert ece_equal_mass(logits, labels, 1) == pytest.approx(ece(logits, labels, 1), abs=1e-12)
    assert ece_equal_mass(logits, labels, 1) <= found + 1e-12  # cutting a bin cannot make the gaps smaller


# Bootstrap


def test_by_hand_rows_that_are_all_alike_have_an_interval_without_width():
    # Every resample is the same: nll ln 2, brier 1/2; sure 1/2 and always right (class 0 wins the tie): ece 1/2.
    found = bootstrap(np.zeros((5, 2)), np.zeros(5, dtype=int), resamples=20)
    for name, value in {"ece": 0.5, "nll": math.log(2), "brier": 0.5}.items():
        assert (found[name].value, found[name].low, found[name].high) == pytest.approx((value,) * 3, abs=1e-12)


def test_its_values_are_those_of_the_scores():
    logits, labels = drawn(1, 80)
    found = bootstrap(logits, labels, resamples=1)
    assert found["ece"].value == pytest.approx(ece(logits, labels), rel=1e-12)
    assert found["nll"].value == pytest.approx(nll(logits, labels), rel=1e-12)
    assert found["brier"].value == pytest.approx(brier(logits, labels), rel=1e-12)


def test_one_resample_is_the_scores_of_the_rows_it_drew():
    logits, labels = drawn(2, 50)
    rows = np.random.default_rng(7).integers(0, 50, 50)
    found = bootstrap(logits, labels, resamples=1, seed=7)
    for name, score in {"nll": nll, "brier": brier}.items():
        assert found[name].low == found[name].high == pytest.approx(score(logits[rows], labels[rows]), rel=1e-12)
    value, drew = ece(logits, labels), ece(logits[rows], labels[rows])  # the resample is larger: mirrored, it is below
    assert drew > value
    assert (found["ece"].low, found["ece"].high) == pytest.approx((max(0.0, 2 * value - drew), value), rel=1e-12)


@pytest.mark.parametrize(("heat", "least"), [(1.0, 0.4), (1.3, 0.8), (2.0, 0.8)])
def test_the_interval_of_the_ece_holds_that_of_endless_rows(heat, least):
    # 100 draws of 300 rows; at heat 1, a calibrated model, percentiles of the resamples never hold it
    def told(draw, rows):
        sure = draw.normal(0, 2, rows)
        labels = (draw.random(rows) < 1 / (1 + np.exp(-sure))).astype(int)
        return np.stack([np.zeros(rows), heat * sure], axis=1), labels

    draw, held = np.random.default_rng(0), 0
    true = ece(*told(draw, 10**6))
    for _ in range(100):
        found = bootstrap(*told(draw, 300), resamples=200)["ece"]
        held += found.low <= true <= found.high
    assert held / 100 >= least


def test_the_interval_of_the_nll_is_the_one_that_scipy_finds():
    from scipy.stats import bootstrap as reference

    logits, labels = drawn(3, 70)
    lost = -np.log(softmax(logits)[np.arange(70), labels])
    theirs = reference(
        (lost,), np.mean, n_resamples=200, confidence_level=0.9, method="percentile", rng=np.random.default_rng(5)
    ).confidence_interval
    ours = bootstrap(logits, labels, resamples=200, level=0.9, seed=5)["nll"]
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12)


def test_seeds_name_the_draws_and_the_global_generator_is_left_alone():
    logits, labels = drawn(4)
    before = np.random.get_state()[1].copy()
    assert bootstrap(logits, labels, resamples=30, seed=1) == bootstrap(logits, labels, resamples=30, seed=1)
    assert bootstrap(logits, labels, resamples=30, seed=1) != bootstrap(logits, labels, resamples=30, seed=2)
    assert (np.random.get_state()[1] == before).all()


def test_a_higher_level_is_a_wider_interval_and_more_rows_a_narrower_one():
    few, many = drawn(5, 50), drawn(5, 5000)

    def width(case: tuple[np.ndarray, np.ndarray], level: float) -> float:
        found = bootstrap(*case, resamples=200, level=level)["nll"]
        return found.high - found.low

    assert width(few, 0.5) < width(few, 0.95)
    assert width(many, 0.95) < width(few, 0.95) / 5  # about the root of a hundred


# Abstention


def test_by_hand_the_risk_of_the_surest_rows():
    # Wrong: the second and the fourth. Risk 0, 1/2, 1/3, 1/2; its mean is 1/3.
    wrong = np.array([0.0, 1.0, 0.0, 1.0])
    coverage, risk = risk_coverage(SURE, wrong)
    assert coverage == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert risk == pytest.approx([0.0, 0.5, 1 / 3, 0.5])
    assert aurc(SURE, wrong) == pytest.approx(1 / 3)


def test_by_hand_rows_of_one_confidence_share_their_mistakes():
    # All alike, one of four wrong: the risk is 1/4 wherever one stops.
    assert risk_coverage(np.ones(4), np.array([1.0, 0.0, 0.0, 0.0]))[1] == pytest.approx([0.25] * 4)


def test_by_hand_the_accuracy_at_coverages():
    # The surest row is right; of the two surest one is; of 60 % of four rows, which is three, two are.
    right = np.array([True, False, True, False])
    assert accuracy_at(SURE, right, (0.25, 0.26, 0.5, 0.6, 1.0)) == pytest.approx((1.0, 0.5, 0.5, 2 / 3, 0.5))


def test_a_share_that_a_float_misses_takes_no_row_too_many():
    right = np.array([True] * 7 + [False] * 93)
    assert accuracy_at(-np.arange(100.0), right, (0.07,)) == (1.0,)  # 0.07 * 100 = 7.000000000000001


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_the_order_of_the_rows_does_not_matter_and_no_order_is_better_than_the_mistakes_last(seed):
    draw = np.random.default_rng(seed)
    confidence, wrong = draw.integers(0, 6, 25).astype(float), (draw.random(25) < 0.4).astype(float)
    order = draw.permutation(25)
    assert aurc(confidence[order], wrong[order]) == pytest.approx(aurc(confidence, wrong), rel=1e-12)
    assert aurc(-wrong, wrong) - 1e-12 <= aurc(confidence, wrong) <= aurc(wrong, wrong) + 1e-12
    assert risk_coverage(confidence, wrong)[1][-1] == pytest.approx(wrong.mean())
    assert accuracy_at(confidence, wrong == 0, (1.0,))[0] == pytest.approx(1 - wrong.mean())


def test_ties_are_the_mean_over_their_orders():
    from itertools import permutations

    wrong = np.array([0.0, 1.0, 1.0, 0.0])
    ranks = [np.array([9.0, *order]) for order in permutations((1.0, 2.0, 3.0))]
    mean = np.mean([aurc(one, wrong) for one in ranks])
    assert aurc(np.array([9.0, 1.0, 1.0, 1.0]), wrong) == pytest.approx(mean, rel=1e-12)
