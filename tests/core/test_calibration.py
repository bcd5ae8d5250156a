"""Vector and isotonic repairs, and the choice on held-out rows: by hand, by law, against others' code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.calibration import fit_isotonic, fit_vector, held_out_nll, through, through_logits, unfit
from luthier.core.ingredient import Outputs
from luthier.core.scores import nll, softmax
from tests.logits import drawn

# What can be calibrated on


def test_what_cannot_be_calibrated_on_is_told():
    whole, numbers = np.zeros(2, dtype=np.int64), np.zeros(2)
    assert unfit(Outputs(np.zeros((2, 2)), whole)) == ""
    assert "validation rows" in unfit(None)
    assert "validation rows" in unfit(Outputs(np.zeros((0, 2)), whole[:0]))
    assert "classification" in unfit(Outputs(np.zeros((2, 1)), whole))
    assert "classification" in unfit(Outputs(np.zeros((2, 2)), numbers))
    assert "classification" in unfit(Outputs(numbers, whole))
    assert "finite" in unfit(Outputs(np.array([[0.0, np.inf], [0.0, 0.0]]), whole))
    assert "finite" in unfit(Outputs(np.array([[0.0, np.nan], [0.0, 0.0]]), whole))


# Vector scaling


def test_by_hand_logits_of_four_are_repaired_by_the_smallest_change():
    # Rows (0, 4), three in four of class 1: 4 w1 + b1 - b0 must be ln 3, now it is 4. From the identity the slope is along
    # (w1, b1, b0) = (4, 1, -1), of squared length 18, and class 0's w has none: each moves by (ln 3 - 4) / 18 of it.
    logits, labels = np.array([[0.0, 4.0]] * 4), np.array([1, 1, 1, 0])
    found = fit_vector(logits, labels, strength=0.0)
    far = (math.log(3) - 4) / 18
    assert found.scale == pytest.approx((1.0, 1 + 4 * far), abs=1e-5)
    assert found.shift == pytest.approx((-far, far), abs=1e-5)
    assert found.nll_before == pytest.approx(1.018150, abs=1e-6)
    assert found.nll_after == pytest.approx(0.562335, abs=1e-6)
    assert found.converged


def test_by_hand_a_class_that_is_too_rare_is_shifted_away():
    # Both logits 0, class 1 three times in four: b1 - b0 = ln 3, half of it each; w has nothing to work on.
    found = fit_vector(np.zeros((4, 2)), np.array([1, 1, 1, 0]), strength=0.0)
    assert found.scale == (1.0, 1.0)
    assert found.shift == pytest.approx((-math.log(3) / 2, math.log(3) / 2), abs=1e-6)


def test_calibrated_logits_are_left_as_they_are_bit_for_bit():
    # The identity is where the search starts, and the slope there is 0 but for rounding.
    found = fit_vector(np.array([[0.0, 0.0]] * 4), np.array([0, 1, 0, 1]))
    assert found.scale == (1.0, 1.0)
    assert found.shift == (0.0, 0.0)
    assert found.nll_after == found.nll_before


def test_a_strong_penalty_holds_it_at_the_identity():
    found = fit_vector(*drawn(6, heat=3.0), strength=1e9)
    assert found.scale == pytest.approx((1.0,) * 4, abs=1e-6)
    assert found.shift == pytest.approx((0.0,) * 4, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.1, 1.0, 10.0]), st.sampled_from([0.3, 1.0, 4.0]))
def test_the_slope_vanishes_where_it_stops_and_the_fit_is_never_worse(seed, strength, heat):
    logits, labels = drawn(seed, heat=heat)
    found = fit_vector(logits, labels, strength=strength)
    assert found.converged
    w = torch.tensor(found.scale, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(found.shift, dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(torch.tensor(logits) * w + b, torch.tensor(labels))
    assert loss.item() == pytest.approx(found.nll_after, rel=1e-10)
    penalty = strength / 2 / len(labels) * ((w - 1).square().sum() + b.square().sum())
    (loss + penalty).backward()
    assert float(w.grad.abs().max()) <= 1e-6
    assert float(b.grad.abs().max()) <= 1e-6
    assert found.nll_after <= found.nll_before + 1e-12
    assert sum(found.shift) == pytest.approx(0.0, abs=1e-4)  # a shift of all classes alike would only cost


def test_it_is_what_torch_finds_by_lbfgs():
    logits, labels = drawn(8, 200, 3, heat=3.0)
    wide, target = torch.tensor(logits), torch.tensor(labels)
    at = torch.cat([torch.ones(3), torch.zeros(3)]).double().requires_grad_()
    identity = at.detach().clone()
    search = torch.optim.LBFGS(
        [at], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        search.zero_grad()
        loss = torch.nn.functional.cross_entropy(wide * at[:3] + at[3:], target)
        loss = loss + 2.0 / 2 / 200 * (at - identity).square().sum()
        loss.backward()
        return loss

    search.step(closure)
    found = fit_vector(logits, labels, strength=2.0)
    # The curvature is at least strength / n = 0.01, so slopes of 1e-8 are numbers off by 1e-6.
    assert (*found.scale, *found.shift) == pytest.approx(at.tolist(), abs=1e-5)


def test_a_search_cut_short_and_one_without_a_minimum_are_told_from_one_that_ended():
    logits, labels = drawn(9, heat=4.0)
    assert not fit_vector(logits, labels, most=1).converged
    assert fit_vector(logits, labels).converged
    # Separable rows: the prior makes the minimum finite.
    apart = np.array([[3.0, 0.0], [0.0, 3.0]])
    found = fit_vector(apart, np.array([0, 1]))
    assert found.converged
    assert 1 < found.scale[0] < 3
    assert found.scale[0] == pytest.approx(found.scale[1], abs=1e-5)


def test_logits_of_a_thousand_are_no_trouble():
    logits, labels = drawn(10, 100, 3, heat=500.0)
    found = fit_vector(logits, labels)
    assert np.isfinite([*found.scale, *found.shift, found.nll_after]).all()
    assert found.nll_after < found.nll_before / 100


# Isotonic


def test_by_hand_neighbours_that_fall_are_pooled():
    # Chances of class 0: .2 .4 .6 .8, class 0 there: no yes no yes -> 0, 1/2, 1/2, 1. Class 1 is its mirror.
    likely = np.array([[0.2, 0.8], [0.4, 0.6], [0.6, 0.4], [0.8, 0.2]])
    zero, one = fit_isotonic(likely, np.array([1, 0, 1, 0]))
    assert zero == (pytest.approx((0.2, 0.4, 0.6, 0.8)), pytest.approx((0.0, 0.5, 0.5, 1.0)))
    assert one == (pytest.approx((0.2, 0.4, 0.6, 0.8)), pytest.approx((0.0, 0.5, 0.5, 1.0)))
    # Between .2 and .4 a straight line: .3 -> 1/4; beyond .8 it stays 1.
    assert through((zero, one), np.array([[0.3, 0.7], [0.95, 0.05]])) == pytest.approx(
        np.array([[0.25, 0.75], [1.0, 0.0]])
    )


def test_by_hand_ties_are_one_point_that_counts_as_often():
    # Three rows of .3 (one of class 0) and one of .7 (not): 1/3 and 0 fall, so the four are pooled: 1/4 everywhere.
    likely = np.array([[0.3, 0.7]] * 3 + [[0.7, 0.3]])
    zero, one = fit_isotonic(likely, np.array([0, 1, 1, 1]))
    assert zero[1] == pytest.approx((0.25,) * len(zero[1]))
    assert one[1] == pytest.approx((0.75,) * len(one[1]))
    alike = fit_isotonic(np.full((4, 2), 0.5), np.array([0, 1, 1, 1]))
    assert alike == (((0.5,), (0.25,)), ((0.5,), (0.75,)))
    assert through(alike, np.array([[0.1, 0.9]])) == pytest.approx(np.array([[0.25, 0.75]]))


def test_by_hand_three_classes_are_normalised_and_a_row_of_zeros_is_even():
    step = ((0.2, 0.6), (0.0, 1.0))  # f(.4) = 1/2, f(.3) = 1/4
    tables = (step, step, step)
    likely = np.array([[0.4, 0.3, 0.3], [0.2, 0.2, 0.1], [0.6, 0.2, 0.2]])
    third = 1 / 3
    assert through(tables, likely) == pytest.approx(np.array([[0.5, 0.25, 0.25], [third] * 3, [1.0, 0.0, 0.0]]))
    logits = through_logits(tables, np.log(likely))  # softmax makes .4 .4 .2 of the second row
    assert softmax(logits)[0] == pytest.approx([0.5, 0.25, 0.25])
    assert np.isfinite(logits).all()
    assert logits[2, 1] == math.log(np.finfo(np.float64).tiny)


def test_by_hand_the_floor_bounds_both_ends():
    likely = np.array([[0.2, 0.8], [0.8, 0.2]])
    zero, one = fit_isotonic(likely, np.array([1, 0]), floor=0.25)
    assert zero[1] == (0.25, 0.75)
    assert one[1] == (0.25, 0.75)


def test_curves_that_are_the_diagonal_change_nothing():
    likely = softmax(drawn(11)[0])
    diagonal = ((0.0, 1.0), (0.0, 1.0))
    assert through((diagonal,) * 4, likely) == pytest.approx(likely, rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5))
def test_curves_rise_rows_sum_to_one_and_the_fitted_rows_have_finite_nll(seed, classes):
    logits, labels = drawn(seed, 30, classes, heat=3.0)
    logits = np.round(logits)  # ties
    tables = fit_isotonic(softmax(logits), labels)
    assert len(tables) == classes
    for x, y in tables:
        assert len(x) == len(y) >= 1
        assert (np.diff(x) > 0).all()
        assert (np.diff(y) >= 0).all()
        assert 0 <= min(y) <= max(y) <= 1
    likely = through(tables, softmax(logits))
    assert likely.sum(axis=1) == pytest.approx(np.ones(30))
    assert (likely[np.arange(30), labels] > 0).all()  # its own row is in the block of each label
    assert through(tables, softmax(drawn(seed + 1, 30, classes)[0])).sum(axis=1) == pytest.approx(np.ones(30))


def test_of_two_classes_the_curves_mirror_each_other():
    logits, labels = drawn(12, 80, 2)
    likely = softmax(logits)
    tables = fit_isotonic(likely, labels, floor=0.01)
    read = [np.interp(likely[:, at], *tables[at]) for at in (0, 1)]
    assert read[0] + read[1] == pytest.approx(np.ones(80), abs=1e-9)


@pytest.mark.parametrize("classes", [2, 4])
def test_it_is_what_scikit_learn_makes_of_a_fitted_classifier(classes):
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.frozen import FrozenEstimator
    from sklearn.naive_bayes import GaussianNB

    draw = np.random.default_rng(13)
    rows = draw.normal(size=(150, 3))
    labels = (rows @ draw.normal(size=(3, classes)) + draw.gumbel(size=(150, classes))).argmax(axis=1)
    # Naive Bayes, for it has no decision function: scikit-learn then calibrates its probabilities.
    model = GaussianNB().fit(rows[:50], labels[:50])
    theirs = CalibratedClassifierCV(FrozenEstimator(model), method="isotonic", ensemble=False).fit(
        rows[50:], labels[50:]
    )
    tables = fit_isotonic(model.predict_proba(rows[50:]), labels[50:])
    new = draw.normal(size=(100, 3)) * 2
    # For two classes scikit-learn fits one curve and takes the rest; ours fits its mirror image too.
    assert through(tables, model.predict_proba(new)) == pytest.approx(theirs.predict_proba(new), abs=1e-9)


# The choice on held-out rows


def test_by_hand_every_row_is_judged_by_the_half_without_it():
    seen = []

    def fit(logits, labels):
        seen.append(sorted(logits[:, 0].tolist()))
        shift = float(len(seen))
        return lambda new: np.stack([np.zeros(len(new)), np.full(len(new), shift)], axis=1)

    logits = np.stack([np.arange(6.0), np.zeros(6)], axis=1)
    labels = np.array([0, 0, 0, 0, 1, 1])
    found = held_out_nll(fit, logits, labels, seed=3)
    assert sorted(seen[0] + seen[1]) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert sum(row < 4 for row in seen[0]) == 2  # each class is dealt to both halves alike
    # In each half two rows of class 0 and one of class 1, under logits (0, 1) in one and (0, 2) in the other.
    worth = [(2 * math.log(1 + math.exp(by)) + math.log(1 + math.exp(-by))) / 3 for by in (1.0, 2.0)]
    assert found == pytest.approx(sum(worth) / 2, rel=1e-12)


def test_no_repair_is_worth_the_nll_and_one_row_cannot_be_halved():
    logits, labels = drawn(14, 31)
    assert held_out_nll(lambda z, y: lambda new: new, logits, labels) == pytest.approx(nll(logits, labels), rel=1e-12)
    assert held_out_nll(lambda z, y: lambda new: new, logits[:1], labels[:1]) == math.inf


def test_with_as_many_folds_as_rows_each_row_is_left_out_alone():
    sizes = []

    def fit(logits, labels):
        sizes.append(len(logits))
        return lambda new: np.tile(logits.mean(axis=0), (len(new), 1))

    logits, labels = drawn(21, 9, 3)
    apart = [nll(np.delete(logits, at, 0).mean(axis=0)[None], labels[at : at + 1]) for at in range(9)]
    assert held_out_nll(fit, logits, labels, folds=9) == pytest.approx(np.mean(apart), rel=1e-12)
    assert sizes == [8] * 9


def test_a_repair_that_only_knows_its_own_rows_by_heart_is_seen_through():
    logits, labels = drawn(15, 40, 3)

    def by_heart(known, answers):
        table = {row.tobytes(): answer for row, answer in zip(known, answers, strict=True)}
        return lambda new: 20 * np.eye(3)[[table.get(row.tobytes(), 0) for row in new]]

    assert nll(by_heart(logits, labels)(logits), labels) < 1e-6
    assert held_out_nll(by_heart, logits, labels) > 5
