"""The folder of a comparison: where each run stands, and who may do it. Any number of processes may share it.

``design.json``; ``runs/NAME``, run folders; ``locks/NAME.lock``, held while a run is under way, by the kernel, so that a process that
dies lets go; ``failures/NAME.json``; ``shared/``, what runs have in common; ``comparison.json`` and ``compare.html``.

A lock file is never removed: a lock on a file that is gone would keep no one out. Machines that share the folder need a disk whose
``flock`` counts for all of them: NFS 4, Lustre with ``-o flock``, GPFS; not NFS with ``nolock`` or ``local_lock``.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from luthier.errors import LuthierError
from luthier.jsonfile import write_whole
from luthier.trials.design import Trial

State = Literal["done", "failed", "running", "open"]
MOST_STARTS = 3  # of a run whose process was killed each time
GLANCE = 0.005  # seconds; whoever looks whether a lock is held has it for less


@dataclass(frozen=True)
class Desk:
    """The folder of a comparison."""

    path: Path

    def run(self, trial: Trial) -> Path:
        """The run folder of ``trial``."""
        return self.path / "runs" / trial.name

    @property
    def shared(self) -> Path:
        return self.path / "shared"

    def done(self, trial: Trial) -> bool:
        """Whether the run has ended well."""
        return (self.run(trial) / "report.json").is_file()

    def drop_weights(self, trial: Trial) -> None:
        """Removes the weights of a run that has ended; all else that is known of it stays."""
        if self.done(trial):
            for name in ("model", "adapter"):
                shutil.rmtree(self.run(trial) / name, ignore_errors=True)

    def failure(self, trial: Trial) -> str | None:
        """Why the run ended with an error; None when it did not."""
        why = self._failed(trial).get("why")
        return None if why is None else str(why)

    def lost(self, trial: Trial) -> float:
        """The seconds that a run took before it ended with an error, as far as they are known."""
        return float(self._failed(trial).get("seconds", 0.0))

    def state(self, trial: Trial) -> State:
        """Where the run stands, for whoever looks on; only ``claimed`` may decide by it."""
        if self.done(trial):
            return "done"
        if self.failure(trial) is not None:
            return "failed"
        return "running" if self._held(trial) else "open"

    def paused(self, trial: Trial) -> dict[str, Any] | None:
        """How the run did when it paused; None when it never did. It stays when the run goes on."""
        try:
            told: dict[str, Any] = json.loads((self.run(trial) / "paused.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return told

    def fail(self, trial: Trial, why: str, seconds: float = 0.0) -> None:
        """Writes down why the run ended with an error, and after how long."""
        told = {"why": why, "seconds": seconds, "host": platform.node(), "process": os.getpid()}
        write_whole(self.path / "failures" / f"{trial.name}.json", json.dumps(told, indent=1) + "\n")

    def forgive(self, trial: Trial) -> None:
        """Failed runs are tried again, and starts are counted anew."""
        with self._alone(trial) as file:
            if file is not None:  # else it is under way, and has not failed
                file.truncate(0)
                (self.path / "failures" / f"{trial.name}.json").unlink(missing_ok=True)

    @contextmanager
    def claimed(self, trial: Trial) -> Iterator[bool]:
        """Whether ``trial`` is this process' to do: no one else has it, and it has not ended. Held until the context is left.

        A run whose process was killed ``MOST_STARTS`` times without getting further has failed: it would take down process after
        process.
        """
        with self._alone(trial) as file:
            if file is None:
                yield False
                return
            _look(self.run(trial), self.path / "failures")
            if self.done(trial) or self.failure(trial) is not None:
                yield False
                return
            file.seek(0)
            starts = file.read()
            saved = max((one.name for one in (self.run(trial) / "checkpoints").glob("stage-*")), default="nothing")
            if sum(line.endswith(f" {saved}") for line in starts.splitlines()) >= MOST_STARTS:
                self.fail(trial, f"its process was ended from outside {MOST_STARTS} times (out of memory?)")
                yield False
                return
            file.write(f"{platform.node()} {os.getpid()} {saved}\n")
            file.flush()
            try:
                yield True
            finally:
                file.truncate(len(starts.encode()))  # not reached when the process is killed

    def progress(self, trial: Trial) -> float:
        """The share of a run's steps that are taken, from its log."""
        taken, planned = self.steps(trial)
        return min(1.0, taken / planned) if planned else 0.0

    def steps(self, trial: Trial) -> tuple[int, int]:
        """Optimizer steps that a run has taken, from its log, and that it has in all; 0 of 0 before it began."""
        try:
            told = json.loads((self.run(trial) / "plan.json").read_text(encoding="utf-8"))
            planned = sum(stage["steps"] or 0 for stage in told["stages"])
            log = self.run(trial) / "log.jsonl"
            return (log.read_bytes().count(b'"learning_rate"') if log.is_file() else 0), planned
        except (OSError, ValueError, KeyError):
            return 0, 0

    def report(self, trial: Trial) -> dict[str, Any]:
        """The run's report.json as plain values."""
        told: dict[str, Any] = json.loads((self.run(trial) / "report.json").read_text(encoding="utf-8"))
        return told

    def _failed(self, trial: Trial) -> dict[str, Any]:
        try:
            told: dict[str, Any] = json.loads(
                (self.path / "failures" / f"{trial.name}.json").read_text(encoding="utf-8")
            )
        except (OSError, ValueError):
            return {}
        return told

    def _lock(self, trial: Trial) -> Path:
        return self.path / "locks" / f"{trial.name}.lock"

    @contextmanager
    def _alone(self, trial: Trial) -> Iterator[IO[str] | None]:
        """The run's lock file, held by this process only; None when another has it.

        Raises:
            LuthierError: the disk has no locks.
        """
        lock = self._lock(trial)
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("a+") as file:
            yield file if _taken(file) else None

    def _held(self, trial: Trial) -> bool:
        try:
            with self._lock(trial).open("r") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False


def _taken(file: IO[str]) -> bool:
    """Whether ``file`` is locked by this process now; tried thrice, as who looks at a lock has it for a moment.

    Raises:
        LuthierError: the disk has no locks.
    """
    for _ in range(3):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(GLANCE)
        except OSError as error:
            why = f"{file.name} cannot be locked: {error.strerror}"
            raise LuthierError(f"{why}.  The folder must be on a disk with locks; choose another --out.") from None
        else:
            return True
    return False


def _look(*folders: Path) -> None:
    """Lists folders, so that a shared disk's client does not answer from what it remembered of them."""
    for folder in folders:
        with suppress(OSError):
            os.listdir(folder)
