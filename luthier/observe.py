"""What an ingredient really changes: each claimable place, looked at on a tiny model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from luthier.core.anatomy import Anatomy
from luthier.core.claims import Place
from luthier.core.context import Around, Context, Progress, Shelf
from luthier.core.ingredient import Ingredient, Outputs
from luthier.core.modes import paused
from luthier.core.stream import Shuffled
from luthier.core.table import ParamTable
from luthier.planning.compose import compose, skeleton
from luthier.recipe.recipe import Recipe, Stage
from luthier.run import Run, own_loss

STEPS = 6
RATE = 1e-2


@dataclass
class Observed:
    """Places that changed, and the weights by canonical name at which they did where that can be told."""

    places: set[Place] = field(default_factory=set)
    names: dict[Place, set[str]] = field(default_factory=dict)

    def add(self, place: Place, names: set[str] | None = None) -> None:
        self.places.add(place)
        if names is not None:
            self.names.setdefault(place, set()).update(names)


def stage(ingredient: Ingredient) -> Recipe:
    """A recipe of this ingredient alone, at a rate that moves weights."""
    return Recipe(
        name="check", stages=(Stage(ingredients=(ingredient,), steps=STEPS, learning_rate=RATE, batch_size=4),)
    )


def begin(ingredient: Ingredient, model: nn.Module, sample: list[Any]) -> Run:
    """The ingredient attached to a live model."""
    plan = compose(stage(ingredient), skeleton(model), lengths=[8] * 32, out_domain=8)
    return Run(plan.stages[0], model, seed=0, around=Around(own_loss, sample, _score))


@torch.no_grad()
def _score(model: nn.Module) -> dict[str, float]:
    """The model's accuracy and loss on twelve rows, in eval mode; its mode comes back."""
    with paused(model):
        made = [model(**batch(number)) for number in range(95, 98)]
    right = [(out.logits.argmax(1) == batch(number)["labels"]).float() for number, out in enumerate(made, start=95)]
    return {"accuracy": float(torch.cat(right).mean()), "nll": float(sum(out.loss for out in made) / len(made))}


def batch(number: int) -> dict[str, Tensor]:
    """The same four rows of eight tokens for the same number."""
    draw = torch.Generator().manual_seed(number)
    tokens = torch.randint(3, 60, (4, 8), generator=draw)
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": torch.tensor([0, 1, 2, number % 3]),
    }


def step(run: Run, number: int) -> None:
    """One step, dropout seeded by its number."""
    torch.manual_seed(1000 + number)
    run.offer(run.closure(batch(number)))
    run.step()


def observe(ingredient: Ingredient, make: Callable[[], nn.Module]) -> Observed:
    """Everything that one stage with ``ingredient`` changes, compared with a stage without it."""
    seen = Observed()
    _settings(ingredient, make(), seen)
    _surgery(ingredient, make(), seen)
    _hooks(ingredient, make, seen)
    _finish(ingredient, make(), seen)
    _others(ingredient, make(), seen)
    return seen


def _settings(ingredient: Ingredient, model: nn.Module, seen: Observed) -> None:
    anatomy = Anatomy.of(begin(ingredient, model, [batch(0)]).model)
    before = ParamTable.start(anatomy, learning_rate=RATE, steps=STEPS)
    after = ingredient.settings(before)
    for old, new in zip(before.rows, after.rows, strict=True):
        if (new.lr_scale, new.schedule) != (old.lr_scale, old.schedule):
            seen.add(Place.LR, {new.part.canonical})
        if new.weight_decay != old.weight_decay:
            seen.add(Place.DECAY, {new.part.canonical})
        if (new.trainable, new.asleep) != (old.trainable, old.asleep):
            seen.add(Place.TRAINABLE)


def _surgery(ingredient: Ingredient, model: nn.Module, seen: Observed) -> None:
    before = {part.canonical: value.clone() for part, value in _values(model)}
    kinds = _kinds(model)
    run = begin(ingredient, model, [batch(0)])
    after = {part.canonical: value for part, value in _values(run.model)}
    changed = {name for name, value in before.items() if name in after and not torch.equal(value, after[name])}
    if changed:
        seen.add(Place.START_WEIGHTS, changed)
    if _kinds(model) != kinds:
        seen.add(Place.MODULES)
    mixed = {name for name, module in model.named_modules() if parametrize.is_parametrized(module)}
    if mixed:
        seen.add(Place.FORWARD_WEIGHTS, {f"{name}.{weight}" for name in mixed for weight in _parametrized(model, name)})


