"""Being asked to stop: Ctrl-C, and SIGTERM, which is how schedulers say it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def answered(ask: Callable[[], None]) -> Iterator[None]:
    """Inside, ``ask`` is called at each of both signals; then they are answered as before. In other threads than the main one they
    are the caller's, and nothing happens; so is a signal that a program around Python answers, whose answer could not be put back."""
    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not None:
                before[number] = signal.signal(number, lambda number, frame: ask())
    except ValueError:
        pass  # not the main thread
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
