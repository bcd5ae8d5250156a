from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luthier.sources.data import Split
from luthier.sources.text import Encoded, collate, encode, lengths
from tests.tinyfolder import tiny_tokenizer

TOKENIZER = tiny_tokenizer(
    ["w", "x", "y", "z"]
)  # [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, then w 5, x 6, y 7, z 8


def rows(*ids: list[int], targets: list[int] | None = None) -> Encoded:
    arrays = tuple(np.array(row, dtype=np.int32) for row in ids)
    labels = None if targets is None else np.array(targets)
    return Encoded(arrays, None, tuple(len(row) for row in ids), 0, labels)


def test_one_text_and_a_pair_by_hand() -> None:
    one = encode(TOKENIZER, Split(("w x",)), max_length=9)
    assert one.input_ids[0].tolist() == [2, 5, 6, 3]
    two = encode(TOKENIZER, Split(("w x",), ("y",)), max_length=9)
    assert two.input_ids[0].tolist() == [2, 5, 6, 3, 7, 3]
    assert two.type_ids is not None
    assert two.type_ids[0].tolist() == [0, 0, 0, 0, 1, 1]


def test_only_rows_that_were_cut_are_counted() -> None:
    # With [CLS] and [SEP] the three are 4, 5 and 6 long; at most 5 fit, so one is cut, and the one of exactly 5 is not.
    split = Split(("w x", "w x y", "w x y z"))
    encoded = encode(TOKENIZER, split, max_length=5)
    assert (encoded.lengths, encoded.truncated) == ((4, 5, 5), 1)
    assert lengths(TOKENIZER, split) == (4, 5, 6)


def test_the_longer_text_of_a_pair_is_cut_first() -> None:
    encoded = encode(TOKENIZER, Split(("w w w w",), ("x",)), max_length=6)
    assert encoded.input_ids[0].tolist() == [2, 5, 5, 3, 6, 3]
    assert encoded.truncated == 1


def test_a_model_without_token_types_gets_none() -> None:
    tokenizer = tiny_tokenizer(["w"])
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    encoded = encode(tokenizer, Split(("w",), ("w",)), max_length=9)
    assert encoded.type_ids is None
    assert set(collate(encoded, [0], pad_id=0)) == {"input_ids", "attention_mask"}


def test_collate_by_hand_pads_on_the_right_in_the_order_asked() -> None:
    batch = collate(rows([2, 3], [2, 5, 3], [2, 5, 6, 3], targets=[7, 8, 9]), [1, 0], pad_id=1)
    assert batch["input_ids"].tolist() == [[2, 5, 3], [2, 3, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [8, 7]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_batch_is_its_own_copy() -> None:
    encoded = rows([2, 5, 3], targets=[1])
    batch = collate(encoded, [0], pad_id=0)
    batch["input_ids"].zero_()
    batch["labels"].zero_()
    assert encoded.input_ids[0].tolist() == [2, 5, 3]
    assert encoded.targets is not None
    assert encoded.targets.tolist() == [1]


@given(st.lists(st.lists(st.sampled_from("wxyz"), min_size=1, max_size=9), min_size=1, max_size=6))
def test_a_batch_equals_the_tokenizer_s_own_padding(words: list[list[str]]) -> None:
    texts = [" ".join(row) for row in words]
    ours = collate(encode(TOKENIZER, Split(tuple(texts)), max_length=7), range(len(texts)), pad_id=0)
    cut = TOKENIZER(texts, truncation=True, max_length=7)
    theirs = TOKENIZER.pad(cut, return_tensors="pt")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_encode_is_told_of_targets_stays_with_the_rows() -> None:
    encoded = encode(TOKENIZER, Split(("w", "x")), np.array([0.5, 1.5], dtype=np.float32), max_length=9)
    assert collate(encoded, [1], pad_id=0)["labels"].tolist() == [1.5]
    assert len(encoded) == 2


def test_rows_outside_are_refused() -> None:
    with pytest.raises(IndexError):
        collate(rows([2, 3]), [1], pad_id=0)


def test_taken_rows_keep_their_targets_and_types() -> None:
    encoded = encode(TOKENIZER, Split(("w", "x y", "z"), ("x", "x", "x")), np.array([7, 8, 9]), max_length=9)
    taken = encoded.take([2, 0])
    assert [row.tolist() for row in taken.input_ids] == [[2, 8, 3, 6, 3], [2, 5, 3, 6, 3]]
    assert taken.type_ids is not None
    assert (len(taken.type_ids), taken.lengths) == (2, (5, 5))
    assert taken.targets is not None
    assert taken.targets.tolist() == [9, 7]
