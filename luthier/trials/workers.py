"""Where the runs of a comparison are done: in this process, in several of this machine, or by workers of Ray or Slurm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from luthier.errors import LuthierError
from luthier.narrate import Narrator, Silent
from luthier.training.stages import Stopped
from luthier.trials.asking import GOES_ON, interruptible
from luthier.trials.early import turns
from luthier.trials.places import Place
from luthier.trials.watch import Watch
from luthier.trials.work import work

GRACE = 120.0  # seconds for workers that were asked to stop to save their runs
ENDING = 5.0  # seconds for workers to see that no run is left


class Crew(Protocol):
    """Workers, each of which does ``work`` on the folder of the comparison until no run is left.

    Args:
        every: seconds between looks at the folder while they are at it.
    """

    @property
    def every(self) -> float: ...

    def start(self) -> None: ...

    def over(self) -> bool:
        """Whether all have ended."""
        ...

    def ask(self) -> None:
        """Asks all to stop after the step they are at, and to save."""
        ...

    def end(self) -> None:
        """Ends those that are left at once, and lets go of what was taken for them. Also when ``start`` did not come to its end."""
        ...

    def said(self) -> str:
        """Where what they said can be read, or what it was."""
        ...


def do(place: Place, watch: Watch, narrator: Narrator) -> None:
    """Does the runs that are left, where ``place`` says.

    Raises:
        Stopped: someone asked to stop; what was under way is saved.
        LuthierError: all workers have ended with runs left.
        MissingExtra: Ray or submitit is not installed.
    """
    folder = watch.desk.path.absolute()
    if place.on == "ray":
        from luthier.trials.ray_jobs import Tasks

        led(Tasks(folder, place), watch, narrator)
    elif place.on == "slurm":
        from luthier.trials.slurm_jobs import Jobs

        led(Jobs(folder, place), watch, narrator)
    elif place.workers == 1:
        here(watch, narrator, save_every=place.save_every)
    else:
        led(Processes(folder, place), watch, narrator)


def here(watch: Watch, narrator: Narrator, *, save_every: int | None = None) -> None:
    """Does all runs in this process, one after the other; as ``fit`` would, to the bit."""
    over = threading.Event()
    thread = threading.Thread(target=_tell, args=(watch, narrator, over.is_set), daemon=True)
    thread.start()
    try:
        work(watch.desk.path, narrator=lambda trial: _Stopping(narrator), save_every=save_every)
    finally:
        over.set()
        thread.join()


def led(crew: Crew, watch: Watch, narrator: Narrator) -> None:
    """Starts a crew, tells what it does, and asks it to stop when this process is; a second time ends it at once."""
    try:
        with interruptible():
            try:
                crew.start()
            except KeyboardInterrupt:
                raise Stopped(GOES_ON) from None
        with interruptible():  # anew: Ray has taken SIGTERM
            try:
                _tell(watch, narrator, lambda: crew.over() or watch.over, every=crew.every)
                if not _over(crew, ENDING):
                    crew.ask()  # some wait in a queue, for nothing
                    _over(crew, ENDING)
            except KeyboardInterrupt:
                narrator.line("stopping: the workers save what they have (once more to stop at once)")
                crew.ask()
                _over(crew, GRACE)
                raise Stopped(GOES_ON) from None
        left = [trial.name for trial, _ in turns(watch.desk, watch.design) if watch.desk.state(trial) == "open"]
        if left:
            raise LuthierError(f"the workers ended with {len(left)} runs left.  {crew.said()}")
    finally:
        crew.end()


class Processes:
    """Processes of this machine, each with its share of the cores."""

    every = 0.3

    def __init__(self, folder: Path, place: Place) -> None:
        self._logs = folder / "workers"
        self._many = place.workers
        self._command = [sys.executable, "-m", "luthier", "work", str(folder), *place.arguments()]
        self._all: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self._logs.mkdir(exist_ok=True)
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // self._many))
        told = {**os.environ, "OMP_NUM_THREADS": threads}
        for number in range(self._many):
            with (self._logs / f"{number}.log").open("ab") as log:
                self._all.append(
                    subprocess.Popen(self._command, env=told, stdout=log, stderr=log, start_new_session=True)
                )

    def over(self) -> bool:
        return all(child.poll() is not None for child in self._all)

    def ask(self) -> None:
        for child in self._all:
            child.send_signal(signal.SIGTERM)  # a session of its own keeps the terminal's Ctrl-C from it

    def end(self) -> None:
        for child in self._all:
            if child.poll() is None:
                child.kill()
                child.wait()

    def said(self) -> str:
        return f"What they said is in {self._logs}."


class _Stopping(Silent):
    """Of what a run says, only that it was asked to stop."""

    def __init__(self, narrator: Narrator) -> None:
        self._narrator = narrator

    def line(self, text: str = "") -> None:
        if text.startswith("stopping"):
            self._narrator.line(text)


def _tell(watch: Watch, narrator: Narrator, over: Callable[[], bool], every: float = 0.3) -> None:
    with narrator.live(watch.table):
        for line in watch.until(over, every=every):
            narrator.line(line)


def _over(crew: Crew, seconds: float) -> bool:
    """Whether the crew ended within ``seconds``."""
    latest = time.monotonic() + seconds
    while not crew.over():
        if time.monotonic() > latest:
            return False
        time.sleep(0.1)
    return True
