"""What a run inside transformers.Trainer needs to go on, beside what the Trainer saves: a file in each of its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from luthier.errors import CheckpointError, Fault
from luthier.recipe.recipe import Recipe
from luthier.run import Run

STATE = "luthier.pt"


def saved(run: Run) -> dict[str, Any]:
    """All that the Trainer does not save itself: it has weights, optimizer, schedule and random numbers."""
    theirs = ("optimizer", "schedule")
    own = {name: value for name, value in run.state_dict().items() if name not in theirs}
    return {**own, "recipe": _meaning(run), "start": run._start or {}}


def _meaning(run: Run) -> str:
    """A digest of what was begun: ingredients, rate, steps, seed."""
    return Recipe(name="begin", stages=(run.plan.stage,), seed=run.seed, family=run.plan.family).digest


def read(run: Run, folder: Path) -> dict[str, Any]:
    """What ``saved`` gave, from a checkpoint of the Trainer's.

    Raises:
        CheckpointError: files are missing or torn, or are of another run.
    """
    missing = [name for name in (STATE, OPTIMIZER_NAME, SCHEDULER_NAME) if not (folder / name).is_file()]
    if missing:
        do = "Go on from a checkpoint that parts.Trainer saved, with save_only_model off."
        fault = Fault(str(folder), f"must hold {', '.join(missing)}, or the run would not go on as it was", do=do)
        raise CheckpointError.of([fault], "the checkpoint")
    try:
        found: dict[str, Any] = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch's reader stumbles over
        do = "Go on from the checkpoint before it."
        fault = Fault(str(folder / STATE), "must be whole, and cannot be read", do=do)
        raise CheckpointError.of([fault], "the checkpoint") from error
    if found["recipe"] != _meaning(run):
        must = "must be of a run that was begun with the same ingredients, learning_rate, steps and seed"
        fault = Fault(str(folder), must, f"the digest {found['recipe']}, and not {_meaning(run)}")
        raise CheckpointError.of([fault], "the checkpoint")
    return found


@torch.no_grad()
def load(run: Run, found: dict[str, Any]) -> None:
    """Goes on from what ``saved`` gave, in place; the Trainer has loaded all else by then."""
    theirs = {"optimizer": run.optimizer.state_dict(), "schedule": run.schedule.state_dict()}
    run.load_state_dict({**found, **theirs})
    for name, weight in (run._start or {}).items():  # a new head need not be drawn as it was at first
        weight.copy_(found["start"][name])
