"""The stream of batches: which rows make each step of each epoch. Rows are numbers; the texts stay where they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from luthier.core.seeds import generator

Batches = list[list[int]]


class Stream(Protocol):
    """A pure function of the epoch: asked twice, it answers alike, so that a run can go on from anywhere."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens in each training row."""
        ...

    @property
    def batch_size(self) -> int:
        """Rows in one optimizer step."""
        ...

    def count(self, number: int) -> int:
        """Optimizer steps in epoch ``number``, found without making it where that is possible."""
        ...

    def epoch(self, number: int) -> Batches:
        """Row numbers of each optimizer step of epoch ``number`` (0-based)."""
        ...


@dataclass(frozen=True)
class Shuffled:
    """Every row once an epoch, in an order drawn anew each epoch; the last step may be smaller.

    Args:
        lengths: tokens in each row.
        batch_size: rows in one optimizer step.
        seed: names the order, with ``stage``.
        stage: number of the stage, so that two stages do not share an order.
    """

    lengths: tuple[int, ...]
    batch_size: int
    seed: int
    stage: int = 0

    def count(self, number: int) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def epoch(self, number: int) -> Batches:
        order = torch.randperm(len(self.lengths), generator=generator(self.seed, "order", self.stage, number)).tolist()
        return [order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size)]
