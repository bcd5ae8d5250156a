from __future__ import annotations

from collections import Counter

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import DataError
from luthier.sources.data import read
from luthier.sources.splitting import divide, quotas

TENTHS = {"validation": 0.1, "test": 0.1}


def frame(labels: list[object]) -> pd.DataFrame:
    return pd.DataFrame({"text": [f"text {i}" for i in range(len(labels))], "label": labels})


def test_quotas_by_hand() -> None:
    # 7 of 26 places over sizes 13, 8, 5: exact shares 3.5, 2.154, 1.346; floors 3, 2, 1; the seventh goes to .5.
    assert quotas([13, 8, 5], 7, [13, 8, 5]) == [4, 2, 1]
    # The first has no room for more than 3, so the place goes to the next largest remainder, .346.
    assert quotas([13, 8, 5], 7, [3, 8, 5]) == [3, 2, 2]


def test_one_file_is_split_80_10_10_with_each_class_in_exact_share() -> None:
    data = read(frame(["a"] * 60 + ["b"] * 30 + ["c"] * 10))
    counts = {name: Counter(split.labels) for name, split in data.splits.items()}
    assert counts == {
        "train": {"a": 48, "b": 24, "c": 8},
        "validation": {"a": 6, "b": 3, "c": 1},
        "test": {"a": 6, "b": 3, "c": 1},
    }
    assert "split: train 80 %, validation 10 %, test 10 %, stratified by label, seed 0" in data.notes


def test_the_seed_alone_decides_the_split() -> None:
    rows = frame(["a", "b"] * 50)
    assert read(rows, seed=3).digest == read(rows, seed=3).digest
    assert read(rows, seed=3).digest != read(rows, seed=4).digest


def test_numbers_are_split_at_random() -> None:
    data = read(frame([i / 7 for i in range(100)]))
    assert [len(split) for split in data.splits.values()] == [80, 10, 10]
    assert any("at random, seed 0" in note for note in data.notes)


def test_a_class_too_rare_for_three_splits_stays_in_train_and_is_said() -> None:
    data = read(frame(["a"] * 50 + ["b"] * 48 + ["rare"] * 2))
    assert Counter(data.splits["train"].labels)["rare"] == 2
    assert "validation: no rows of rare: too few to be in every split" in data.notes
    assert "test: no rows of rare: too few to be in every split" in data.notes


def test_classes_of_two_rows_stay_whole_even_when_they_are_many() -> None:
    # 25 classes of 2 and one of 50: by share alone each rare one has 0.2 of a place, and the first five would get one.
    data = read(frame(["common"] * 50 + [f"rare {i}" for i in range(25)] * 2))
    assert set(data.splits["validation"].labels or ()) == set(data.splits["test"].labels or ()) == {"common"}
    assert len(data.splits["validation"]) == 10


def test_rows_remember_their_place_in_the_source() -> None:
    data = read(frame(["a", "b"] * 20))
    told = {text: row for split in data.splits.values() for text, row in zip(split.texts, split.rows, strict=True)}
    assert told == {f"text {i}": i + 1 for i in range(40)}


def test_too_few_rows_to_split_is_refused() -> None:
    with pytest.raises(DataError, match="train  must have more rows to be split; got 5"):
        read(frame(["a", "b", "a", "b", "a"]))


@given(st.lists(st.sampled_from("abcde"), min_size=30, max_size=200), st.integers(0, 9))
def test_every_row_is_in_one_split_and_every_class_in_train(labels: list[str], seed: int) -> None:
    divided, _ = divide(labels, TENTHS, stratify=True, seed=seed)
    assert sorted(row for rows in divided.values() for row in rows) == list(range(len(labels)))
    assert {labels[row] for row in divided["train"]} == set(labels)


@given(st.lists(st.integers(30, 90), min_size=1, max_size=6), st.integers(0, 9))
def test_each_class_is_within_one_row_of_its_share(sizes: list[int], seed: int) -> None:
    labels = [str(i) for i, size in enumerate(sizes) for _ in range(size)]
    divided, _ = divide(labels, TENTHS, stratify=True, seed=seed)
    total = round(0.1 * len(labels))
    for name in TENTHS:
        counts = Counter(labels[row] for row in divided[name])
        assert sum(counts.values()) == total
        assert all(abs(counts[str(i)] - size * total / len(labels)) < 1 for i, size in enumerate(sizes))
