"""What early stopping cost and spared, counted from the folder."""

from __future__ import annotations

from typing import Any

from luthier.trials.design import Design
from luthier.trials.desk import Desk
from luthier.trials.early import Early, groups, kept


def cost(desk: Desk, design: Design) -> dict[str, Any]:
    """What was done and what was spared, by recipe, in optimizer steps; empty without early stopping.

    Returns:
        started, share and kept; steps_taken, by all; steps_full, had all been finished; saved, the share spared; runs_equivalent, the
        full runs that cost as much (t f + p (1 - f) when t start, pause at f, and p go on).
    """
    early = Early.of(design)
    found: dict[str, Any] = {}
    for (setting, recipe), group in groups(design).items() if early else ():
        assert early is not None
        counted = [desk.steps(trial) for trial in group]
        taken = sum(steps for steps, _ in counted)
        full = sum(
            steps if desk.done(trial) else planned for trial, (steps, planned) in zip(group, counted, strict=True)
        )
        found[f"{setting} {recipe}" if len(design.settings) > 1 else recipe] = {
            "started": len(group),
            "share": early.share,
            "kept": len(kept(desk, design, group)),
            "steps_taken": taken,
            "steps_full": full,
            "saved": 1 - taken / full if full else 0.0,
            "runs_equivalent": len(group) * taken / full if full else 0.0,
        }
    return found
