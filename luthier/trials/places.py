"""Where a comparison's runs are to be done, as a value that is checked before anything is written."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from luthier.errors import Fault, LuthierError, MissingExtra, did_you_mean

On = Literal["local", "ray", "slurm"]
PACKAGES = {"ray": "ray", "slurm": "submitit"}


@dataclass(frozen=True)
class Place:
    """Where runs are done.

    Args:
        on: ``local`` (this machine), ``ray`` (the cluster at RAY_ADDRESS; one of this machine without) or ``slurm``.
        workers: how many runs at a time; 1 on ``local`` is this process.
        slurm: a job's parameters, such as ``{"partition": "gpu", "timeout_min": 240, "gpus_per_node": 1}``; ``cluster`` = ``local``
            does the same with processes of this machine.
        save_every: steps between checkpoints; None makes as many as take a twentieth of the time.
    """

    on: On = "local"
    workers: int = 1
    slurm: Mapping[str, Any] = field(default_factory=dict)
    save_every: int | None = None

    def check(self) -> None:
        """Refuses what cannot be, before the first run.

        Raises:
            LuthierError: there is no such place, or no Slurm here.
            MissingExtra: its package is not installed.
        """
        faults = []
        if self.on not in get_args(On):
            known = ", ".join(get_args(On))
            faults.append(Fault("--on", f"must be of {known}", self.on, did_you_mean(self.on, get_args(On))))
        if self.workers < 1:
            faults.append(Fault("--workers", "must be 1 or more", str(self.workers)))
        if self.slurm and self.on != "slurm":
            faults.append(Fault("--slurm", "needs --on slurm", ", ".join(self.slurm)))
        if faults:
            raise LuthierError.of(faults, "where the runs are done")
        package = PACKAGES.get(self.on)
        if package and importlib.util.find_spec(package) is None:
            raise MissingExtra(f'--on {self.on} needs {package}.  pip install "luthier[{self.on}]"')
        if self.on == "slurm" and "cluster" not in self.slurm and shutil.which("sbatch") is None:
            do = "Call it where Slurm's commands are; or try it here with --slurm cluster=local."
            raise LuthierError.of([Fault("--on slurm", "needs sbatch", do=do)], "where the runs are done")

    def arguments(self) -> list[str]:
        """What ``luthier work`` is told of it."""
        return [] if self.save_every is None else ["--save-every", str(self.save_every)]


def parameters(told: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` of a command line; numbers, true and false as such.

    >>> parameters(["partition=gpu", "timeout_min=60", "exclusive=true"])
    {'partition': 'gpu', 'timeout_min': 60, 'exclusive': True}

    Raises:
        LuthierError: one is not of this form.
    """
    found: dict[str, Any] = {}
    for item in told:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise LuthierError(f"--slurm {item}: must be KEY=VALUE.")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found
