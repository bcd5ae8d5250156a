"""Named random streams: one number, and a name for each use, give a seed of their own.

The head's start, the order of the data, dropout and every ingredient draw from streams that do not know of each other, so that
none of them moves when another draws more. Nothing here touches a global generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
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
    put_back = remembered(torch.device("cuda", at) for at in range(torch.cuda.device_count()))
    try:
        torch.manual_seed(derive(seed, *names))
        yield
    finally:
        put_back()


def remembered(devices: Iterable[torch.device]) -> Callable[[], None]:
    """Remembers where the global generators stand, the processor's and those of the CUDA ``devices``; each call of what it gives puts
    them back there. They are set, never drawn from."""
    state = torch.get_rng_state()
    numbers = sorted({_number(device) for device in devices if device.type == "cuda"})
    states = [(number, torch.cuda.get_rng_state(number)) for number in numbers]

    def put_back() -> None:
        torch.set_rng_state(state)
        for number, one in states:
            torch.cuda.set_rng_state(one, number)

    return put_back


def reseed(seed: int, device: torch.device) -> None:
    """Sets the global generator that a forward pass on ``device`` draws from.

    ``torch.manual_seed`` does so for every kind of device, and keeps a stack trace for each that has not begun: a millisecond a call.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[_number(device)].manual_seed(seed)


def _number(device: torch.device) -> int:
    """Which CUDA device it is; plain ``cuda`` is the current one."""
    return torch.cuda.current_device() if device.index is None else device.index
