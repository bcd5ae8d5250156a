"""The linear probe of a run: the head is solved on features that are computed once."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from torch import nn

from luthier.narrate import Narrator
from luthier.outputs import logits
from luthier.placement import Placement
from luthier.planning.plan import StagePlan
from luthier.quick import QuickRandom, quicken
from luthier.sources import models
from luthier.sources.checks import FEW_TO_CALIBRATE
from luthier.stock import Arrays, key
from luthier.training import frozen, head
from luthier.training.job import Job
from luthier.training.trace import Trace


def quickly(model: nn.Module, placement: Placement) -> AbstractContextManager[Any]:
    """Quick linear layers for passes over the whole data without gradients, on a CPU."""
    return quicken(model, QuickRandom(0), evaluation=True) if placement.device.type == "cpu" else nullcontext()


def solve(
    job: Job, plan: StagePlan, model: nn.Module, placement: Placement, trace: Trace, narrator: Narrator
) -> list[str]:
    """Solves the head on features that are computed once, and writes it into the model.

    Returns:
        sentences for the report.
    """
    output = plan.anatomy.output
    assert output is not None
    model.to(placement.device)
    linear = model.get_submodule(output)
    intercept = getattr(linear, "bias", None) is not None
    body = {name: value for name, value in model.state_dict().items() if not name.startswith(f"{output}.")}
    known = [*job.rows_of(model, placement.device), models.digest(body), output, intercept, job.task.num_labels]
    kept = job.stock.arrays(key("probe", *known), lambda: _probe(job, plan, model, placement, intercept, narrator))
    probe = head.Probe.of(kept)
    head.write(probe, linear)
    trace.seconds += float(kept["seconds"])  # also where another run solved it: it is what this head costs
    rows, width = len(job.encoded["train"]), probe.weight.shape[1]
    notes = [f"the head is solved on {rows} rows of {width} features, strength {probe.strength:.3g}"]
    if crossed(job):
        few = len(job.encoded.get("validation", ()))
        notes.append(f"with {few} validation rows its strength is chosen by cross-validation on the training rows")
    if not probe.converged:
        notes.append("the solver stopped before it converged; its last head is used")
    hidden = [part.canonical for part in plan.anatomy.parts if part.role == "head" and not part.name.startswith(output)]
    if hidden:
        notes.append(f"only {output} is solved; the head's other layers ({', '.join(hidden)}) keep their random start")
    return notes


def crossed(job: Job) -> bool:
    """Whether the strength is chosen by cross-validation on the training rows: validation is small, and they will do."""
    few = len(job.encoded.get("validation", ())) < FEW_TO_CALIBRATE
    return few and (job.task.kind == "regression" or head.folds(job.targets("train")))


def _probe(
    job: Job, plan: StagePlan, model: nn.Module, placement: Placement, intercept: bool, narrator: Narrator
) -> Arrays:
    begun = time.perf_counter()
    splits = ["train"] if crossed(job) else [name for name in ("train", "validation") if name in job.encoded]
    features: dict[str, Any] = {}
    with (
        quickly(model, placement),
        narrator.bar(f"{plan.name}: features", sum(len(job.encoded[name]) for name in splits)) as bar,
        frozen.read_out(model, plan.anatomy),
    ):
        for name in splits:
            features[name] = logits(model, job.encoded[name], pad_id=job.pad_id, placement=placement, tick=bar.advance)
    targets = {name: job.targets(name) for name in splits}
    held = (features["validation"], targets["validation"]) if "validation" in splits else None
    if job.task.kind == "classification":
        probe = head.solve_classification(
            features["train"],
            targets["train"],
            classes=job.task.num_labels,
            validation=held,
            intercept=intercept,
        )
    else:
        probe = head.solve_regression(features["train"], targets["train"], validation=held, intercept=intercept)
    return {**probe.arrays(), "seconds": np.array(time.perf_counter() - begun)}
