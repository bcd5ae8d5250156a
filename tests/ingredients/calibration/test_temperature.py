"""Temperature: the hand case, parity with a grid and with torch's L-BFGS, and when it keeps its hands off."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from luthier.core.claims import Place, owns
from luthier.core.context import Context, Progress, Shelf
from luthier.core.ingredient import Findings, Outputs
from luthier.ingredients.calibration.temperature import Temperature


def context() -> Context:
    parts: Any = None  # calibration does not read the model's parts
    return Context(parts, Progress(0), 0, "train/temperature", Temperature().touches(), Shelf(), [])


def measured(outputs: Mapping[str, Outputs]) -> Findings:
    found = Temperature().measure(outputs, context())
    assert found is not None
    return found


def three_of_four(logit: float, *, rows: int = 80) -> Outputs:
    """Rows that all say class 1 by ``logit``, of which three in four are right."""
    return Outputs(np.tile([0.0, logit], (rows, 1)), np.array([1, 1, 1, 0] * (rows // 4)))


def noisy(rows: int, classes: int, *, seed: int = 0) -> Outputs:
    """Overconfident logits: the right class is ahead by a noise that is as large as its lead."""
    draw = np.random.default_rng(seed)
    targets = draw.integers(0, classes, rows)
    return Outputs(6.0 * np.eye(classes)[targets] + draw.normal(0, 6.0, (rows, classes)), targets)


def nll(outputs: Outputs, temperature: float) -> float:
    """Mean cross-entropy of the logits over ``temperature``, in double precision."""
    z = outputs.logits / temperature
    z = z - z.max(axis=1, keepdims=True)
    return float(np.mean(np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), outputs.targets]))


# By hand


def test_logits_of_four_that_are_right_three_times_in_four_are_divided_by_four_over_the_log_of_three() -> None:
    # The probability should be 3/4, so the logit ln 3: T = 4 / ln 3 = 3.640957. Before: ln(1 + e^4) - 3/4 x 4, which is
    # 1.018150; after: the entropy of (3/4, 1/4), ln 4 - 3/4 ln 3 = 0.562335.
    found = measured({"validation": three_of_four(4.0)})
    assert found.values["temperature"] == pytest.approx(4 / math.log(3), abs=1e-6)
    assert found.values["nll_before"] == pytest.approx(math.log(1 + math.exp(4)) - 3, abs=1e-12)
    assert found.values["nll_after"] == pytest.approx(math.log(4) - 0.75 * math.log(3), abs=1e-12)
    assert found.scale == (1 / found.values["temperature"],)
    assert found.shift is None
    assert found.notes == ()


# Identity


def test_calibrated_logits_are_left_as_they_are() -> None:
    # A logit of ln 3 says 3/4, and three in four are right. The minimum is flat, hence 1e-6 and not less.
    found = measured({"validation": three_of_four(math.log(3))})
    assert found.values["temperature"] == pytest.approx(1.0, abs=1e-6)


# Invariants


@settings(max_examples=40, deadline=None)
@given(
    arrays(np.float64, (12, 3), elements=st.integers(-80, 80).map(lambda number: number / 8)),
    arrays(np.int64, 12, elements=st.integers(0, 2)),
)
def test_which_class_wins_never_changes_and_the_fit_is_never_worse(logits: np.ndarray, targets: np.ndarray) -> None:
    found = measured({"validation": Outputs(logits, targets)})
    assert found.values["nll_after"] <= found.values["nll_before"] + 1e-12
    if found.scale is not None:
        assert found.scale[0] > 0
        assert np.array_equal((logits * found.scale[0]).argmax(axis=1), logits.argmax(axis=1))


def test_scaled_logits_have_the_scaled_temperature() -> None:
    outputs = noisy(200, 3)
    once = measured({"validation": outputs}).values["temperature"]
    thrice = measured({"validation": Outputs(3 * outputs.logits, outputs.targets)}).values["temperature"]
    assert thrice == pytest.approx(3 * once, rel=1e-5)


# Parity


def test_no_temperature_of_a_fine_grid_is_better() -> None:
    outputs = noisy(300, 4)
    found = measured({"validation": outputs}).values["temperature"]
    grid = np.geomspace(0.2, 20.0, 2001)  # 0.23 % from one to the next
    best = float(grid[np.argmin([nll(outputs, value) for value in grid])])
    assert found == pytest.approx(best, rel=0.0025)
    assert nll(outputs, found) <= nll(outputs, best)


def test_it_is_the_temperature_that_torch_finds_by_lbfgs() -> None:
    outputs = noisy(300, 4)
    logits, targets = torch.from_numpy(outputs.logits), torch.from_numpy(outputs.targets)
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [log_t], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        search.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits / log_t.exp(), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    search.step(closure)  # type: ignore[no-untyped-call]
    # Both stop where the slope vanishes in double precision; a slope of 1e-8 is a temperature off by about 1e-7.
    assert measured({"validation": outputs}).values["temperature"] == pytest.approx(log_t.exp().item(), rel=1e-6)


# Conformance


def test_it_keeps_the_contract() -> None:
    from luthier.testing import check_ingredient

    check_ingredient(Temperature())


def test_it_owns_the_predictions() -> None:
    assert Temperature().touches() == (owns(Place.PREDICTIONS),)


# It matters


def test_only_the_validation_rows_are_read() -> None:
    outputs = {"validation": noisy(200, 3)}
    alone = measured(outputs)
    others = measured({"train": noisy(50, 3, seed=1), **outputs, "test": noisy(50, 3, seed=2)})
    assert alone == others


def test_logits_that_are_no_numbers_are_left_as_they_are() -> None:
    ctx = context()
    odd = Outputs(np.array([[0.0, np.nan], [1.0, 0.0]]), np.array([0, 1]))
    assert Temperature().measure({"validation": odd}, ctx) is None
    assert "needs logits that are finite numbers" in ctx.notes[0]


def test_without_validation_rows_nothing_is_fitted_and_it_is_told() -> None:
    for outputs in ({"test": noisy(100, 3)}, {"validation": Outputs(np.zeros((0, 3)), np.zeros(0, dtype=np.int64))}):
        ctx = context()
        assert Temperature().measure(outputs, ctx) is None
        assert "needs validation rows" in ctx.notes[0]


@pytest.mark.parametrize(
    "outputs",
    [
        Outputs(np.zeros((60, 1)), np.zeros(60)),
        Outputs(np.zeros((60, 1)), np.zeros(60, dtype=np.int64)),
        Outputs(np.zeros(60), np.zeros(60)),
        Outputs(np.zeros((60, 2)), np.zeros(60)),
    ],
    ids=["one column", "one column and whole numbers", "no columns", "numbers to predict"],
)
def test_regression_is_left_alone_and_told(outputs: Outputs) -> None:
    ctx = context()
    assert Temperature().measure({"validation": outputs}, ctx) is None
    assert "is for classification" in ctx.notes[0]


def test_few_validation_rows_are_told_about() -> None:
    few = measured({"validation": three_of_four(4.0, rows=48)})
    assert few.scale is not None
    assert "fitted on 48 validation rows" in few.notes[0]
    assert measured({"validation": three_of_four(4.0, rows=52)}).notes == ()


def test_when_every_row_is_right_no_temperature_is_used() -> None:
    # The colder the better without end: there is no best temperature, and a cold one says "certain" of every test row.
    found = measured({"validation": Outputs(np.tile([0.0, 4.0], (60, 1)), np.ones(60, dtype=np.int64))})
    assert found.scale is None
    assert found.values["temperature"] == 1.0
    assert found.values["nll_after"] == found.values["nll_before"]
    assert "lies outside 0.05 to 20" in found.notes[0]
