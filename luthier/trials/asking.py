"""Being asked to stop: Ctrl-C, and SIGTERM, which is how schedulers say it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

GOES_ON = "stopped on request; the same command goes on from there"


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, both signals raise KeyboardInterrupt; a run that is under way has handlers of its own, and saves first."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, interrupt)
    except ValueError:
        pass  # not the main thread: signals are the caller's
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
