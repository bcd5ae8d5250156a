"""Scores of probabilities and the temperature that repairs them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss

from luthier.core.scores import brier, ece, fit_temperature, mce, nll, reliability, softmax


def two_way(confidences: list[float]) -> np.ndarray:
    """Logits of two classes whose first has these probabilities."""
    chance = np.array(confidences)
    return np.stack([np.log(chance), np.log(1 - chance)], axis=1)


def random_case(seed: int, rows: int = 60, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    return draw.normal(size=(rows, classes)) * 3, draw.integers(0, classes, rows)


def test_by_hand_two_bins():
    # confidences .95 .95 .65 .65, right yes no yes no: both bins are right half the time; ECE = (.45 + .15) / 2, MCE = .45
    logits, labels = two_way([0.95, 0.95, 0.65, 0.65]), np.array([0, 1, 0, 1])
    assert ece(logits, labels) == pytest.approx(0.30, abs=1e-12)
    assert mce(logits, labels) == pytest.approx(0.45, abs=1e-12)


def test_by_hand_a_half_and_a_half():
    logits, labels = np.zeros((2, 2)), np.array([0, 1])
    assert nll(logits, labels) == pytest.approx(math.log(2))
    assert brier(logits, labels) == pytest.approx(0.5)
    assert ece(logits, labels) == pytest.approx(0.0)


def test_by_hand_the_temperature_of_three_right_in_four():
    # softmax((0, 4) / T) must be 3/4 on the second: 4 / T = ln 3
    logits, labels = np.array([[0.0, 4.0]] * 4), np.array([1, 1, 1, 0])
    found = fit_temperature(logits, labels)
    assert found.value == pytest.approx(4 / math.log(3), rel=1e-7)
    assert found.nll_before == pytest.approx(1.018150, abs=1e-6)
    assert found.nll_after == pytest.approx(0.562335, abs=1e-6)
    assert ece(logits / found.value, labels) == pytest.approx(0.0, abs=1e-9)
    assert not found.at_bound


def test_bins_are_closed_on_the_right():
    # 2/3 = 10/15 belongs to the bin (9/15, 10/15]
    made = reliability(two_way([2 / 3]), np.array([0]), bins=15)
    assert [at for at, one in enumerate(made) if one.count] in ([9], [10])
    exact = reliability(np.zeros((1, 2)), np.array([0]), bins=2)  # 1/2 belongs to (0, 1/2]
    assert [one.count for one in exact] == [1, 0]


def test_separable_rows_ask_for_ever_colder_and_wrong_ones_for_ever_hotter():
    logits = np.array([[3.0, 0.0], [0.0, 3.0]])
    cold, hot = fit_temperature(logits, np.array([0, 1])), fit_temperature(logits, np.array([1, 0]))
    assert cold.at_bound
    assert hot.at_bound
    assert cold.value == pytest.approx(0.05)
    assert hot.value == pytest.approx(20.0)
    assert fit_temperature(np.zeros((3, 2)), np.array([0, 1, 0])).value == 1.0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_invariants(seed):
    logits, labels = random_case(seed)
    assert 0 <= ece(logits, labels) <= mce(logits, labels) <= 1
    assert 0 <= brier(logits, labels) <= 2
    assert nll(logits, labels) >= 0
    assert np.allclose(softmax(logits).sum(1), 1)
    assert sum(one.count for one in reliability(logits, labels)) == len(labels)
    shifted = logits + np.random.default_rng(seed).normal(size=(len(labels), 1)) * 50
    assert nll(shifted, labels) == pytest.approx(nll(logits, labels), rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_the_slope_of_the_nll_is_nil_at_the_fitted_temperature(seed):
    logits, labels = random_case(seed)
    found = fit_temperature(logits, labels)
    if found.at_bound:
        return
    wide = torch.tensor(logits, dtype=torch.float64)
    log_t = torch.tensor(math.log(found.value), dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(wide / log_t.exp(), torch.tensor(labels))
    loss.backward()
    assert abs(log_t.grad.item()) < 1e-7
    assert found.nll_after <= found.nll_before + 1e-12
    assert loss.item() == pytest.approx(found.nll_after, rel=1e-12)
    assert ((logits / found.value).argmax(1) == logits.argmax(1)).all()


def test_parity_with_sklearn():
    logits, labels = random_case(3)
    assert nll(logits, labels) == pytest.approx(log_loss(labels, softmax(logits), labels=range(4)), rel=1e-12)
