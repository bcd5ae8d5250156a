"""The linear probe, solved."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn

import luthier
from luthier.core.scores import softmax
from luthier.training import head
from luthier.training.head import solve_classification, solve_regression, write
from tests.little import recipe, sentences


def blobs(classes: int, *, rows: int = 90, width: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, classes, rows)
    return draw.normal(size=(rows, width)) + 1.5 + draw.normal(size=(classes, width))[labels] * 1.5, labels


def chances(probe, features: np.ndarray) -> np.ndarray:
    return softmax(features @ probe.weight.T + probe.bias)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_probabilities_are_sklearns(classes):
    """Not the scores: sklearn has one row for two classes, a softmax head has two. 1e-6, the solver's tolerance."""
    features, labels = blobs(classes)
    probe = solve_classification(features, labels, classes=classes, strengths=[0.5])
    scaled = (features - features.mean()) / features.std()
    theirs = LogisticRegression(C=0.5, tol=1e-10, max_iter=5000).fit(scaled, labels).predict_proba(scaled)
    mine = solve_classification(features, labels, classes=classes, validation=(features, labels), strengths=[0.5])
    assert np.abs(chances(mine, features) - theirs).max() < 2e-4
    assert mine.weight.shape == (classes, 6)
    assert probe.converged


@pytest.mark.parametrize("classes", [2, 4])
def test_the_gradient_of_the_penalised_objective_is_nil(classes):
    """C sum_i (p_ik - y_ik) z_i + w_k = 0 in the scaled space, for two classes in its one-row form; relative to C n: 1e-4."""
    features, labels = blobs(classes)
    strength = 0.7
    probe = solve_classification(features, labels, classes=classes, validation=(features, labels), strengths=[strength])
    z, spread = (features - features.mean()) / features.std(), features.std()
    weight = probe.weight * spread
    residual = chances(probe, features) - np.eye(classes)[labels]
    one_row = strength * residual[:, 1] @ z + (weight[1] - weight[0])
    slope = one_row if classes == 2 else strength * residual.T @ z + weight
    assert np.abs(slope).max() / (strength * len(labels)) < 1e-4
    assert np.abs(residual.sum(0)).max() / len(labels) < 1e-4  # the intercept is not penalised


def test_a_class_without_rows_gets_no_probability_and_leaves_the_rest_alone():
    features, labels = blobs(3)
    sparse = solve_classification(features, labels * 2, classes=6, validation=(features, labels * 2), strengths=[1.0])
    dense = solve_classification(features, labels, classes=3, validation=(features, labels), strengths=[1.0])
    assert np.isfinite(sparse.bias).all()
    assert np.abs(chances(sparse, features)[:, [0, 2, 4]] - chances(dense, features)).max() < 1e-6
    assert chances(sparse, features)[:, [1, 3, 5]].max() < 1e-6


def test_without_an_intercept_the_bias_is_nil():
    features, labels = blobs(3)
    probe = solve_classification(
        features, labels, classes=3, validation=(features, labels), strengths=[1.0], intercept=False
    )
    assert (probe.bias == 0).all()
    scaled = features / features.std()
    theirs = (
        LogisticRegression(C=1.0, fit_intercept=False, tol=1e-10, max_iter=5000)
        .fit(scaled, labels)
        .predict_proba(scaled)
    )
    assert np.abs(chances(probe, features) - theirs).max() < 2e-4


def test_the_strength_is_chosen_on_validation():
    features, labels = blobs(3, rows=60, width=40)
    held = blobs(3, rows=60, width=40, seed=0)[0] + np.random.default_rng(9).normal(size=(60, 40)), labels
    probe = solve_classification(features, labels, classes=3, validation=held)
    best = max(score for _, score in probe.path)
    assert dict(probe.path)[probe.strength] == best


def test_permuting_the_classes_permutes_the_head():
    features, labels = blobs(3)
    order = np.array([2, 0, 1])
    one = solve_classification(features, labels, classes=3, validation=(features, labels), strengths=[1.0])
    other = solve_classification(
        features, order[labels], classes=3, validation=(features, order[labels]), strengths=[1.0]
    )
    assert np.abs(chances(other, features)[:, order] - chances(one, features)).max() < 1e-4


def test_features_that_are_shifted_and_scaled_by_scalars_give_the_same_predictions():
    features, labels = blobs(3)
    one = solve_classification(features, labels, classes=3, validation=(features, labels), strengths=[1.0])
    moved = features * 40 - 7
    other = solve_classification(moved, labels, classes=3, validation=(moved, labels), strengths=[1.0])
    assert np.abs(chances(one, features) - chances(other, moved)).max() < 1e-9


