"""Where the runs of a comparison are done: in this process, or in several of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from luthier.errors import LuthierError
from luthier.narrate import Narrator
from luthier.stages import Stopped
from luthier.trials.watch import Watch
from luthier.trials.work import work

GRACE = 120.0  # seconds for a worker that was asked to stop to save its run


def here(watch: Watch, narrator: Narrator) -> None:
    """Does all runs in this process, one after the other; as ``fit`` would, to the bit."""
    over = threading.Event()
    thread = threading.Thread(target=_tell, args=(watch, narrator, over.is_set), daemon=True)
    thread.start()
    try:
        work(watch.desk.path)
    finally:
        over.set()
        thread.join()


def beside(watch: Watch, narrator: Narrator, many: int) -> None:
    """Does the runs in ``many`` processes, each with its share of the cores; they are asked to stop when this one is.

    Raises:
        Stopped: someone asked to stop; what was under way is saved.
        LuthierError: all workers have died with runs left.
    """
    logs = watch.desk.path / "workers"
    logs.mkdir(exist_ok=True)
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // many))
    command = [sys.executable, "-m", "luthier", "work", str(watch.desk.path)]
    with _children(
        command, {**os.environ, "OMP_NUM_THREADS": threads}, [logs / f"{n}.log" for n in range(many)]
    ) as all_of:
        _tell(watch, narrator, lambda: all(child.poll() is not None for child in all_of))
    left = [trial.name for trial in watch.design.trials() if watch.desk.state(trial) == "open"]
    if left and any(child.returncode for child in all_of):
        raise LuthierError(f"the workers ended with {len(left)} runs left; what they said is in {logs}.")


def _tell(watch: Watch, narrator: Narrator, over: Callable[[], bool]) -> None:
    with narrator.live(watch.table):
        for line in watch.until(over):
            narrator.line(line)


@contextmanager
def _children(
    command: list[str], surroundings: dict[str, str], logs: list[Path]
) -> Iterator[list[subprocess.Popen[bytes]]]:
    children = []
    try:
        for log in logs:
            with log.open("ab") as file:
                child = subprocess.Popen(command, env=surroundings, stdout=file, stderr=file, start_new_session=True)
            children.append(child)
        yield children
    except KeyboardInterrupt:
        for child in children:
            child.send_signal(signal.SIGTERM)
        for child in children:
            child.wait(GRACE)
        raise Stopped("stopped on request; the same command goes on from there") from None
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
