"""What a run says while it goes: lines, and progress with an end in sight. The engine speaks; the command line decides how it sounds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol


class Bar(Protocol):
    """Something long that is under way."""

    def advance(self, by: int = 1, *, say: str = "") -> None: ...


class Narrator(Protocol):
    """Where the engine's words go."""

    def line(self, text: str = "") -> None: ...

    def show(self, thing: Any) -> None:
        """A plan or a report, drawn as fits the place."""
        ...

    def bar(self, label: str, total: int) -> Any:
        """A context that gives a Bar of ``total`` units."""
        ...

    def live(self, make: Callable[[], Any]) -> AbstractContextManager[None]:
        """While open, what ``make`` gives is shown and kept up to date, where the place can do that."""
        ...


class Silent:
    """Says nothing."""

    def line(self, text: str = "") -> None:
        pass

    def show(self, thing: Any) -> None:
        pass

    def advance(self, by: int = 1, *, say: str = "") -> None:
        pass

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Bar]:
        yield self

    def live(self, make: Callable[[], Any]) -> AbstractContextManager[None]:
        return nullcontext()


class _Lines:
    """Progress as plain lines, at most one every ``every`` seconds, with the time that is left."""

    def __init__(self, label: str, total: int, every: float) -> None:
        self._label, self._total, self._every = label, total, every
        self._done, self._begun = 0, time.monotonic()
        self._said = self._begun

    def advance(self, by: int = 1, *, say: str = "") -> None:
        self._done += by
        now = time.monotonic()
        if now - self._said >= self._every and self._done:
            self._said = now
            left = (now - self._begun) / self._done * (self._total - self._done)
            print(
                f"{self._label}: {self._done}/{self._total}, {left:.0f} s left{', ' + say if say else ''}", flush=True
            )


class Plain:
    """Lines on standard output; progress every few seconds. For pipes, files and batch queues."""

    def __init__(self, every: float = 10.0) -> None:
        self._every = every

    def line(self, text: str = "") -> None:
        print(text, file=sys.stdout, flush=True)

    def show(self, thing: Any) -> None:
        self.line(str(thing))

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Bar]:
        yield _Lines(label, total, self._every)

    def live(self, make: Callable[[], Any]) -> AbstractContextManager[None]:
        return nullcontext()
