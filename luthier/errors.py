"""The errors a user meets: where it is, what must hold, what came, what to do.

Every error carries its faults, so that a recipe with three mistakes is told about three, not about the first.
``exit_code`` is what the command line returns: 2 = refused before anything ran, 1 = failed in the run.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Args:
        where: a path a user can find, such as ``stages[1].ingredients[0].llrd.decay`` or ``train.csv, row 12``.
        must: what must hold, as the rest of a sentence: ``must be in (0, 1]``.
        got: what came instead; empty where there is nothing to show.
        do: what to do about it; empty where ``must`` says it all.
    """

    where: str
    must: str
    got: str = ""
    do: str = ""

    def __str__(self) -> str:
        said = f"{self.must}; got {self.got}." if self.got else f"{self.must}."
        return "  ".join(part for part in (self.where, said, self.do) if part)


class LuthierError(Exception):
    """Something a user can mend. ``str(error)`` is the whole message; no traceback is needed to act on it.

    Args:
        message: the first line, or all there is.
        faults: one line each below it.
    """

    exit_code = 2

    def __init__(self, message: str, faults: Iterable[Fault] = ()) -> None:
        self.faults: tuple[Fault, ...] = tuple(faults)
        super().__init__("\n  ".join([message, *map(str, self.faults)]))

    @classmethod
    def of(cls, faults: Iterable[Fault], inside: str) -> Self:
        """The error that tells all ``faults`` found ``inside`` (a file, a folder, a recipe's name) at once."""
        told = tuple(faults)
        return cls(f"{len(told)} {'fault' if len(told) == 1 else 'faults'} in {inside}", told)


class RecipeError(LuthierError):
    """A recipe, or one ingredient's values, cannot be what was meant."""


class ConflictError(LuthierError):
    """Two parts of a recipe cannot work together, or one of them would do nothing."""


class DataError(LuthierError):
    """The data cannot be read, or cannot be learned from as it is."""


class ModelError(LuthierError):
    """The model cannot be loaded, or its parts cannot be told apart."""


class MissingExtra(LuthierError):
    """An optional package is not installed; the message names the extra that brings it."""


class RunError(LuthierError):
    """The run began and could not go on; what it had saved is still there."""

    exit_code = 1


class CheckpointError(RunError):
    """A checkpoint is torn, or belongs to another run."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``Did you mean 'swa'?`` when one of ``known`` is close to ``word``, else an empty string.

    >>> did_you_mean("swaa", ["swa", "llrd"])
    "Did you mean 'swa'?"
    >>> did_you_mean("zzz", ["swa", "llrd"])
    ''
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"Did you mean {close[0]!r}?" if close else ""
