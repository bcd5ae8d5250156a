"""Conformal: the hand case, the promise kept on new rows, and nothing changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.conformal import Sets, coverage_range
from luthier.core.context import Context, Progress, Shelf
from luthier.core.ingredient import Findings, Outputs
from luthier.errors import RecipeError
from luthier.ingredients.calibration.conformal import Conformal, coverage_and_size


def context() -> Context:
    parts: Any = None  # calibration does not read the model's parts
    return Context(parts, Progress(0), 0, "train/conformal", Conformal().touches(), Shelf(), [])


def measured(outputs: Mapping[str, Outputs], alpha: float = 0.1, score: Literal["lac", "aps"] = "lac") -> Findings:
    found = Conformal(alpha=alpha, score=score).measure(outputs, context())
    assert found is not None
    return found


def first(chances: list[float], labels: list[int]) -> Outputs:
    """Rows of two classes whose first has these probabilities."""
    chance = np.array(chances)
    return Outputs(np.stack([np.log(chance), np.log(1 - chance)], axis=1), np.array(labels))


def drawn(seed: int, rows: int, *, classes: int = 4, heat: float = 3.0) -> Outputs:
    """Logits that are ``heat`` times too large."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(0, 2, (rows, classes))
    labels = (logits + draw.gumbel(size=logits.shape)).argmax(axis=1)
    return Outputs((heat * logits).astype(np.float32), labels)


# By hand


def test_four_rows_at_alpha_one_fifth_bound_the_sets_by_their_worst() -> None:
    # True classes have .9 .8 .7 .4: scores .1 .2 .3 .6. ceil(5 * .8) = 4th: .6, so a set holds each class of at least .4.
    # Validation: sets of 1, 1, 1 and 2 classes, all right. Test: .55 and .45 -> both; .95 -> the first only, which is wrong.
    validation, test = first([0.9, 0.8, 0.7, 0.6], [0, 0, 0, 1]), first([0.55, 0.95], [1, 1])
    found = measured({"validation": validation, "test": test}, alpha=0.2)
    assert found.values["threshold"] == pytest.approx(0.6)
    assert found.values["coverage_validation"] == 1.0
    assert found.values["set_size_validation"] == 1.25
    assert found.values["coverage_test"] == 0.5
    assert found.values["set_size_test"] == 1.5
    assert found.notes[0] == (
        "prediction sets (lac) for 80 % coverage: validation 100.0 % with 1.25 classes a set, "
        "test 50.0 % with 1.50 classes a set."
    )


def test_aps_sums_the_classes_down_to_the_true_one() -> None:
    # The same rows: .9 .8 .7 and, with .6 before it, 1: the 4th is 1, so every set is full.
    found = measured({"validation": first([0.9, 0.8, 0.7, 0.6], [0, 0, 0, 1])}, alpha=0.2, score="aps")
    assert found.values["threshold"] == 1.0
    assert found.values["set_size_validation"] == 2.0
    # alpha 2/5: the 3rd of .7 .8 .9 1 is .9; of .95 no class stays below, and the set is empty.
    split, sure = first([0.9, 0.8, 0.7, 0.6], [0, 0, 0, 1]), first([0.95], [0])
    found = measured({"validation": split, "test": sure}, alpha=0.4, score="aps")
    assert found.values["threshold"] == pytest.approx(0.9)
    assert found.values["set_size_test"] == 0.0
    assert found.values["coverage_test"] == 0.0


def test_a_set_that_holds_nothing_and_one_that_holds_all() -> None:
    likely, labels = np.array([[0.6, 0.4], [0.8, 0.2]]), np.array([0, 1])
    assert coverage_and_size(Sets("lac", -math.inf).of(likely), labels) == (0.0, 0.0)
    assert coverage_and_size(Sets("lac", 0.4).of(likely), labels) == (0.5, 1.0)
    assert coverage_and_size(Sets("lac", math.inf).of(likely), labels) == (1.0, 2.0)


# Identity


def test_no_prediction_is_changed() -> None:
    split = drawn(1, 100)
    before = split.logits.copy()
    found = measured({"validation": split, "test": drawn(2, 100)})
    assert found.scale is None
    assert found.shift is None
    assert found.sets is not None and not found.changes
    assert np.array_equal(split.logits, before)


