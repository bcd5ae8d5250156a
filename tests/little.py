"""A little job that takes a second: sixty sentences of two classes, a tiny BERT on disk, and recipes of a few steps."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file

from luthier.narrate import Silent
from luthier.recipe.recipe import Recipe
from luthier.recipe.text import build
from tests.tinyfolder import WORDS, tiny_folder

GOOD, BAD = ("good", "fine", "great"), ("bad", "awful", "poor")


def sentences(rows: int = 60, *, classes: Sequence[str] = ("good", "bad"), seed: int = 0) -> pd.DataFrame:
    """Sentences whose words tell their class; lengths differ."""
    draw = random.Random(seed)
    told: list[tuple[str, str]] = []
    seen: set[str] = set()
    while len(told) < rows:
        label = classes[len(told) % len(classes)]
        words = draw.choices(GOOD if label == "good" else BAD, k=2) + draw.choices(WORDS[6:], k=draw.randint(2, 9))
        draw.shuffle(words)
        text = " ".join(words)
        if text not in seen:
            seen.add(text)
            told.append((text, label))
    return pd.DataFrame(told, columns=["text", "label"])


def model(path: Path, **kinds: Any) -> Path:
    """The tiny model on disk, made once a path."""
    return path if path.exists() else tiny_folder(path, **kinds)


def recipe(ingredients: Sequence[Any], *, steps: int = 6, probe: bool = False, **stage: Any) -> Recipe:
    """One stage of ``steps`` steps, after a solved probe where that is asked."""
    first = {"name": "probe", "solver": "exact", "ingredients": [{"freeze": {"keep": ["head"]}}]}
    main = {"name": "finetune", "steps": steps, "lr": 1e-3, "batch_size": 8, "ingredients": list(ingredients), **stage}
    return build({"name": "little", "max_length": 16, "stages": ([first] if probe else []) + [main]}, inside="a test")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights a run saved."""
    return load_file(folder / "model" / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Counts(Silent):
    """Counts what a run says: its lines and its units of progress."""

    def __init__(self) -> None:
        self.said = 0

    def line(self, text: str = "") -> None:
        self.said += 1

    def advance(self, by: int = 1, *, say: str = "") -> None:
        self.said += 1


class Asks(Silent):
    """Asks the run to stop at a step, as Ctrl-C does."""

    def __init__(self, step: int = 1) -> None:
        self._left = step

    def advance(self, by: int = 1, *, say: str = "") -> None:
        self._left -= say.startswith("loss")
        if self._left == 0:
            signal.raise_signal(signal.SIGINT)


class KillsItself(Silent):
    """Kills its own process, as SIGKILL does, when the run has said ``after`` things."""

    def __init__(self, after: int) -> None:
        self._left = after

    def _count(self) -> None:
        self._left -= 1
        if self._left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def line(self, text: str = "") -> None:
        self._count()

    def advance(self, by: int = 1, *, say: str = "") -> None:
        self._count()


def in_a_child(work: Callable[[], Any]) -> int:
    """Runs ``work`` in a forked process; gives the signal that ended it, or 0."""
    return ended(forked(work))


def forked(work: Callable[[], Any]) -> int:
    """Starts ``work`` in a forked process, from the main thread: a fork clears up what is local to all other threads."""
    assert threading.current_thread() is threading.main_thread()
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(3)
        os._exit(0)
    return child


def ended(child: int) -> int:
    """Waits for a process that ``forked`` gave; gives the signal that ended it, or 0."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    assert os.WEXITSTATUS(status) == 0, "the child failed by itself"
    return 0
