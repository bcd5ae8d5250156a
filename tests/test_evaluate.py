"""Metrics of a split."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

import luthier
from luthier import evaluate
from luthier.core.scores import softmax
from luthier.errors import DataError
from luthier.evaluate import HIGHER_IS_BETTER, classification, confusion, mistakes, regression
from tests.little import recipe, sentences


def logits_of(found: list[int], classes: int = 3, sure: float = 5.0) -> np.ndarray:
    return np.eye(classes)[found] * sure


def test_by_hand_accuracy_and_macro_f1():
    # found 0 0 1 1, true 0 1 1 2: F1 of 0 is 2/3, of 1 is 1/2, of 2 is 0: mean 7/18
    told = classification(logits_of([0, 0, 1, 1]), np.array([0, 1, 1, 2]))
    assert told["accuracy"] == 0.5
    assert told["f1_macro"] == pytest.approx(7 / 18)
    assert told["n"] == 4


def test_by_hand_matthews_correlation():
    # found 0 0 1 1, true 0 1 1 1: 3 of 4 right, said 2 2, there 1 3: (12 - 8) / sqrt((16 - 8) (16 - 10)) = 4 / sqrt(48)
    assert evaluate.mcc(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])) == pytest.approx(4 / 48**0.5)
    assert evaluate.mcc(np.array([1, 0]), np.array([0, 1])) == -1.0
    assert evaluate.mcc(np.array([1, 1, 1]), np.array([0, 1, 1])) == 0.0  # always one class
    assert evaluate.mcc(np.array([1, 1]), np.array([1, 1])) == 0.0


def test_by_hand_area_under_the_roc_curve():
    # class 1 has the scores .4 .8 .3, class 0 .1 .4; of the six pairs four are in order and one is equal: 4.5 / 6
    logits = np.array([[0, score] for score in (0.1, 0.4, 0.4, 0.8, 0.3)])
    assert evaluate.auroc(logits, np.array([0, 0, 1, 1, 1])) == pytest.approx(0.75)
    assert evaluate.auroc(-logits, np.array([0, 0, 1, 1, 1])) == pytest.approx(0.25)
    assert evaluate.auroc(logits, np.ones(5, dtype=int)) is None
    assert evaluate.auroc(np.zeros((4, 2)), np.array([0, 1, 1, 1])) == 0.5
    wide = np.hstack([logits, np.full((5, 1), -50.0)])  # a class without rows changes nothing
    assert evaluate.auroc(wide, np.array([0, 0, 1, 1, 1])) == pytest.approx(0.75)


def test_by_hand_regression():
    # errors 1, -1, 2: rmse sqrt(2), mae 4/3
    told = regression(np.array([2.0, 1.0, 5.0]), np.array([1.0, 2.0, 3.0]))
    assert told["rmse"] == pytest.approx(2**0.5)
    assert told["mae"] == pytest.approx(4 / 3)
    assert told["spearman"] == pytest.approx(0.5)


def test_a_constant_prediction_has_no_correlation():
    told = regression(np.ones(4), np.arange(4.0))
    assert told["pearson"] is None
    assert told["spearman"] is None


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=30)
def test_correlations_are_scipys_with_and_without_ties(seed, ties):
    from scipy import stats

    draw = np.random.default_rng(seed)
    one, other = draw.normal(size=(2, 40)) if not ties else draw.integers(0, 5, size=(2, 40)).astype(np.float64)
    other = other + 0.5 * one + 1000
    assert evaluate.pearson(one, other) == pytest.approx(stats.pearsonr(one, other).statistic, abs=1e-10)
    assert evaluate.spearman(one, other) == pytest.approx(stats.spearmanr(one, other).statistic, abs=1e-12)


def test_the_confusion_matrix_has_true_rows_and_predicted_columns():
    assert confusion(logits_of([0, 2, 2]), np.array([0, 1, 2])).tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 1]]


def test_mistakes_are_the_confident_ones_first_and_ties_keep_their_order():
    logits = np.array([[3.0, 0.0], [5.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    assert mistakes(logits, np.array([1, 1, 1, 1])) == [1, 0, 3]
    assert mistakes(logits, np.array([1, 1, 1, 1]), most=1) == [1]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6))
def test_parity_with_sklearn(seed, classes):
    draw = np.random.default_rng(seed)
    logits, labels = draw.normal(size=(40, classes)), draw.integers(0, classes, 40)
    told = classification(logits, labels)
    assert told["accuracy"] == pytest.approx(metrics.accuracy_score(labels, logits.argmax(1)))
    assert told["f1_macro"] == pytest.approx(
        metrics.f1_score(labels, logits.argmax(1), average="macro", zero_division=0)
    )
    assert told["mcc"] == pytest.approx(metrics.matthews_corrcoef(labels, logits.argmax(1)))
    if len(set(labels)) == classes:
        share = softmax(logits)
        expected = metrics.roc_auc_score(labels, share[:, 1] if classes == 2 else share, multi_class="ovr")
        assert told["auroc"] == pytest.approx(expected)
    assert (
        confusion(logits, labels) == metrics.confusion_matrix(labels, logits.argmax(1), labels=range(classes))
    ).all()


def test_nothing_to_measure_is_a_fault():
    with pytest.raises(DataError, match="must have one output for each of at least one target"):
        classification(np.zeros((0, 2)), np.zeros(0, dtype=int))
    with pytest.raises(DataError, match="2 outputs and 3 targets"):
        regression(np.zeros(2), np.zeros(3))


def test_every_metric_has_a_direction():
    told = {*classification(logits_of([0, 1]), np.array([0, 1])), *regression(np.arange(3.0), np.arange(3.0))} - {"n"}
    assert told == set(HIGHER_IS_BETTER)


def test_trust_by_hand():
    # Four rows, confidences .9, .8, .7, .6 with the two surest right: the surest half is all right, of the surest 80 % (four rows, as
    # ceil(.8 * 4) = 4) two in four are. Each row is a bin of its own in both kinds of bins: gaps .1, .2, .7, .6.
    likely = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.4, 0.6]])
    found = evaluate.trust(np.log(likely), np.array([0, 1, 1, 0]))
    assert found["accuracy_at_50"] == 1.0 and found["accuracy_at_80"] == 0.5
    assert found["ece"] == pytest.approx(0.4) and found["ece_mass"] == pytest.approx(0.4)
    assert found["mce"] == pytest.approx(0.7)
    assert found["ece_low"] <= found["ece_high"]


def test_risk_against_coverage_by_hand():
    # Confidences .9, .8, .7, .6, of which the two surest are right: of one row none is wrong, of two none, of three one, of four two.
    likely = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.4, 0.6]])
    labels = np.array([0, 1, 1, 0])
    assert evaluate.selective(np.log(likely), labels) == [[0.25, 0.0], [0.5, 0.0], [0.75, 1 / 3], [1.0, 0.5]]
    # In three points: the surest ceil(4 / 3) = 2, ceil(8 / 3) = 3 and 4 rows.
    assert evaluate.selective(np.log(likely), labels, most=3) == [[0.5, 0.0], [0.75, 1 / 3], [1.0, 0.5]]
    # Among rows that are equally sure there is no order: each counts their mean.
    assert evaluate.selective(np.log(likely[[0, 0]]), np.array([0, 1])) == [[0.5, 0.5], [1.0, 0.5]]


@given(st.integers(0, 10_000), st.integers(1, 130), st.integers(1, 50))
def test_a_thinned_curve_is_made_of_points_of_the_whole_one(seed, rows, most):
    draw = np.random.default_rng(seed)
    logits, labels = draw.normal(size=(rows, 3)), draw.integers(0, 3, rows)
    whole, few = evaluate.selective(logits, labels, most=rows), evaluate.selective(logits, labels, most=most)
    assert len(whole) == rows and len(few) == min(rows, most)
    assert all(point in whole for point in few)
    assert few == sorted(few) and few[-1] == whole[-1]
    assert few[-1] == [1.0, pytest.approx(1 - classification(logits, labels)["accuracy"])]
    assert np.mean([risk for _, risk in whole]) == pytest.approx(evaluate.trust(logits, labels)["aurc"], abs=1e-12)


def test_a_run_reports_the_curve_of_every_split_before_and_after_calibration(tiny_model):
    rows = sentences(60)
    data = {
        "train": rows[:40],
        "validation": rows[40:],
        "test": sentences(70, seed=4),
        "ood_far": sentences(30, seed=5),
    }
    report = luthier.fit(recipe(["adamw", "temperature"]), model=tiny_model, data=data)
    assert report.selective.keys() == report.reliability.keys() == {"validation", "test", "ood_far"}
    for split, curves in report.selective.items():
        scores = report.splits[split]
        for points in curves.values():
            assert len(points) == min(50, scores["n"])
            assert points[-1] == [1.0, pytest.approx(1 - scores["accuracy"])]
