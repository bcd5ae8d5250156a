"""Lengths: the budget and the windows by hand, every row once an epoch, and the neutral value."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.context import Context, Progress, Shelf
from luthier.core.seeds import generator
from luthier.core.stream import Batches, Shuffled
from luthier.errors import RecipeError
from luthier.ingredients.data.lengths import Alike, Lengths, cut, filled, padded, usual


def context(*, seed: int = 3, key: str = "train/lengths") -> Context:
    nothing: Any = None  # no data schedule reads the model's parts
    return Context(nothing, Progress(0), seed, key, Lengths().touches(), Shelf(), [])


@dataclasses.dataclass(frozen=True)
class Written:
    """A stream whose batches are written down: the same in every epoch."""

    lengths: tuple[int, ...]
    batch_size: int
    written: tuple[tuple[int, ...], ...]

    def count(self, number: int) -> int:
        return len(self.written)

    def epoch(self, number: int) -> Batches:
        return [list(batch) for batch in self.written]


# By hand


def test_a_batch_is_as_large_as_the_budget_allows() -> None:
    # Rows of 2, 3, 4, 5 tokens and a budget of 9: 2 and 3 make 2 x 3 = 6; with the 4 it would be 3 x 4 = 12 > 9, so 4
    # opens the next batch; with the 5 that would be 2 x 5 = 10 > 9, so 5 stands alone.
    assert filled([0, 1, 2, 3], (2, 3, 4, 5), 9) == [[0, 1], [2], [3]]
    # A budget of 12 takes the first three: 3 x 4 = 12, exactly.
    assert filled([0, 1, 2, 3], (2, 3, 4, 5), 12) == [[0, 1, 2], [3]]


def test_a_row_over_the_budget_makes_a_batch_of_its_own_and_the_next_one_starts_afresh() -> None:
    # 20 > 6 stands alone. After it 2 and 3 fit together again: 2 x 3 = 6.
    assert filled([0, 1, 2], (20, 2, 3), 6) == [[0], [1, 2]]


def test_sorting_a_window_takes_the_padding_away() -> None:
    # The card's example. As written, each batch pads a short row to 10: 2 x (2 x 10) = 40 tokens for 24 real ones.
    # Sorted in one window of two batches: 2 x 2 + 2 x 10 = 24.
    stream = Written((2, 10, 2, 10), 2, ((0, 1), (2, 3)))
    assert padded(stream.epoch(0), stream.lengths) == 40
    made = Lengths(window=2).batches(stream, context())
    assert sorted(map(sorted, made.epoch(0))) == [[0, 2], [1, 3]]
    assert padded(made.epoch(0), made.lengths) == 24


def test_windows_are_sorted_apart() -> None:
    # Rows 0 to 3 have 8, 1, 7, 4 tokens and give {1, 3} and {2, 0}; rows 4 to 7 have 6, 2, 5, 3 and give {5, 7} and
    # {6, 4}. In one window of four batches the two shortest, rows 1 and 5, come together.
    stream = Written((8, 1, 7, 4, 6, 2, 5, 3), 2, ((0, 1), (2, 3), (4, 5), (6, 7)))
    narrow = Lengths(window=2).batches(stream, context()).epoch(0)
    assert sorted(map(tuple, narrow)) == [(1, 3), (2, 0), (5, 7), (6, 4)]
    wide = Lengths(window=4).batches(stream, context()).epoch(0)
    assert sorted(map(tuple, wide)) == [(1, 5), (2, 0), (6, 4), (7, 3)]


def test_rows_are_cut_by_the_given_sizes() -> None:
    assert cut([7, 8, 9], [1, 2]) == [[7], [8, 9]]


# Identity


def test_a_window_of_one_batch_without_a_budget_is_the_inner_stream_itself() -> None:
    stream = Shuffled((5, 3, 8), 2, 0)
    assert Lengths(window=1).batches(stream, context()) is stream


# Invariants

ROWS = st.lists(st.integers(1, 40), min_size=1, max_size=60).map(tuple)


@settings(max_examples=60, deadline=None)
@given(
    lengths=ROWS,
    size=st.integers(1, 9),
    window=st.integers(1, 12),
    budget=st.one_of(st.none(), st.integers(1, 120)),
    number=st.integers(0, 5),
)
def test_every_row_comes_exactly_once_an_epoch(
    lengths: tuple[int, ...], size: int, window: int, budget: int | None, number: int
) -> None:
    stream = Lengths(window=window, max_tokens=budget).batches(Shuffled(lengths, size, 0), context())
    batches = stream.epoch(number)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert stream.count(number) == len(batches)
    assert all(batches)
    if budget is not None:
        assert all(len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= budget for batch in batches)
    else:
        assert sorted(map(len, batches)) == sorted(map(len, Shuffled(lengths, size, 0).epoch(number)))


@settings(max_examples=40, deadline=None)
@given(lengths=ROWS, size=st.integers(1, 9))
def test_one_window_never_pads_more_than_the_order_it_was_given(lengths: tuple[int, ...], size: int) -> None:
    # Only where all batches are of one size: a smaller last batch may get other rows than it had.
    lengths = lengths[: max(1, len(lengths) // size) * size] if len(lengths) >= size else lengths
    inner = Shuffled(lengths, size, 0)
    made = Alike(inner, 1000, None, 0, "train/lengths")
    assert padded(made.epoch(0), lengths) <= padded(inner.epoch(0), lengths)


def test_an_epoch_asked_twice_answers_alike_and_epochs_seeds_and_stages_differ() -> None:
    lengths = tuple(range(1, 65))
    stream = Lengths(window=4).batches(Shuffled(lengths, 4, 0), context())
    again = Lengths(window=4).batches(Shuffled(lengths, 4, 0), context())
    assert stream == again
    assert stream.epoch(2) == again.epoch(2)
    assert stream.epoch(0) != stream.epoch(1)
    assert stream.epoch(0) != Lengths(window=4).batches(Shuffled(lengths, 4, 0), context(seed=4)).epoch(0)
    assert stream.epoch(0) != Lengths(window=4).batches(Shuffled(lengths, 4, 0), context(key="other/lengths")).epoch(0)


def test_the_global_generator_is_not_drawn_from() -> None:
    before = torch.random.get_rng_state()
    Lengths(window=2, max_tokens=9).batches(Shuffled((3, 4, 5, 6), 2, 0), context()).epoch(0)
    assert torch.equal(before, torch.random.get_rng_state())


# Parity


def test_the_windows_hold_the_rows_that_transformers_puts_together() -> None:
    # transformers draws the permutation that our inner stream draws, sorts windows of 5 x 4 rows and cuts them. It then
    # swaps the longest row to the very front; that changes nothing here, as the first window holds it.
    from transformers.trainer_pt_utils import get_length_grouped_indices

    order = [row for batch in Shuffled((1,) * 40, 4, 11).epoch(0) for row in batch]
    lengths = tuple(40 - order.index(row) if row == order[0] else 1 + (7 * row) % 37 for row in range(40))
    ours = Alike(Shuffled(lengths, 4, 11), 5, None, 0, "train/lengths").epoch(0)
    theirs = get_length_grouped_indices(list(lengths), 4, 5, generator(11, "order", 0, 0))
    assert {tuple(sorted(lengths[row] for row in batch)) for batch in ours} == {
        tuple(sorted(lengths[row] for row in theirs[at : at + 4])) for at in range(0, 40, 4)
    }


@pytest.mark.parametrize(("rows", "size", "by_hand"), [(200, 16, 3), (1600, 8, 50), (8000, 8, 50), (12, 4, 1)])
def test_without_a_window_it_is_the_one_that_transformers_takes(rows: int, size: int, by_hand: int) -> None:
    # 200 rows of 16 are 12.5 batches, and a quarter of them 3; of 200 and more batches it is 50; never less than one.
    from transformers.trainer_pt_utils import get_length_grouped_indices

    lengths = torch.randint(1, 1000, (rows,), generator=generator(0, "lengths")).tolist()
    theirs, same = (
        get_length_grouped_indices(lengths, size, window, generator(1, "order")) for window in (None, by_hand)
    )
    assert theirs == same
    assert usual(-(-rows // size)) == by_hand


# Conformance


def test_it_keeps_the_contract() -> None:
    from luthier.testing import check_ingredient

    check_ingredient(Lengths(window=2, max_tokens=64))


def test_faults_are_told_with_their_fields() -> None:
    with pytest.raises(RecipeError, match=r"lengths\.window") as told:
        Lengths(window=0, max_tokens=0)
    assert {fault.where for fault in told.value.faults} == {"lengths.window", "lengths.max_tokens"}


# It matters


def test_a_row_over_the_budget_is_told() -> None:
    ctx = context()
    Lengths(max_tokens=10).batches(Shuffled((4, 12, 30), 2, 0), ctx)
    (note,) = ctx.notes
    assert note.startswith("2 rows have more tokens than lengths.max_tokens = 10 (the longest 30)")


@pytest.mark.parametrize(("window", "percent"), [(1, 46), (5, 16), (50, 3)])
def test_wider_windows_leave_less_padding(window: int, percent: int) -> None:
    # The card's numbers: each length from 1 to 128 eight times, in batches of 16.
    lengths = tuple(range(1, 129)) * 8
    stream = Lengths(window=window).batches(Shuffled(lengths, 16, 0), context(seed=0))
    assert round(100 * (1 - sum(lengths) / padded(stream.epoch(0), lengths))) == percent


@pytest.mark.parametrize(("window", "others"), [(1, 156), (50, 29), (None, 94)])
def test_with_few_rows_a_row_still_meets_others(window: int | None, others: int) -> None:
    # The card's numbers: 200 rows of 5 to 40 tokens in batches of 16, 20 epochs.
    draw = random.Random(0)
    lengths = tuple(draw.randint(5, 40) for _ in range(200))
    stream = Lengths(window=window).batches(Shuffled(lengths, 16, 0), context(seed=0, key="k"))
    met: list[set[int]] = [set() for _ in lengths]
    for batch in (batch for number in range(20) for batch in stream.epoch(number)):
        for row in batch:
            met[row] |= {*batch} - {row}
    assert round(sum(map(len, met)) / len(met)) == others


def test_batches_of_like_length_do_not_come_in_the_order_of_their_length() -> None:
    lengths = tuple(range(1, 201))
    batches = Lengths(window=50).batches(Shuffled(lengths, 4, 0), context()).epoch(0)
    longest = [max(lengths[row] for row in batch) for batch in batches]
    assert sorted(longest) == list(range(4, 201, 4))  # one window: the rows are sorted as a whole
    assert longest != sorted(longest)


def test_the_smaller_last_batch_is_not_always_of_the_longest_rows() -> None:
    lengths = tuple(range(1, 10))  # nine rows in twos: one batch of one
    stream = Lengths(window=5).batches(Shuffled(lengths, 2, 0), context())
    alone = {batch[0] for number in range(40) for batch in stream.epoch(number) if len(batch) == 1}
    assert alone == {0, 2, 4, 6, 8}  # each of the five places that the single one can have among the sorted rows
