"""What several runs have in common, made once: the data as tokens, outputs of layers that no run trains, heads that are solved.

Nothing is taken from here that the run would not have computed bit for bit: a key names all that the value depends on, the machine,
the number of threads and torch's version among it. So a run with a stock and one without have the same weights.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

Arrays = Mapping[str, np.ndarray[Any, Any]]
T = TypeVar("T")
MOST = 4  # values of a kind in memory


class Stock:
    """Values by key: in memory for the runs of one process; arrays also in a folder, for all processes that share it.

    Args:
        folder: where arrays are kept; None keeps nothing on disk.
        lasting: whether other runs come after this one, so that nothing is forgotten.
    """

    def __init__(self, folder: Path | None = None, *, lasting: bool = True) -> None:
        self._folder, self._lasting = folder, lasting
        self._known: OrderedDict[str, Any] = OrderedDict()

    def get(self, key: str, make: Callable[[], T], *, most: int = MOST) -> T:
        """The value at ``key``, made when there is none; whoever gets it must not change it.

        Args:
            most: values of its kind that stay in memory, the last ones asked for.
        """
        kind = key.partition("-")[0]
        if key not in self._known:
            self._known[key] = make()
        self._known.move_to_end(key)
        for old in [one for one in self._known if one.partition("-")[0] == kind][:-most]:
            del self._known[old]
        return self._known[key]  # type: ignore[no-any-return]

    def forget(self, kind: str) -> None:
        """Lets go of values that this run needs no more, unless other runs come after it."""
        if not self._lasting:
            self._known = OrderedDict(
                (one, value) for one, value in self._known.items() if one.partition("-")[0] != kind
            )

    def arrays(self, key: str, make: Callable[[], Arrays]) -> Arrays:
        """The arrays at ``key``; one process makes them while the others wait."""
        return self.get(key, lambda: make() if self._folder is None else self._kept(self._folder / f"{key}.npz", make))

    def _kept(self, file: Path, make: Callable[[], Arrays]) -> Arrays:
        with alone(file.with_suffix(".lock")):
            if file.is_file():
                with np.load(file) as held:
                    return {name: held[name] for name in held.files}
            made = make()
            beside = file.with_name(f".{file.name}.{os.getpid()}")
            with beside.open("wb") as whole:
                np.savez(whole, **made)  # type: ignore[arg-type]
                whole.flush()
                os.fsync(whole.fileno())
            os.replace(beside, file)
            return made


def key(kind: str, *told: object) -> str:
    """A key of ``told`` and of what else decides the last bit: this machine, its threads, torch's version.

    Args:
        kind: what the value is; the key begins with it.
        told: values whose ``repr`` says all.
    """
    import torch

    here = (platform.node(), torch.__version__, torch.get_num_threads(), torch.backends.cpu.get_cpu_capability())
    return f"{kind}-{hashlib.sha256(repr((told, here)).encode()).hexdigest()[:32]}"


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Inside, this process alone has ``lock``, a file that is made where there is none; others wait for it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
