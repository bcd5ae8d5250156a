"""Being asked to stop while runs of a comparison are made."""

from __future__ import annotations

from contextlib import AbstractContextManager

from luthier.signals import answered

GOES_ON = "stopped on request; the same command goes on from there"


def interruptible() -> AbstractContextManager[None]:
    """Inside, Ctrl-C and SIGTERM raise KeyboardInterrupt; a run that is under way answers them itself, and saves first."""
    return answered(_interrupt)


def _interrupt() -> None:
    raise KeyboardInterrupt
