"""Named random streams: one number, and a name for each use, give a seed of their own.

The head's start, the order of the data, dropout and every ingredient draw from streams that do not know of each other, so that
none of them moves when another draws more. Nothing here touches a global generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive(seed: int, *names: str | int) -> int:
    """A seed in [0, 2**63) for the stream called ``names`` of ``seed``.

    >>> derive(0, "head") == derive(0, "head"), derive(0, "head") == derive(1, "head")
    (True, False)
    """
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on ``device`` at the start of the stream called ``names``."""
    return torch.Generator(device=device).manual_seed(derive(seed, *names))


@contextmanager
def borrowed(seed: int, *names: str | int) -> Iterator[None]:
    """Code that can only draw from torch's global generator draws from the named stream; the global state is put back."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive(seed, *names))
        yield


def reseed(seed: int, device: torch.device) -> None:
    """Sets the global generator that a forward pass on ``device`` draws from.

    ``torch.manual_seed`` does so for every kind of device, and keeps a stack trace for each that has not begun: a millisecond a call.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