# Invariants


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60), st.sampled_from([0.05, 0.1, 0.3]), st.sampled_from(["lac", "aps"]))
def test_on_the_rows_of_the_threshold_the_coverage_is_at_least_what_was_asked(
    seed: int, rows: int, alpha: float, score: Literal["lac", "aps"]
) -> None:
    found = measured({"validation": drawn(seed, rows)}, alpha, score)
    assert found.values["coverage_validation"] >= 1 - alpha - 1e-12
    assert 0 < found.values["set_size_validation"] <= 4
    stricter = measured({"validation": drawn(seed, rows)}, alpha / 2, score)
    assert stricter.values["threshold"] >= found.values["threshold"]
    assert stricter.values["set_size_validation"] >= found.values["set_size_validation"]


# Conformance


def test_it_keeps_the_contract() -> None:
    from luthier.testing import check_ingredient

    check_ingredient(Conformal(alpha=0.2, score="aps"))


def test_it_claims_nothing() -> None:
    assert Conformal().touches() == ()


@pytest.mark.parametrize("values", [{"alpha": 0.0}, {"alpha": 1.0}, {"alpha": math.nan}, {"score": "raps"}])
def test_values_that_mean_nothing_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(values))):
        Conformal(**values)


# It matters


@pytest.mark.parametrize("score", ["lac", "aps"])
def test_new_rows_are_covered_as_promised_by_a_model_that_is_far_too_sure(score: Literal["lac", "aps"]) -> None:
    # 500 validation rows: coverage deviates by .013, and by .003 more on 10 000 new rows; four of these are .055.
    found = measured({"validation": drawn(3, 500), "test": drawn(4, 10_000)}, score=score)
    assert found.values["coverage_test"] == pytest.approx(0.9, abs=0.055)
    # What the model calls 90 % likely does not hold: its winner, of which it is 94 % sure, is right less often.
    test = drawn(4, 10_000)
    assert (test.logits.argmax(axis=1) == test.targets).mean() < 0.85


def test_the_threshold_comes_from_validation_only() -> None:
    validation = drawn(5, 200)
    alone = measured({"validation": validation})
    beside = measured({"test": drawn(6, 300, heat=9.0), "validation": validation, "ood_far": drawn(7, 50, heat=0.1)})
    assert alone.values["threshold"] == beside.values["threshold"]
    assert {"coverage_test", "set_size_test", "coverage_ood_far", "set_size_ood_far"} <= set(beside.values)


def test_sets_grow_where_the_model_is_less_sure() -> None:
    found = measured({"validation": drawn(8, 300), "ood_far": drawn(9, 300, heat=1.0)})
    assert found.values["set_size_ood_far"] > found.values["set_size_validation"]


def test_few_rows_are_told_about_and_too_few_have_full_sets() -> None:
    low, high = coverage_range(49, 0.1)
    notes = measured({"validation": drawn(10, 49)}).notes
    assert f"may be {100 * low:.0f} to {100 * high:.0f} %" in notes[1]
    assert len(measured({"validation": drawn(10, 50)}).notes) == 1
    full = measured({"validation": drawn(10, 8), "test": drawn(11, 20)})
    assert full.values["threshold"] == math.inf
    assert full.values["set_size_test"] == 4.0
    assert full.values["coverage_test"] == 1.0
    assert "8 validation rows are too few for alpha 0.1" in full.notes[1]
    assert measured({"validation": drawn(10, 9)}).values["threshold"] < math.inf


def test_a_split_that_cannot_be_measured_is_passed_over() -> None:
    empty = Outputs(np.zeros((0, 4)), np.zeros(0, dtype=np.int64))
    found = measured({"validation": drawn(12, 60), "test": empty})
    assert "coverage_test" not in found.values


@pytest.mark.parametrize(
    ("outputs", "told"),
    [
        ({"test": drawn(13, 100)}, "needs validation rows"),
        ({"validation": Outputs(np.zeros((60, 1)), np.zeros(60))}, "is for classification"),
        ({"validation": Outputs(np.full((60, 2), np.nan), np.zeros(60, dtype=np.int64))}, "finite"),
    ],
    ids=["no split", "regression", "not finite"],
)
def test_what_cannot_be_measured_is_left_alone_and_told(outputs: Mapping[str, Outputs], told: str) -> None:
    ctx = context()
    assert Conformal().measure(outputs, ctx) is None
    assert told in ctx.notes[0]
