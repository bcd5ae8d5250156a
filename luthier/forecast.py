"""forecast: what luthier plan does. Everything is checked, one step is timed on a copy, nothing is written."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.core.seeds import remembered
from luthier.narrate import Narrator, Silent
from luthier.outputs import logits
from luthier.placement import Placement
from luthier.planning.plan import Plan, StagePlan
from luthier.quick import QuickRandom, keep_memory, quicken
from luthier.recipe import text as recipes
from luthier.recipe.recipe import Recipe
from luthier.training import stages
from luthier.training.job import Columns, Job, prepare
from luthier.units import duration, memory_peak, size


def forecast(
    recipe: str | Path | Recipe,
    *,
    model: Any,
    data: Any = None,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    task: str | None = None,
    ood: Mapping[str, Any] | None = None,
    out_domain: Any = None,
    label_map: Mapping[str, Mapping[str, str]] | None = None,
    seed: int | None = None,
    sets: Sequence[str] = (),
    timed: bool = True,
    narrator: Narrator | None = None,
) -> Plan:
    """The plan of a run, shown, with the minutes and the memory it will take.

    Args:
        timed: whether up to three steps of each stage are taken, on a copy of the model, to forecast its time.
    Raises:
        LuthierError: whatever ``fit`` would refuse before its first step.
    """
    say = narrator or Silent()
    keep_memory()
    known = recipes.read(recipe, sets=[*sets, *([f"task={task}"] if task else [])], seed=seed)
    placement = Placement(precision=known.precision, compile=known.compile)
    job = prepare(
        known,
        model=model,
        data_source=known.source("in", data),
        columns=Columns(text, text_pair, label),
        ood=ood,
        out_domain=known.source("out", out_domain),
        label_map=label_map,
        voids=placement.voids(),
        narrator=say,
    )
    say.show(job.plan)
    if not timed:
        return job.plan
    say.line()
    total = 0.0
    for plan in job.plan.stages:
        seconds, how = _stage_seconds(job, plan, placement)
        total += seconds
        say.line(f"stage {plan.name!r}: about {duration(seconds)} ({how})")
    say.line(
        f"training: about {duration(total)} here, without evaluations; memory in use now {size(memory_peak(placement.device))}"
    )
    return job.plan


def _stage_seconds(job: Job, plan: StagePlan, placement: Placement) -> tuple[float, str]:
    if plan.stage.solver == "exact":
        train = job.encoded["train"]
        some = train.take(range(0, len(train), max(1, len(train) // 32)))
        looked = copy.deepcopy(job.loaded.model).to(placement.device)
        begun = time.perf_counter()
        logits(looked, some, pad_id=job.pad_id, placement=placement)
        seconds = time.perf_counter() - begun
        count = sum(len(job.encoded[name]) for name in ("train", "validation") if name in job.encoded)
        return seconds / len(some) * count, f"features of {count} rows, then the solver"
    try:
        run, _ = stages.attach(job, plan, copy.deepcopy(job.loaded.model), placement)
    except Exception as error:  # a later stage may need what an earlier one leaves
        return 0.0, f"not timed: {error}"
    quick = QuickRandom(job.recipe.seed)
    handle = quicken(run.model, quick) if placement.device.type == "cpu" else None
    put_back = remembered([placement.device])
    taken: list[float] = []
    try:
        for step, rows, _ in stages.steps(plan, 0):
            begun = time.perf_counter()
            run.offer(stages.closure(job, run, placement, quick, step, rows))
            run.step(placement.take)
            taken.append(time.perf_counter() - begun)
            if step == 2:
                break
    finally:
        put_back()
        if handle is not None:
            handle.remove()
    each = min(taken)
    return each * plan.steps, f"{plan.steps} steps of {each * 1000:.0f} ms"
