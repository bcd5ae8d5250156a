from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import DataError
from luthier.sources.data import Data, read
from luthier.sources.splitting import divide, quotas
from luthier.training.job import prepare
from tests.little import recipe, sentences

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


def copied(texts: int, copies: int) -> pd.DataFrame:
    """Each text ``copies`` times, far apart, every second one with white space behind."""
    return pd.DataFrame(
        {
            "text": [f"text {i}" + " " * (k % 2) for k in range(copies) for i in range(texts)],
            "label": ["ab"[i % 2] for _ in range(copies) for i in range(texts)],
        }
    )


def torn(data: Data) -> int:
    """Texts that are in more than one split."""
    where = Counter(text for split in data.splits.values() for text in {key for key, _ in split.contents()})
    return sum(many > 1 for many in where.values())


def test_copies_of_a_text_are_in_one_split_and_the_shares_stay() -> None:
    data = read(copied(100, 3))
    assert torn(data) == 0
    counts = {name: Counter(split.labels) for name, split in data.splits.items()}
    assert counts == {"train": {"a": 120, "b": 120}, "validation": {"a": 15, "b": 15}, "test": {"a": 15, "b": 15}}
    assert "copies: 200 of 300 rows repeat another's text, and are in its split" in data.notes


def test_copies_of_a_pair_stay_together_and_one_text_with_two_pairs_need_not() -> None:
    rows = copied(100, 2).assign(text="one text for all", text2=copied(100, 2)["text"])
    data = read(rows)
    assert len(data.splits["test"]) == 20
    found = [set(split.contents()) for split in data.splits.values()]
    assert sum(map(len, found)) == len(set().union(*found)) == 100


def test_copies_of_numbers_stay_together_in_a_tenth_of_train() -> None:
    rows = copied(60, 2).assign(label=[i / 7 for i in range(120)])
    data = read({"train": rows, "test": frame([0.5, 1.5]).assign(text=["other", "another"])})
    assert torn(data) == 0
    assert [len(split) for split in data.splits.values()] == [108, 12, 2]


def test_a_text_with_more_copies_than_a_share_has_rows_stays_in_train() -> None:
    rows = pd.concat([frame(["a", "b"] * 50), pd.DataFrame({"text": ["ok"] * 40, "label": ["a"] * 40})])
    for seed in range(20):
        data = read(rows, seed=seed)
        assert data.splits["train"].texts.count("ok") == 40
        assert len(data.splits["test"]) == 10


def test_too_few_texts_to_split_are_refused_however_often_they_stand_there() -> None:
    with pytest.raises(DataError, match="train  must have more rows to be split; got 20, 16 of them copies"):
        read(copied(4, 5))


def test_rows_without_copies_are_split_as_before_copies_were_kept_together() -> None:
    """Digests of what the first version drew, before ``divide`` knew of copies."""

    def told(labels: list[object], shares: dict[str, float], *, stratify: bool, seed: int) -> str:
        divided, _ = divide(
            labels, shares, stratify=stratify, seed=seed, keys=[("text", i) for i in range(len(labels))]
        )  # type: ignore[arg-type]
        return hashlib.sha256(json.dumps(divided).encode()).hexdigest()[:12]

    assert told([str(i * i % 7) for i in range(500)], TENTHS, stratify=True, seed=0) == "e701aa7d4bad"
    assert told([i * i % 7 for i in range(97)], {"validation": 0.1}, stratify=True, seed=3) == "20b2c685438e"
    assert told(["abc"[i % 3] for i in range(40)] + ["d", "d", "e"], TENTHS, stratify=True, seed=5) == "beef018a0ed1"
    assert told([i / 7 for i in range(101)], TENTHS, stratify=False, seed=1) == "8e6af01a6c39"
    assert read(frame(["ab"[i * i % 3 % 2] for i in range(103)]), seed=2).digest.startswith("e94b021fa45e")
    assert read(frame([i % 5 for i in range(60)]), seed=2).digest.startswith("56aefd1fd0f0")
    assert read(frame([i / 7 for i in range(60)]), seed=2).digest.startswith("d733d815dbc9")


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 40)), min_size=30, max_size=200), st.integers(0, 9))
def test_whatever_is_copied_every_row_is_in_one_split_and_every_class_in_train(
    rows: list[tuple[str, int]], seed: int
) -> None:
    labels, keys = [label for label, _ in rows], [key for _, key in rows]
    divided, _ = divide(labels, TENTHS, stratify=True, seed=seed, keys=keys)
    assert sorted(row for one in divided.values() for row in one) == list(range(len(rows)))
    assert {labels[row] for row in divided["train"]} == set(labels)
    assert sum(len({keys[row] for row in one}) for one in divided.values()) == len(set(keys))


def test_labels_with_decimals_are_stratified_where_the_task_is_told() -> None:
    rows = frame([0.0] * 90 + [1.0] * 10)
    data = read(rows, task="classification")
    counts = [Counter(split.labels) for split in data.splits.values()]
    assert counts == [{0.0: 72, 1.0: 8}, {0.0: 9, 1.0: 1}, {0.0: 9, 1.0: 1}]
    assert any("at random" in note for note in read(rows).notes)


def test_a_run_s_task_decides_how_its_rows_are_drawn(tiny_model: Path) -> None:
    rows = sentences(60).replace({"label": {"good": 1.0, "bad": 0.0}})
    source = {"train": rows.assign(label=rows["label"].astype(float))}
    known = dataclasses.replace(recipe(["adamw"]), task="classification")
    job = prepare(known, model=tiny_model, data_source=source)
    assert any("stratified by label" in note for note in job.data.notes)