def test_one_class_alone_is_predicted_for_all():
    features, _ = blobs(2)
    probe = solve_classification(features, np.ones(len(features), dtype=int), classes=2)
    assert (chances(probe, features).argmax(1) == 1).all()


def test_by_hand_ridge_through_three_points():
    # x = -1 0 1, y = -2 0 2, alpha 1: slope = 4 / (2 + 1)
    probe = solve_regression(np.array([[-1.0], [0.0], [1.0]]), np.array([-2.0, 0.0, 2.0]), strengths=[1.0])
    assert probe.weight[0, 0] == pytest.approx(4 / 3, abs=1e-12)
    assert probe.bias[0] == pytest.approx(0.0, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1e-3, 1.0, 100.0]))
def test_ridge_is_sklearns(seed, alpha):
    draw = np.random.default_rng(seed)
    features, targets = draw.normal(size=(30, 5)) + 3, draw.normal(size=30)
    probe = solve_regression(features, targets, strengths=[alpha])
    theirs = Ridge(alpha=alpha).fit(features, targets)
    assert np.allclose(probe.weight[0], theirs.coef_, rtol=1e-8, atol=1e-10)
    assert probe.bias[0] == pytest.approx(theirs.intercept_, rel=1e-8, abs=1e-9)


def test_leaving_one_out_in_closed_form_is_leaving_one_out():
    draw = np.random.default_rng(0)
    features, targets = draw.normal(size=(12, 3)), draw.normal(size=12)
    told = dict(solve_regression(features, targets, strengths=[0.5]).path)[0.5]
    gaps = []
    for out in range(12):
        kept = np.arange(12) != out
        # the same penalty and the same centring as the whole fit has only in the limit; refit exactly
        probe = solve_regression(
            features[kept], targets[kept], strengths=[0.5], validation=(features[out : out + 1], targets[out : out + 1])
        )
        gaps.append(probe.path[0][1])
    assert told == pytest.approx(float(np.sqrt(np.mean(np.square(gaps)))), rel=1e-6)


def test_written_into_a_linear_layer_the_logits_are_the_solvers():
    features, labels = blobs(4)
    probe = solve_classification(features, labels, classes=4, validation=(features, labels))
    linear = nn.Linear(6, 4)
    write(probe, linear)
    with torch.no_grad():
        logits = linear(torch.tensor(features, dtype=torch.float32)).numpy()
    assert np.abs(logits - (features @ probe.weight.T + probe.bias)).max() < 1e-5 * max(1, np.abs(logits).max())
    bare = nn.Linear(6, 4, bias=False)
    write(probe, bare)
    assert torch.allclose(bare.weight, linear.weight)


def probed(tiny_model, rows: dict[str, int], *, labels=None) -> luthier.Report:
    """A probe alone, on so many rows of each split."""
    every, at, data = sentences(sum(rows.values())), 0, {}
    if labels is not None:
        every["label"] = labels(every)
    for split, many in rows.items():
        data[split], at = every[at : at + many], at + many
    made = recipe([], steps=1, lr=1e-12, probe=True)
    return luthier.fit(made, model=str(tiny_model), data=data)


@pytest.mark.parametrize(("validation", "crossed"), [(49, True), (50, False)])
def test_the_strength_is_chosen_by_cross_validation_where_validation_is_small(
    validation, crossed, tiny_model, monkeypatch
):
    held = []
    real = head.solve_classification

    def solve(*features, **more):
        held.append(more["validation"])
        return real(*features, **more)

    monkeypatch.setattr(head, "solve_classification", solve)
    told = probed(tiny_model, {"train": 40, "validation": validation, "test": 10}).stages[0].notes
    assert (held[0] is None) == crossed
    assert any(f"with {validation} validation rows" in note for note in told) == crossed


def test_few_training_rows_leave_the_choice_to_a_small_validation(tiny_model, monkeypatch):
    """Four rows of a class cannot be cut in five."""
    held = []
    real = head.solve_classification
    monkeypatch.setattr(
        head, "solve_classification", lambda *a, **more: held.append(more["validation"]) or real(*a, **more)
    )
    probed(tiny_model, {"train": 8, "validation": 12, "test": 10})
    assert held[0] is not None and len(held[0][1]) == 12
