"""A comparison's workers as jobs of Slurm, through submitit; their scripts and logs lie in ``slurm/`` of the comparison's folder.

The folder must lie on a disk that the nodes share. A job that comes near its time limit, or is preempted, is put into the queue again by
submitit, and its run goes on from its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.errors import Fault, LuthierError, MissingExtra
from luthier.trials.places import Place
from luthier.trials.work import work

SHARED = (
    "name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node", "stderr_to_stdout",
)  # fmt: skip
MINUTES = 240  # of a job, where nothing is said
REQUEUES = 1000  # each has got further, so there need be no end to them


class Jobs:
    """Jobs, an array of them on Slurm, that each work until no run is left.

    Raises:
        MissingExtra: submitit is not installed.
        LuthierError: submitit does not know a parameter.
    """

    every = 2.0

    def __init__(self, folder: Path, place: Place) -> None:
        try:
            import submitit
        except ImportError as error:
            raise MissingExtra('--on slurm needs submitit.  pip install "luthier[slurm]"') from error
        told = dict(place.slurm)
        cluster = str(told.pop("cluster", "slurm"))
        self._logs = folder / "slurm"
        self._worker, self._many = Worker(str(folder), place.save_every), place.workers
        self._all: list[Any] = []
        try:
            self._executor = submitit.AutoExecutor(
                self._logs, cluster=cluster, slurm_max_num_timeout=REQUEUES, local_max_num_timeout=REQUEUES
            )
            usual = {"name": f"luthier-{folder.name}", "timeout_min": MINUTES}
            self._executor.update_parameters(**usual | prefixed(told))
        except (NameError, ValueError, AssertionError, RuntimeError) as error:
            raise LuthierError.of([Fault("--slurm", "must be what submitit knows", str(error))], "the jobs") from None

    def start(self) -> None:
        with self._executor.batch():
            for _ in range(self._many):
                self._all.append(self._executor.submit(self._worker))

    def over(self) -> bool:
        return all(job.done() for job in self._all)

    def ask(self) -> None:
        for job in self._all:
            job.cancel()  # SIGTERM; Slurm's KillWait, 30 seconds as a rule, is what they have to save

    def end(self) -> None:
        if not self.over():
            self.ask()

    def said(self) -> str:
        return f"What they said is in {self._logs}."


@dataclass(frozen=True)
class Worker:
    """What a job does."""

    folder: str
    save_every: int | None

    def __call__(self) -> int:
        return work(self.folder, save_every=self.save_every)

    def checkpoint(self) -> Any:
        """The job that goes on with this one's work."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def prefixed(told: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as submitit names them: those that only Slurm has with ``slurm_`` before.

    >>> prefixed({"partition": "gpu", "mem_gb": 16})
    {'slurm_partition': 'gpu', 'mem_gb': 16}
    """
    return {name if name in SHARED or name.startswith("slurm_") else f"slurm_{name}": told[name] for name in told}
