"""Devices and processes, by way of Accelerate: where the model lives, what a step is divided into, what comes together again."""

from __future__ import annotations

import atexit
import gc
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from luthier.core.anatomy import Anatomy
from luthier.core.claims import Claim, Place, voids
from luthier.errors import Fault, MissingExtra, RecipeError, did_you_mean

TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}  # name -> package


def _check_trackers(names: Sequence[str]) -> None:
    """Accelerate passes over a tracker that is not installed, silently; here it is told before anything runs."""
    unknown = [
        Fault(name, "must be a tracker", do=did_you_mean(name, TRACKERS)) for name in names if name not in TRACKERS
    ]
    if unknown:
        raise RecipeError.of(unknown, "--track")
    missing = [name for name in names if importlib.util.find_spec(TRACKERS[name]) is None]
    if missing:
        raise MissingExtra(f"--track {missing[0]} needs its package.  pip install {TRACKERS[missing[0]]}")


def _check_device(device: torch.device, precision: str) -> None:
    """Accelerate takes what it finds: a device whose dropout cannot be seeded, or single precision in place of half."""
    faults = []
    if device.type not in ("cpu", "cuda"):
        faults.append(
            Fault("the device", "must be a processor or a CUDA device", device.type, "Set ACCELERATE_USE_CPU=true.")
        )
    if precision == "fp16" and device.type == "cpu":
        do = "Say bf16 or fp32: there is no fp16 without a GPU."
        faults.append(Fault("precision", "must be fp32 or bf16 on a processor", precision, do))
    if faults:
        raise RecipeError.of(faults, "the recipe for this machine")


def _part() -> None:
    """The processes part. In one that ends without it, threads of its group may wake when Python is half gone, and abort it.

    They end with the last object that holds the group, hence the collection (pytorch issue 190489). Where weights were sharded torch
    holds it to the end, but its threads have let go of what they did by then.
    """
    if torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


