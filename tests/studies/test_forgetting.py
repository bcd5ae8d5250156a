"""Forgetting: counts, p and text by hand; which split is the general one; what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import DataError
from luthier.studies.forgetting import change, general_of, study

Found = list[int]


def logits(found: Found, *, sure: float = 2.0) -> np.ndarray:
    """Two classes; the found one is ``sure`` nats ahead."""
    return np.eye(2)[found] * sure


TRUE = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
BEFORE = [0, 0, 0, 0, 0, 1, 1, 1, 0, 0]  # right but for the last two
AFTER = [1, 1, 1, 1, 0, 0, 1, 1, 1, 0]  # rows 0 to 3 and 5 are lost, row 8 is won


def test_by_hand_what_is_forgotten_and_learned() -> None:
    found = change("test", logits(BEFORE), logits(AFTER), TRUE)
    assert (found.right_before, found.right_after, found.rows) == (8, 4, 10)
    assert (found.accuracy_before, found.accuracy_after) == (0.8, 0.4)
    assert (found.forgotten, found.learned) == ((0, 1, 2, 3, 5), (8,))
    # 5 of 6 changed rows went one way: 2 (1 + 6) / 2^6 = 14 / 64
    assert found.p == pytest.approx(14 / 64, abs=1e-15)


def test_by_hand_nll() -> None:
    # a right row costs ln(1 + e^-2), a wrong one 2 more: means over 8 and 2 rows before, 4 and 6 after
    found = change("test", logits(BEFORE), logits(AFTER), TRUE)
    right = math.log1p(math.exp(-2))
    assert found.nll_before == pytest.approx(right + 0.2 * 2, rel=1e-14)
    assert found.nll_after == pytest.approx(right + 0.6 * 2, rel=1e-14)


def test_a_model_against_itself_forgets_and_learns_nothing() -> None:
    found = change("test", logits(BEFORE), logits(BEFORE), TRUE)
    assert (found.forgotten, found.learned, found.p) == ((), (), 1.0)
    assert found.nll_before == found.nll_after


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40))
def test_rows_add_up_and_the_way_back_is_the_mirror(rows: list[tuple[int, int, int]]) -> None:
    one, other, true = (np.array(column) for column in zip(*rows, strict=True))
    there, back = change("x", logits(one), logits(other), true), change("x", logits(other), logits(one), true)
    assert there.right_after == there.right_before - len(there.forgotten) + len(there.learned)
    assert not set(there.forgotten) & set(there.learned)
    assert (there.forgotten, there.learned) == (back.learned, back.forgotten)
    assert there.p == back.p and 0 < there.p <= 1


def test_the_general_split_is_every_shifted_test_else_test_else_what_there_is() -> None:
    assert general_of(["validation", "test", "ood_a", "ood_b"], None) == ["ood_a", "ood_b"]
    assert general_of(["validation", "test"], None) == ["test"]
    assert general_of(["validation"], None) == ["validation"]


def test_the_general_split_can_be_named_with_and_without_its_prefix() -> None:
    splits = ["validation", "test", "ood_a", "ood_b"]
    assert general_of(splits, "b") == general_of(splits, "ood_b") == ["ood_b"]
    assert general_of(splits, "validation") == ["validation"]
    with pytest.raises(
        DataError, match=r"--general  must be a split that is held out; got c.  There are: validation, test, a, b"
    ):
        general_of(splits, "c")


def both(since: str = "finetune", **more):
    pair = (logits(BEFORE), logits(AFTER), TRUE)
    return study(
        {"validation": pair[::1], "ood_far": (logits(AFTER), logits(BEFORE), TRUE), "test": pair}, since=since, **more
    )


def test_the_general_split_comes_first_and_is_marked_in_json_and_text() -> None:
    told = both().to_dict()
    assert told["general"] == ["ood_far"]
    assert [one["split"] for one in told["splits"]] == ["ood_far", "validation", "test"]
    assert told["splits"][0]["learned"] == [0, 1, 2, 3, 5] and told["splits"][0]["accuracy_after"] == 0.8
    assert json.loads(json.dumps(told)) == told
    assert both(general="test").to_dict()["general"] == ["test"]


def test_the_text_says_it_in_80_columns() -> None:
    lines = both(notes=["A note that is long. " * 8]).lines()
    assert max(map(len, lines)) <= 80
    # right: ln(1 + e^-2) = 0.127 nats, so 0.527 with two of ten wrong and 1.327 with six; p = 14 / 64 = .219
    assert lines[:4] == [
        "                      rows  accuracy     ->     NLL      -> forgot learned     p",
        "ood_far *               10     0.400  0.800   1.327   0.527      1       5  .219",
        "validation              10     0.800  0.400   0.527   1.327      5       1  .219",
        "test                    10     0.800  0.400   0.527   1.327      5       1  .219",
    ]
    assert lines[5:7] == [
        "ood_far: of 4 rows that were right 1 are wrong now, of 6 that were wrong 5 are",
        "  right now.",
    ]


def test_the_plot_counts_rows_and_is_the_same_bytes_twice() -> None:
    found = both()
    drawn = found.plot()
    assert drawn == found.plot()
    for text in ("ood_far *", "validation", "before", "after", "forgotten", "learned", "5", "1"):
        assert f">{text}</text>" in drawn, text


def test_no_rows_and_no_splits_are_refused() -> None:
    with pytest.raises(DataError, match="must hold out at least one split"):
        study({}, since="finetune")
    with pytest.raises(DataError, match="test  must have at least one row"):
        change("test", np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0, dtype=int))
    with pytest.raises(DataError, match="3 and 10 outputs for 10 rows"):
        change("test", logits(BEFORE)[:3], logits(AFTER), TRUE)
