"""The run folder: one run, one folder, locked while it is written, never overwritten by another run."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from luthier import checkpoint
from luthier.errors import Fault, LuthierError, RunError
from luthier.jsonfile import unwritable, write_whole

PACKAGES = (
    "luthier",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "numpy",
    "scikit-learn",
    "tokenizers",
    "safetensors",
)


class RunFolder:
    """An open run folder.

    Files: ``recipe.yaml`` (every default filled in), ``call.json``, ``plan.json``, ``environment.json``, ``log.jsonl``,
    ``checkpoints/``; where asked for ``stages/``, ``adapter/`` and ``paused.json``; and at the end ``model/``, ``outputs.npz``,
    ``report.html`` and, last, ``report.json``.

    Args:
        path: where.
        resume: whether to go on with the run that is there.
        identity: what makes it the same run (digests of recipe, data and start weights, the seed).
        surroundings: devices and processes, for environment.json.
        main: False on the processes that only look.
    Raises:
        LuthierError: the folder holds another run, something else, or a run that is being written now.
    """

    def __init__(
        self,
        path: Path,
        *,
        resume: bool,
        identity: dict[str, Any],
        surroundings: dict[str, Any] | None = None,
        main: bool = True,
    ) -> None:
        self.path, self.main = path, main
        self._lock: IO[str] | None = None
        self._log: IO[bytes] | None = None
        if not main:
            return
        before = self._known()
        self._check(before, resume, identity)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(path / ".lock")
        except BlockingIOError:
            raise LuthierError(
                f"{path} is being written by another process.  Wait for it, or choose another --out."
            ) from None
        except OSError as error:
            why = error.strerror or str(error)
            raise LuthierError(f"{path} cannot be written to: {why}.  Choose another --out.") from None
        try:
            before = self._known()  # another process may have begun, or ended, a run here meanwhile
            self._check(before, resume, identity)
            if before is None:
                self.write_json("environment.json", {"identity": identity, **(surroundings or {}), **environment()})
        except LuthierError:
            self.close()
            raise

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def done(self) -> bool:
        """Whether the run in it has ended."""
        return (self.path / "report.json").is_file()

    def write(self, name: str, text: str) -> None:
        """Writes a text file, whole or not at all."""
        if self.main:
            write_whole(self.path / name, text)

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def log(self, values: Mapping[str, Any]) -> None:
        """Adds a line to log.jsonl.

        Raises:
            RunError: the disk is full or cannot be written.
        """
        if not self.main:
            return
        path = self.path / "log.jsonl"
        try:
            if self._log is None:
                self._log = path.open("ab")
            self._log.write((json.dumps(dict(values)) + "\n").encode())
            self._log.flush()
        except OSError as error:
            command = f"luthier fit --out {shlex.quote(str(self.path))} --resume"
            do = f"When that is mended (a full disk: make room), {command} goes on from what was saved."
            raise RunError(f"cannot write {path}: {error.strerror or error}.  {do}") from error

    @property
    def logged(self) -> int:
        """Bytes in log.jsonl."""
        path = self.path / "log.jsonl"
        return path.stat().st_size if path.exists() else 0

    def rewind_log(self, size: int) -> None:
        """Forgets what was logged after the state that is gone back to."""
        path = self.path / "log.jsonl"
        if self.main and path.exists():
            os.truncate(path, min(size, path.stat().st_size))

    def latest(self, say: Any) -> tuple[checkpoint.Checkpoint | None, checkpoint.Checkpoint | None]:
        """What the run goes on from, as ``checkpoint.latest`` gives it; what is of no more use is removed."""
        return checkpoint.latest(self.checkpoints, say=say, forget=self.main)

    def close(self) -> None:
        """Lets go of the lock; what was written stays."""
        if self._lock is not None:
            with suppress(OSError):
                (self.path / ".lock").unlink(missing_ok=True)  # while it is held, so that no one else's is removed
        for file in (self._log, self._lock):
            if file is not None:
                with suppress(OSError):  # what could not be written was told by ``log``
                    file.close()
        self._log = self._lock = None

    def _known(self) -> dict[str, Any] | None:
        file = self.path / "environment.json"
        if not file.is_file():
            return None
        try:
            known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["identity"]
            return known
        except (ValueError, KeyError):
            raise LuthierError(f"{file} cannot be read as a run's environment.  Choose another --out.") from None

    def _check(self, before: dict[str, Any] | None, resume: bool, identity: dict[str, Any]) -> None:
        refuse(self.path, resume=resume)
        if before is None:
            return
        faults = [
            Fault(key, f"must be what the run began with ({before.get(key)})", str(identity[key]))
            for key in identity
            if before.get(key) != identity[key]
        ]
        if faults:
            raise LuthierError.of(faults, f"--resume: {self.path} holds another run")


def _begun(name: str) -> bool:
    """Whether a process that was killed while it began a run may have left a file of that name."""
    return name == ".lock" or (name.startswith(".environment.json.") and name.endswith(".tmp"))


def refuse(path: Path, *, resume: bool) -> None:
    """Refuses a place that a run cannot be written to; known before a model is loaded.

    Raises:
        LuthierError: a file is there, or a folder that holds something else, or a run that is not to be gone on with.
    """
    if path.exists() and not path.is_dir():
        raise LuthierError(f"{path} is a file.  Choose another --out.")
    if why := unwritable(path):
        raise LuthierError(f"{path} cannot be made: {why}.  Choose another --out.")
    if not (path / "environment.json").is_file():
        if path.is_dir() and not all(_begun(item.name) for item in path.iterdir()):
            raise LuthierError(f"{path} is not empty and holds no run.  Choose another --out; nothing was touched.")
    elif not resume:
        how = "a finished run" if (path / "report.json").is_file() else "an unfinished run"
        do = "Add --resume to go on with it, or choose another --out; nothing was touched."
        raise LuthierError(f"{path} holds {how}.  {do}")


def _locked(path: Path) -> IO[str]:
    """``path``, open, with a lock that only this process has.

    Who lets go removes the file. A lock on a file that was removed between opening and locking it keeps no one out, so it is tried
    again on the file that is there now.

    Raises:
        BlockingIOError: another process has it.
        OSError: it cannot be written, or the disk has no locks.
    """
    while True:
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass
        except OSError:
            file.close()
            raise
        file.close()


def fresh(base: Path, name: str) -> Path:
    """``base/name``, or the first of ``name-2``, ``name-3``, ... that is not there yet."""
    path, number = base / name, 1
    while path.exists():
        number += 1
        path = base / f"{name}-{number}"
    return path


def environment() -> dict[str, Any]:
    """Versions, hardware and threads: what else a run depends on."""
    import torch

    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count())],
        "versions": versions,
    }


def _processor() -> str:
    """The processor's own name, on which the order of sums depends; the kind of machine where it is not told."""
    info = Path("/proc/cpuinfo")
    told = info.read_text(errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in told if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