class Placement:
    """One process' view of all devices. With one process on a CPU it does nothing at all.

    Args:
        precision: ``fp32``, ``bf16`` or ``fp16`` for forward and backward passes.
        compile: whether the forward pass is compiled.
        trackers: Accelerate's names of trackers (``tensorboard``, ``wandb``, ``mlflow``, ``trackio``); none by default.
        folder: where local trackers write.
    Raises:
        RecipeError: a tracker that is not known, fp16 on a processor, or a device that is neither a processor nor CUDA's.
        MissingExtra: a tracker's package is not installed.
    """

    def __init__(
        self, *, precision: str = "fp32", compile: bool = False, trackers: Sequence[str] = (), folder: str | None = None
    ) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        _check_trackers(trackers)
        AcceleratorState._reset_state()  # or a second run in this process could not have another precision
        self._accelerator = Accelerator(
            mixed_precision="no" if precision == "fp32" else precision,
            cpu=torch.backends.mps.is_available(),  # their generator is not one that a run could go on from
            log_with=list(trackers) or None,
            project_dir=folder,
        )
        self._compile = compile
        self.rank: int = self._accelerator.process_index
        self.processes: int = self._accelerator.num_processes
        if self.processes > 1:
            atexit.unregister(_part)  # of an earlier run
            atexit.register(_part)
        self.device: torch.device = self._accelerator.device
        _check_device(self.device, precision)
        self.main: bool = self._accelerator.is_main_process
        # "accelerate launch --use_fsdp" says so in the environment; on a CPU Accelerate itself does not listen.
        self.sharded: bool = self.processes > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"

    def described(self) -> dict[str, Any]:
        """Device, processes and precision, as plain values."""
        return {
            "device": str(self.device),
            "processes": self.processes,
            "sharded": self.sharded,
            "precision": "fp32" if self._accelerator.mixed_precision == "no" else self._accelerator.mixed_precision,
        }

    def voids(self) -> tuple[Claim, ...]:
        """What these surroundings do away with."""
        return (voids(Place.WHOLE_WEIGHTS),) if self.sharded else ()

    def place(self, model: nn.Module, anatomy: Anatomy) -> nn.Module:
        """The model on its device, sharded or wrapped where there are several processes, compiled where that was asked."""
        if self.sharded:
            from torch.distributed.fsdp import fully_shard

            model.to(self.device)
            for name in anatomy.block_names:
                fully_shard(model.get_submodule(name))
            fully_shard(model)
            placed: nn.Module = model
        elif self.processes > 1:
            # not by Accelerate, whose model stays in half precision where scores are made
            own = [self.device] if self.device.type == "cuda" else None
            placed = DistributedDataParallel(model.to(self.device), device_ids=own, find_unused_parameters=True)
        else:
            placed = model.to(self.device)
        return torch.compile(placed) if self._compile else placed  # type: ignore[return-value]

    def settle(self, model: nn.Module) -> None:
        """Sharded modules let go of the whole weights that their last forward pass gathered."""
        if self.sharded:
            for module in model.modules():
                reshard = getattr(module, "reshard", None)
                if reshard is not None:
                    reshard()

    def whole(self, trained: nn.Module, plain: nn.Module) -> None:
        """Puts the weights of ``trained``, whole again where they were sharded, into ``plain``, in place."""
        if trained is plain:
            return
        gathered = {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in trained.state_dict().items()
        }
        plain.load_state_dict(gathered)

    def autocast(self) -> AbstractContextManager[Any]:
        """Half precision for a forward pass, where it was asked."""
        context: AbstractContextManager[Any] = self._accelerator.autocast()
        return context if self._accelerator.mixed_precision != "no" else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Gradients of ``loss``, scaled where half precision needs it."""
        scaler = self._accelerator.scaler
        (scaler.scale(loss) if scaler is not None else loss).backward()

    def take(self, optimizer: Optimizer) -> None:
        """The optimizer's step; gradients are unscaled before its hooks see them."""
        scaler = self._accelerator.scaler
        graded = any(weight.grad is not None for group in optimizer.param_groups for weight in group["params"])
        if scaler is None or not graded:  # a step without gradients has none to unscale
            optimizer.step()
            return
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """What the devices carry from step to step: the scale of half precision's gradients, where it has one."""
        scaler = self._accelerator.scaler
        return {} if scaler is None else scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what ``state_dict`` gave."""
        scaler = self._accelerator.scaler
        if scaler is not None and state:
            scaler.load_state_dict(dict(state))

    def waiting(self, model: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Holds gradients back from other processes until the ``last`` micro-batch of a step."""
        if self.processes == 1 or last:
            return nullcontext()
        if self.sharded:
            return nullcontext()  # each micro-batch is reduced; the sum is the same
        context: AbstractContextManager[Any] = self._accelerator.no_sync(model)
        return context

    def together(self, loss: Tensor) -> Tensor:
        """The mean over processes of a scalar."""
        if self.processes == 1:
            return loss
        mean: Tensor = self._accelerator.reduce(loss.detach().clone(), reduction="mean")
        return mean

    def anyone(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any process: what all of them do must not hang on one's own signal."""
        if self.processes == 1:
            return flag
        count: Tensor = self._accelerator.reduce(torch.tensor(float(flag), device=self.device), reduction="sum")
        return bool(count > 0)

    def gathered(self, mine: list[Any]) -> list[Any]:
        """The lists of all processes, one after the other, on every process."""
        if self.processes == 1:
            return mine
        from accelerate.utils import gather_object

        everyone: list[Any] = gather_object(mine)
        return everyone

    def wait(self) -> None:
        """All processes meet here."""
        self._accelerator.wait_for_everyone()

    def track(self, project: str, settings: dict[str, Any]) -> Callable[[dict[str, float], int], None]:
        """Starts the trackers, if any; gives back the function that logs values at a step."""
        if not self._accelerator.log_with:
            return lambda values, step: None
        plain = {key: value for key, value in settings.items() if isinstance(value, (str, int, float, bool))}
        self._accelerator.init_trackers(project, config=plain)
        return lambda values, step: self._accelerator.log(values, step=step)

    def end(self) -> None:
        """Closes the trackers. The processes stay together: scores come after it, and perhaps another run."""
        for tracker in self._accelerator.trackers if self._accelerator.log_with else ():
            tracker.finish()