def _parametrized(model: nn.Module, name: str) -> list[str]:
    return list(model.get_submodule(name).parametrizations)  # type: ignore[arg-type]


def _kinds(model: nn.Module) -> list[tuple[str, str]]:
    """Module names and kinds, without what parametrizations add."""
    return [
        (name, type(module).__name__.removeprefix("Parametrized"))
        for name, module in model.named_modules()
        if "parametrizations" not in name
    ]


def _hooks(ingredient: Ingredient, make: Callable[[], nn.Module], seen: Observed) -> None:
    run = begin(ingredient, make(), [batch(0)])
    if hasattr(run.optimizer, "offer"):
        seen.add(Place.STEP)
    ctx = run._context(next(entry for entry in run.plan.entries if entry.name == ingredient.name()))

    def plain(model: nn.Module, rows: Any) -> Tensor:
        loss: Tensor = model(**rows).loss
        return loss

    if ingredient.loss(plain, ctx) is not plain:
        seen.add(Place.LOSS)
    weights = {name: value for name, value in run.model.named_parameters() if value.requires_grad}
    group = {"params": list(weights.values()), "names": tuple(weights), "initial_lr": 0.0, "weight_decay": 0.0}
    probe = torch.optim.SGD([group], lr=0.0)
    made: Optimizer = ingredient.optimizer(probe, ctx)
    if type(made) is not type(probe):
        seen.add(Place.OPTIMIZER)
    elif made is probe:
        before = {name: (torch.arange(value.numel()) + 1.0).view_as(value).to(value) for name, value in weights.items()}
        for name, value in weights.items():
            value.grad = before[name].clone()
        made.step()
        changed = {name for name, v in weights.items() if v.grad is None or not torch.equal(before[name], v.grad)}
        if changed:
            seen.add(Place.GRADIENT, {ctx.anatomy.part(name).canonical for name in changed})


def _finish(ingredient: Ingredient, model: nn.Module, seen: Observed) -> None:
    """Weights that ``finish`` changes beyond what undoing a change of structure does: a plain model's outputs differ."""
    run = begin(ingredient, model, [batch(0)])
    for number in range(STEPS):
        step(run, number)
    before, kinds = {part.canonical: value.clone() for part, value in _values(model)}, _kinds(model)
    run.finish()
    if _kinds(model) != kinds:
        return  # merged or taken out: the weights change so that the outputs do not
    after = {part.canonical: value for part, value in _values(model)}
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    if changed:
        seen.add(Place.END_WEIGHTS, changed)


def _others(ingredient: Ingredient, model: nn.Module, seen: Observed) -> None:
    anatomy = Anatomy.of(model)
    claims = ingredient.touches()

    def ctx() -> Context:
        return Context(anatomy, Progress(STEPS), 0, "check/other", claims, Shelf(), [])

    draw = np.random.default_rng(0)
    lengths = tuple(int(length) for length in draw.integers(3, 30, 32))
    stream = Shuffled(lengths, 4, 0, spare=tuple(range(24, 32)))
    other = ingredient.batches(stream, ctx())
    if other is not stream and other.epoch(0) != stream.epoch(0):
        seen.add(Place.BATCHES)
    logits = draw.normal(size=(200, 3)) * 4  # sure of themselves, and right three times in five
    labels = np.where(draw.random(200) < 0.6, logits.argmax(axis=1), draw.integers(0, 3, 200))
    outputs: Mapping[str, Outputs] = {"validation": Outputs(logits, labels)}
    found = ingredient.measure(outputs, ctx())
    if found is not None and found.changes:
        seen.add(Place.PREDICTIONS)


def _values(model: nn.Module) -> list[tuple[Any, Tensor]]:
    weights = dict(model.named_parameters())
    return [(part, weights[part.name].detach()) for part in Anatomy.of(model).parts]
