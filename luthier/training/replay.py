"""The model at the start of each stage of a run, got back without training.

A probe that is solved exactly is solved again; what a stage with steps ends on is known where the run kept it (``keep_stages``).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from luthier.errors import Fault, LuthierError
from luthier.jsonfile import atomically
from luthier.narrate import Narrator, Silent
from luthier.placement import Placement
from luthier.planning.plan import StagePlan
from luthier.training import probing, stages
from luthier.training.job import Job
from luthier.training.trace import Trace

LONGEST = 230  # bytes: a disk takes names of 255, and the file is written as .NAME.safetensors.1234567.tmp


def named(stage: str) -> str:
    """The stage's name as a file's: quoted, and where that is too long cut, with the sha256 of the whole behind it.

    ``quote`` leaves no ``+``, so that a name that is cut is never another's that is not.

    >>> named("1/2 way"), named("way" * 99)[159:180], len(named("way" * 99))
    ('1%2F2%20way', 'wayway+41c916e14e3ab5', 230)
    """
    name = quote(stage, safe="")
    if len(name) <= LONGEST:
        return name
    told = f"+{hashlib.sha256(stage.encode()).hexdigest()}"
    return name[: LONGEST - len(told)] + told


def kept(run: Path, stage: str) -> Path:
    """Where the weights at the end of a stage are kept: ``stages/NAME.safetensors`` in the run folder.

    >>> kept(Path("runs/reviews"), "probe").as_posix(), kept(Path("run"), "1/2 way").name
    ('runs/reviews/stages/probe.safetensors', '1%2F2%20way.safetensors')
    """
    return run / "stages" / f"{named(stage)}.safetensors"


def keep(run: Path, stage: str, model: nn.Module) -> None:
    """Keeps the weights and buffers of ``model`` as the end of ``stage``, whole or not at all.

    Raises:
        RunError: the disk is full or cannot be written.
    """
    state = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}

    def write(beside: Path) -> None:
        try:
            save_file(state, beside)
        except SafetensorError as error:  # its own writer says so of a full disk
            raise OSError(str(error).splitlines()[0]) from error

    atomically(kept(run, stage), write)


class Replay:
    """The model of a job at the start of its stages. Each exact probe is solved once, however often it is asked for.

    Args:
        job: its model is left as it is.
        run: the folder of the run, which may have kept some stages' ends; None = there is none.
    """

    def __init__(self, job: Job, run: Path | None = None, narrator: Narrator | None = None) -> None:
        self._job, self._run, self._say = job, run, narrator or Silent()
        self._heads: dict[str, dict[str, Tensor]] = {}

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages' names, in order."""
        return tuple(plan.name for plan in self._job.plan.stages)

    def blocked(self, stage: str) -> str:
        """The stage before ``stage`` whose end would have to be known for the start of ``stage``, and is not; empty where none is."""
        _, steps = self._way(stage)
        return next((plan.name for plan in steps if plan.stage.solver != "exact"), "")

    def at(self, stage: str) -> nn.Module:
        """A copy of the model, on the CPU, as it is when ``stage`` begins, before what the stage does to its structure.

        Raises:
            LuthierError: there is no such stage, or the start of it is not known.
        """
        if blocking := self.blocked(stage):
            must = f"must be known: {blocking!r} trains before it, and its end was not kept"
            do = f"Choose --stage {blocking}, or fit with --keep-stages."
            raise LuthierError.of([Fault(f"the start of {stage!r}", must, do=do)], "study")
        file, steps = self._way(stage)
        model: nn.Module = copy.deepcopy(self._job.loaded.model)
        if file is not None:
            model.load_state_dict(load_file(file))
        for plan in steps:
            self._solve(plan, model)
        return model.to("cpu")

    def _way(self, stage: str) -> tuple[Path | None, Sequence[StagePlan]]:
        """The last end that was kept before ``stage``, and the stages from there up to it."""
        if stage not in self.stages:
            do = f"There are: {', '.join(self.stages)}."
            raise LuthierError.of([Fault("--stage", "must be a stage of the recipe", stage, do)], "study")
        before = self._job.plan.stages[: self.stages.index(stage)]
        for at in range(len(before), 0, -1):
            file = kept(self._run, before[at - 1].name) if self._run else None
            if file is not None and file.is_file() and _fits(file, self._job.loaded.model):
                return file, before[at:]
        return None, before

    def _solve(self, plan: StagePlan, model: nn.Module) -> None:
        """Solves an exact probe, in place, or puts in the head that it had; of it goes on what the stage carries."""
        head = model.get_submodule(plan.anatomy.output or "")
        if plan.name not in self._heads:
            before = {f"{plan.anatomy.output}.{name}": value.clone() for name, value in head.state_dict().items()}
            probing.solve(self._job, plan, model, Placement(), Trace(), self._say)
            stages.put_back(model, before, plan)
            self._heads[plan.name] = {name: value.cpu().clone() for name, value in head.state_dict().items()}
        with torch.no_grad():
            head.load_state_dict(self._heads[plan.name])


def _fits(file: Path, model: nn.Module) -> bool:
    """Whether a file can be read and holds the model's weights: those names, those shapes."""
    try:
        with safe_open(file, framework="pt") as told:
            found = {name: list(told.get_slice(name).get_shape()) for name in told.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return False
    return found == {name: list(value.shape) for name, value in model.state_dict().items()}
