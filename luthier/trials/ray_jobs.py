"""A comparison's workers as tasks of Ray: on the cluster at RAY_ADDRESS, or on one of this machine that ends with the comparison.

The comparison's folder must lie on a disk that all nodes share, at the same path, and Luthier be installed on each of them. A task whose
process or node is lost is started again by Ray; its run goes on from its last checkpoint.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from luthier.errors import MissingExtra
from luthier.training.stages import Stopped
from luthier.trials.places import Place
from luthier.trials.work import work

RETRIES = 20  # of a worker that was lost; a run that takes its worker down each time is given up before


class Tasks:
    """Tasks that each work until no run is left.

    Raises:
        MissingExtra: Ray is not installed.
    """

    every = 1.0

    def __init__(self, folder: Path, place: Place) -> None:
        try:
            import ray
        except ImportError as error:
            raise MissingExtra('--on ray needs ray.  pip install "luthier[ray]"') from error
        self._ray: Any = ray
        self._folder, self._place = folder, place
        self._all: list[Any] = []
        self._own = False  # whether Ray was started here

    def start(self) -> None:
        ray = self._ray
        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anyone
            self._own = True
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="warning")
        cpus, gpus = shares(ray.nodes(), self._place.workers)
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES, retry_exceptions=False)(_worker)
        for _ in range(self._place.workers):
            self._all.append(task.remote(str(self._folder), self._place.save_every))

    def over(self) -> bool:
        return not self._all or not self._ray.wait(self._all, num_returns=len(self._all), timeout=0)[1]

    def ask(self) -> None:
        for task in self._all:
            self._ray.cancel(task)  # as Ctrl-C in its process

    def end(self) -> None:
        if self._own:
            self._ray.shutdown()
        elif not self.over():
            for task in self._all:
                self._ray.cancel(task, force=True)

    def said(self) -> str:
        """The errors of the tasks that ended with one."""
        told = []
        for task in self._ray.wait(self._all, num_returns=len(self._all), timeout=0)[0]:
            try:
                self._ray.get(task)
            except Exception as error:
                told.append(str(error).strip())
        return "\n".join(dict.fromkeys(told))


def _worker(folder: str, save_every: int | None) -> int:
    """What a task does; gives how many runs it did, also when it was asked to stop."""
    try:
        return work(folder, save_every=save_every)
    except Stopped:
        return 0


def shares(nodes: list[dict[str, Any]], workers: int) -> tuple[int, float]:
    """(CPUs, GPUs) of a worker: even shares that fit on the smallest node that has any.

    >>> node = {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}}
    >>> shares([node, node], 4), shares([node, node], 1), shares([node], 20)
    ((4, 0.5), (8, 1.0), (1, 0.05))
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    cpus = [each["CPU"] for each in alive if each.get("CPU")]
    gpus = sum(each.get("GPU", 0.0) for each in alive)
    share = math.floor(min(min(cpus, default=1.0), sum(cpus) / workers))
    return max(1, share), min(1.0, math.floor(gpus / workers * 1e4) / 1e4)
