"""What a comparison can be refused for, found before its first run."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from luthier.call import Call
from luthier.errors import Fault, LuthierError
from luthier.narrate import Narrator, Silent
from luthier.recipe.recipe import Recipe
from luthier.sources import checks as sources
from luthier.sources.data import digest
from luthier.stock import Stock
from luthier.training.job import Columns, Job, fits, prepare
from luthier.trials.design import Design
from luthier.trials.desk import Desk
from luthier.trials.early import Early
from luthier.trials.misleading import misleads
from luthier.trials.reading import inside
from luthier.trials.stale import stale


def check(design: Design, say: Narrator, desk: Desk) -> dict[str, int]:
    """Everything that can be found wrong is found before the first run: each recipe is planned in each setting.

    Returns:
        by setting, bytes of the weights that a run has in the end, the most that any recipe's has.
    Raises:
        LuthierError: with every fault.
    """
    faults: list[Fault] = []
    tasks: dict[str, Job] = {}  # the first job of each
    stock = Stock()
    kept: dict[str, int] = {}
    for asked in design.settings:
        jobs: dict[str, Job] = {}  # by what of a recipe decides how the data and the model are read
        for name in design.recipes:
            recipe = design.recipe(design.trial(asked.name, name, design.seeds[0]))
            where = name if len(design.settings) == 1 else f"{asked.name}: {name}"
            try:
                rows = [recipe.source("in", asked.call.data), recipe.source("out", asked.call.out_domain)]
                kind = json.dumps([recipe.task, recipe.max_length, recipe.head, recipe.seed_of("split"), *rows])
                if kind in jobs:
                    plan = fits(recipe, jobs[kind])
                else:
                    jobs[kind] = _job(recipe, asked.call, say if not jobs else Silent(), stock)
                    plan = jobs[kind].plan
                    tasks.setdefault(jobs[kind].task.kind, jobs[kind])
                    first = next(iter(jobs.values()))
                    if _measured(jobs[kind]) != _measured(first):
                        must = f"must be measured on the rows of {first.recipe.name}, as runs are paired by row"
                        do = "Give --data for all, or leave 'seeds: {split: ...}' out."
                        faults.append(Fault(where, must, jobs[kind].data.source, do))
                kept[asked.name] = max(kept.get(asked.name, 0), _bytes(jobs[kind].loaded.model))
                trials = [one for one in design.trials() if (one.setting, one.recipe) == (asked.name, name)]
                faults += stale([one for one in trials if desk.done(one)], desk, jobs[kind])
                if early := Early.of(design):
                    looks = misleads(plan, early.share, validation="validation" in jobs[kind].encoded)
                    faults += [dataclasses.replace(fault, where=f"{where}: {fault.where}") for fault in looks]
            except LuthierError as error:
                if not jobs:
                    raise  # the data or the model: no recipe can do with it
                faults += inside(where, error)
    leads = {recipe.metric for recipe in map(design.recipe, design.trials()) if recipe.metric}
    if design.metric is None and len(leads) > 1:
        do = "Say --metric."
        faults.append(
            Fault("the recipes", "must be compared by one metric", f"{', '.join(sorted(leads))} of their own", do)
        )
    if len(tasks) > 1:
        told = ", ".join(f"{job.data.source} as {kind}" for kind, job in tasks.items())
        do = "Compare each in a folder of its own, or say --task."
        faults.append(Fault("the data", "must be of one task, as one metric tells all of it", told, do))
    elif design.metric is not None:
        try:
            for job in tasks.values():
                sources.check(job.data, job.task, metrics={"--metric": design.metric})
        except LuthierError as error:
            faults += error.faults
    if faults:
        raise LuthierError.of(faults, "the recipes for this model and data")
    return kept


def _bytes(model: Any) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def _measured(job: Job) -> str:
    """The digest of the rows that a run is measured on."""
    splits = job.data.splits.items()
    return digest({name: split for name, split in splits if name not in ("train", "out_domain")})


def _job(recipe: Recipe, call: Call, say: Narrator, stock: Stock) -> Job:
    told = call.arguments()
    columns = Columns(told.pop("text"), told.pop("text_pair"), told.pop("label"))
    rows, other = recipe.source("in", told.pop("data")), recipe.source("out", told.pop("out_domain"))
    return prepare(recipe, data_source=rows, out_domain=other, columns=columns, narrator=say, stock=stock, **told)
