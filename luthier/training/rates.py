"""Trial stages before a stage: the learning rate that a stage asks for is chosen by validation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from luthier.core.claims import Place
from luthier.core.ingredient import Tries
from luthier.core.scores import HIGHER_IS_BETTER, better
from luthier.errors import Fault, RunError
from luthier.narrate import Narrator
from luthier.placement import Placement
from luthier.planning.compose import compose, skeleton
from luthier.planning.plan import Entry, Plan, StagePlan
from luthier.recipe import registry
from luthier.recipe.recipe import Recipe, Stage
from luthier.training import stages
from luthier.training.job import Job
from luthier.training.trace import Hooks, Trace

# An ingredient that claims nothing else takes part in a trial: schedules, optimizers, clipping.
_TAKEN = {Place.LR, Place.DECAY, Place.OPTIMIZER, Place.GRADIENT}


def asked(plan: StagePlan) -> Tries | None:
    """The learning rates that the stage is to choose from; None when its rate is written."""
    found = [tries for entry in plan.entries if (tries := entry.ingredient.tries()) is not None]
    return found[0] if found else None


def choose(
    job: Job, plan: StagePlan, tries: Tries, placement: Placement, narrator: Narrator, stop: Callable[[], bool]
) -> dict[str, Any]:
    """Trains what ``tries`` keeps at each of its rates, from the weights as they are, and compares them on the validation rows.

    Returns:
        ``rate``: the best, of equal ones the lowest; ``tried``: (rate, score) of each, a score of None where the loss was no number;
        ``metric``. The weights are as they were.
    Raises:
        RunError: no rate gave a score that is a number.
        Stopped: someone asked to stop.
    """
    model = job.loaded.model
    kept = {name: value.detach().clone() for name, value in model.state_dict().items()}
    tried: list[tuple[float, float | None]] = []
    best: tuple[float, float] | None = None
    for rate in sorted(tries.rates):
        value = _tried(job, plan, tries, rate, placement, narrator, stop)
        model.load_state_dict(kept)
        tried.append((rate, value))
        if better(value, best[1] if best else None, higher=HIGHER_IS_BETTER[job.metric]):
            assert value is not None
            best = rate, value
    if best is None:
        must = f"must give a {job.metric} that is a number for one of the rates tried"
        raise RunError.of([Fault(plan.name, must, "none of them", "Try lower rates.")], "the search for a rate")
    return {"rate": best[0], "tried": [list(one) for one in tried], "metric": job.metric}


def rated(job: Job, found: Mapping[str, dict[str, Any]]) -> Plan:
    """The job's plan with the learning rates that were ``found``, by the stage's name, as ``choose`` gave them."""
    stages_ = (
        dataclasses.replace(stage, learning_rate=found[stage.name]["rate"]) if stage.name in found else stage
        for stage in job.recipe.stages
    )
    recipe = dataclasses.replace(job.recipe, stages=tuple(stages_))
    made = compose(recipe, skeleton(job.loaded.model), lengths=job.training.lengths, out_domain=_spare(job))
    return Plan(job.recipe, made.stages)


def told(stage: str, found: dict[str, Any]) -> str:
    """The choice for a stage as a sentence."""
    each = ", ".join(f"{rate:g} {'no number' if score is None else f'{score:.4g}'}" for rate, score in found["tried"])
    return (
        f"{stage}: the learning rate {found['rate']:g} was chosen by {found['metric']} on the validation rows ({each})"
    )


def _tried(
    job: Job,
    plan: StagePlan,
    tries: Tries,
    rate: float,
    placement: Placement,
    narrator: Narrator,
    stop: Callable[[], bool],
) -> float | None:
    freeze = registry.find("freeze")(keep=tries.keep)  # type: ignore[call-arg]
    stage = Stage(
        name=f"{plan.name} at {rate:g}",
        ingredients=(freeze, *(entry.ingredient for entry in plan.entries if _takes_part(entry))),
        epochs=tries.epochs,
        learning_rate=rate,
        batch_size=plan.stage.batch_size,
        micro_batch=plan.stage.micro_batch,
    )
    recipe: Recipe = dataclasses.replace(job.recipe, stages=(stage,))
    made = compose(recipe, skeleton(job.loaded.model), lengths=job.training.lengths, out_domain=_spare(job))
    trial = dataclasses.replace(job, recipe=recipe, plan=made)
    run, inner = stages.attach(trial, made.stages[0], job.loaded.model, placement)
    stages.keep_frozen(trial, run, inner, placement, narrator)
    hooks = Hooks(save=lambda step, run: None, stop=stop, log=lambda values: None)
    value: float | None = None
    try:
        stages.train(trial, run, placement, Trace(), hooks, narrator)
        value = stages.score(trial, run.forward, placement)[job.metric]
    except stages.NotFinite:
        pass
    placement.settle(run.model)
    run.finish()
    for weight in job.loaded.model.parameters():
        weight.requires_grad_(True)
        weight.grad = None
    return value if value is not None and math.isfinite(value) else None


def _spare(job: Job) -> int:
    return len(job.training) - len(job.encoded["train"])


def _takes_part(entry: Entry) -> bool:
    return entry.ingredient.tries() is None and {claim.place for claim in entry.claims} <= _TAKEN
