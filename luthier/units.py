"""Numbers for people, and the memory that was really used."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux


def forget_peak(device: torch.device) -> None:
    """``memory_peak`` counts from here on. Outside Linux a CPU's peak is that of the process since it began."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        with suppress(OSError):
            _CLEAR.write_text("5")


def memory_peak(device: torch.device) -> int:
    """The most memory in use since ``forget_peak``, in bytes: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def count(number: int) -> str:
    """A count with a letter.

    >>> count(950), count(22_700_000), count(1_500)
    ('950', '22.7M', '1.5k')
    """
    for size, letter in ((1_000_000_000, "B"), (1_000_000, "M"), (1_000, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return str(number)


def size(number: int) -> str:
    """Bytes in decimal units.

    >>> size(90_800_000), size(512), size(1_240_000_000)
    ('91 MB', '512 B', '1.2 GB')
    """
    if number >= 1_000_000_000:
        return f"{number / 1e9:.1f} GB"
    if number >= 1_000_000:
        return f"{number / 1e6:.0f} MB"
    return f"{number / 1e3:.0f} kB" if number >= 1_000 else f"{number} B"


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> duration(3.21), duration(75), duration(7300)
    ('3.2 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
