"""What a run remembers of itself, and what the engine wants done while a stage runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from luthier.run import Run


@dataclass
class Trace:
    """What a run remembers of itself for its report; saved with every checkpoint.

    Args:
        loss: (step over the whole run, mean loss of that step).
        rate: (step, highest learning rate).
        validation: (step, scores).
        starts: (step, stage's name).
        rates: what was found by stages that choose their learning rate, by stage.
        seconds: of training; wall: of the whole run, up to the checkpoint that this is saved with.
    """

    loss: list[list[float]] = field(default_factory=list)
    rate: list[list[float]] = field(default_factory=list)
    validation: list[list[Any]] = field(default_factory=list)
    starts: list[list[Any]] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    movement: list[dict[str, Any]] = field(default_factory=list)
    rates: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0
    wall: float = 0.0
    steps: int = 0


@dataclass(frozen=True)
class Hooks:
    """What the engine wants done while a stage runs.

    Args:
        save: called with the step and the run after a step; decides itself whether to write.
        stop: whether someone asked to stop; looked at between steps.
        log: takes values for the log and the trackers.
    """

    save: Callable[[int, Run], None]
    stop: Callable[[], bool]
    log: Callable[[dict[str, Any]], None]
