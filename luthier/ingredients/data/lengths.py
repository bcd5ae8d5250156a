"""Lengths: batches of rows of like length, so that less is computed on padding.

Source: sorting by length within random windows is ``group_by_length`` of transformers (``trainer_pt_utils``); a budget
of tokens in place of a number of rows is as in AllenNLP's ``MaxTokensBatchSampler``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field

from luthier.core.claims import Claim, Place, wraps
from luthier.core.context import Context
from luthier.core.ingredient import Ingredient, ingredient
from luthier.core.seeds import generator
from luthier.core.stream import Batches, Stream

_WINDOW = 50  # batches


def filled(rows: Iterable[int], lengths: Sequence[int], max_tokens: int) -> Batches:
    """Cuts ``rows`` in their order into batches that hold as many rows as fit: rows x longest <= ``max_tokens``.

    Args:
        rows: row numbers.
        lengths: tokens in each row of the data.
        max_tokens: tokens of a padded batch; a row that is longer makes a batch of its own.
    """
    batches: Batches = []
    longest = 0
    for row in rows:
        longest = max(longest, lengths[row])
        if batches and (len(batches[-1]) + 1) * longest <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
            longest = lengths[row]
    return batches


def cut(rows: Sequence[int], sizes: Iterable[int]) -> Batches:
    """Cuts ``rows`` in their order into batches of the given sizes."""
    batches, at = [], 0
    for size in sizes:
        batches.append(list(rows[at : at + size]))
        at += size
    return batches


def padded(batches: Iterable[Sequence[int]], lengths: Sequence[int]) -> int:
    """Tokens that are computed when each batch is padded to its longest row."""
    return sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)


def usual(batches: int) -> int:
    """Batches that are sorted together when nobody says how many: 50, at most a quarter of an epoch's ``batches``, at least 1."""
    return min(_WINDOW, max(1, batches // 4))


@dataclass(frozen=True)
class Alike:
    """Batches of rows of like length: the batches of each window of ``inner``, sorted, cut anew, shuffled.

    Args:
        inner: gives the rows of each epoch, shuffled.
        window: batches of ``inner`` whose rows are sorted together; None as ``Lengths`` says.
        max_tokens: tokens of a padded batch; None = as many rows as ``inner`` has.
        seed: names the order of the batches, with ``key``.
        key: the stage and the ingredient.
    """

    inner: Stream
    window: int | None
    max_tokens: int | None
    seed: int
    key: str

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.inner.lengths

    @property
    def rows(self) -> tuple[int, ...]:
        return self.inner.rows

    @property
    def spare(self) -> tuple[int, ...]:
        return self.inner.spare

    def of(self, rows: tuple[int, ...]) -> Alike:
        return replace(self, inner=self.inner.of(rows))

    @property
    def batch_size(self) -> int:
        """Rows in one optimizer step, as the stage says; with ``max_tokens`` the steps differ from it."""
        return self.inner.batch_size

    def count(self, number: int) -> int:
        return self.inner.count(number) if self.max_tokens is None else len(self.epoch(number))

    def epoch(self, number: int) -> Batches:
        batches = self.inner.epoch(number)
        draw = generator(self.seed, self.key, "batches", number)
        made: Batches = []
        width = self.window or usual(len(batches))
        for at in range(0, len(batches), width):
            window = batches[at : at + width]
            rows = sorted((row for batch in window for row in batch), key=lambda row: self.lengths[row])
            if self.max_tokens is not None:
                made.extend(filled(rows, self.lengths, self.max_tokens))
            else:  # sizes in random order, so that a smaller last batch is not always of the longest rows
                sizes = [len(window[place]) for place in torch.randperm(len(window), generator=draw).tolist()]
                made.extend(cut(rows, sizes))
        return [made[place] for place in torch.randperm(len(made), generator=draw).tolist()]


@ingredient
class Lengths(Ingredient):
    """Puts rows of like length together; every row still comes once an epoch.

    Args:
        window: batches that are sorted together; 1 leaves the batches as they are (unless there is a budget). None: 50, but at most a
            quarter of an epoch's, so that with few rows each still meets others in other epochs.
        max_tokens: a batch holds as many rows as fit, rows x longest <= this many tokens, instead of the stage's
            ``batch_size``; a longer row makes a batch of its own, and a note says so.
    Differs: transformers puts the longest row first and keeps the windows' descending order; here batches are shuffled
        over the epoch, so that the length says nothing about the time.
    """

    window: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None

    def touches(self) -> tuple[Claim, ...]:
        return (wraps(Place.BATCHES),)

    def batches(self, stream: Stream, ctx: Context) -> Stream:
        if self.max_tokens is None:
            return stream if self.window == 1 else Alike(stream, self.window, None, ctx.seed, ctx.key)
        over = [length for length in stream.lengths if length > self.max_tokens]
        if over:
            rows = "1 row has" if len(over) == 1 else f"{len(over)} rows have"
            ctx.note(
                f"{rows} more tokens than lengths.max_tokens = {self.max_tokens} (the longest {max(over)}); "
                "each makes a batch of its own."
            )
        return Alike(stream, self.window, self.max_tokens, ctx.seed, ctx.key)
