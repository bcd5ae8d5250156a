"""compose: a recipe and a model's skeleton become a Plan. Here a mistake surfaces, before any weight moves.

The skeleton is a copy of the model without storage, so planning needs no memory, touches no live weight and draws no number from a
global generator. A plan is a frozen value: it can be printed, compared and tested without a GPU.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import nn

from luthier.core.anatomy import WORDS, Anatomy
from luthier.core.claims import Claim, Place, conflicts, needs
from luthier.core.claims import voids as gone
from luthier.core.context import Context, Progress, Shelf
from luthier.core.families import Family
from luthier.core.heads import two_layers
from luthier.core.ingredient import Ingredient
from luthier.core.stream import Shuffled, Stream
from luthier.core.table import ParamTable
from luthier.cost import Memory, forecast
from luthier.errors import ConflictError, Fault, LuthierError, RecipeError
from luthier.plan_view import as_json, as_text
from luthier.recipe import registry
from luthier.recipe.recipe import Recipe, Stage


@dataclass(frozen=True)
class Entry:
    """An ingredient at its place in a stage: its name, its claims, and the key of its random streams and kept state."""

    name: str
    ingredient: Ingredient
    claims: tuple[Claim, ...]
    key: str
    default: bool = False

    def owns(self, *places: Place) -> bool:
        return any(claim.how == "owns" and claim.place in places for claim in self.claims)

    def claims_any(self, *places: Place) -> bool:
        return any(claim.place in places for claim in self.claims)

    @property
    def structural(self) -> bool:
        """Whether it changes the model's structure."""
        return self.claims_any(Place.MODULES, Place.FORWARD_WEIGHTS)


@dataclass(frozen=True)
class StagePlan:
    """One stage, made definite for one model and one set of rows.

    Args:
        entries: the ingredients in the order in which their hooks nest.
        anatomy: the model's parts after this stage's surgery.
        table: one row a parameter.
        steps: optimizer steps; 0 when the head is solved.
        stream: which rows make which step; None when the rows are not known (one's own loop).
        memory: the forecast, by part.
        family: where the parts are, for reading the model's anatomy at any time; with ``head: mlp``, both layers in the head.
    """

    stage: Stage
    index: int
    entries: tuple[Entry, ...]
    anatomy: Anatomy
    table: ParamTable
    steps: int
    stream: Stream | None
    memory: Memory
    notes: tuple[str, ...]
    family: Family | None = None

    @property
    def name(self) -> str:
        return self.stage.name

    def context(self, entry: Entry, *, seed: int, progress: Progress, shelf: Shelf, notes: list[str]) -> Context:
        """What the hooks of ``entry`` see when no model is attached."""
        return Context(self.anatomy, progress, seed, entry.key, entry.claims, shelf, notes)

    @property
    def trainable(self) -> int:
        """Trainable weights, counted."""
        return sum(row.part.numel for row in self.table.rows if row.trainable)


@dataclass(frozen=True)
class Plan:
    """A recipe made definite: order, tables, steps, cost. Holds no weights."""

    recipe: Recipe
    stages: tuple[StagePlan, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values: what plan.json holds."""
        return as_json(self)

    def __str__(self) -> str:
        return as_text(self)


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose weights and buffers have shapes but no storage (the meta device)."""
    memo: dict[int, object] = {}
    for weight in model.parameters():
        memo[id(weight)] = nn.Parameter(weight.detach().to("meta"), requires_grad=weight.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, memo)


def compose(
    recipe: Recipe,
    shape: nn.Module,
    *,
    lengths: Sequence[int] | None = None,
    out_domain: int = 0,
    voids: Sequence[Claim] = (),
    goes_on: bool = False,
    where: str = "",
) -> Plan:
    """Makes a recipe definite for one model and one set of training rows.

    Args:
        recipe: what is to be done.
        shape: the model's skeleton (see ``skeleton``); changed in place by the recipe's surgery.
        lengths: tokens in each training row; None when stages say their steps.
        out_domain: how many of them, the last ones, are out-domain rows.
        voids: what the surroundings do away with (sharded weights, another trainer's own clipping).
        goes_on: whether what a stage leaves is used: by the next stage, what it carries, and at the end by who asked for the run.
        where: the recipe's file, for messages.
    Raises:
        RecipeError: values that cannot hold for this model or these rows, or an ingredient that matches nothing.
        ConflictError: ingredients that cannot share a stage. All faults of all stages are told at once.
        ModelError: the model cannot have the head that the recipe asks for.
    """
    faults: list[Fault] = []
    clashes: list[Fault] = []
    around = (*voids, *(() if out_domain else (gone(Place.OUT_DOMAIN),)))
    known = None if lengths is None else (tuple(lengths), out_domain)
    family = two_layers(shape, recipe.family) if recipe.head == "mlp" else recipe.family
    many = range(len(recipe.stages))
    plans = [_stage(recipe, at, shape, family, known, around, goes_on, faults, clashes) for at in many]
    inside = where or recipe.name
    if faults:
        raise RecipeError.of([*faults, *clashes], inside)
    if clashes:
        raise ConflictError.of(clashes, inside)
    return Plan(recipe, tuple(plan for plan in plans if plan))


def _stage(
    recipe: Recipe,
    index: int,
    shape: nn.Module,
    family: Family | None,
    lengths: tuple[tuple[int, ...], int] | None,
    voids: tuple[Claim, ...],
    goes_on: bool,
    faults: list[Fault],
    clashes: list[Fault],
) -> StagePlan | None:
    stage = recipe.stages[index]
    label = f"stages[{index}] {stage.name!r}"
    entries = _entries(stage, label, faults)
    before = Anatomy.of(shape, family)
    notes: list[str] = []
    shelf = Shelf()

    def context(entry: Entry, anatomy: Anatomy, steps: int) -> Context:
        return Context(anatomy, Progress(steps), recipe.seed, entry.key, entry.claims, shelf, notes)

    structural = [entry for entry in entries if entry.structural and entry.ingredient.uses("surgery")]
    try:
        for entry in structural:
            entry.ingredient.surgery(shape, context(entry, before, 0))
        anatomy = Anatomy.of(shape, family)
        stream, steps = _length(recipe, stage, index, entries, lengths, lambda e: context(e, anatomy, 0))
        table = ParamTable.start(
            anatomy,
            learning_rate=stage.learning_rate,
            steps=steps,
            epoch=stream.count(0) if stream else 0,
            seed=recipe.seed,
        )
    except LuthierError as error:
        if not error.faults:
            raise  # a missing package, say: its message is all there is
        faults.extend(Fault(f"{label} {fault.where}", fault.must, fault.got, fault.do) for fault in error.faults)
        return None
    for entry in sorted(
        entries, key=lambda entry: entry.owns(Place.END_WEIGHTS)
    ):  # averages take the end of a schedule over
        try:
            table = entry.ingredient.settings(table.signed(entry.name))
        except LuthierError as error:
            if not error.faults:
                raise
            faults.extend(Fault(f"{label} {fault.where}", fault.must, fault.got, fault.do) for fault in error.faults)
    faults.extend(_idle(entries, before, anatomy, label))
    faults.extend(_on_frozen(entries, before, table, label))
    faults.extend(_carried(stage, before, label))
    edges = {0.0, *(edge for row in table.rows for share in row.asleep for edge in share if edge < 1.0)}
    idle = [edge for edge in sorted(edges) if not any(row.learns(edge) for row in table.rows)]
    if idle:
        when = f" from {idle[0]:.0%} of it on" if idle[0] or any(row.trainable for row in table.rows) else ""
        faults.append(Fault(label, f"trains no weight{when}", do="Freeze less, or drop the stage."))
    carried = stage.carry if stage.carry and index + 1 < len(recipe.stages) else ("all",)
    around = [
        ("the surroundings", voids),
        ("the stages before", (needs(Place.EARLIER),) if index else ()),
        ("the run", (needs(Place.GOES_ON, *carried),) if goes_on else ()),
    ]
    claimed = [(entry.name, entry.claims) for entry in entries] + around
    if stage.solver == "exact":
        faults.extend(_unsolvable(entries, table, anatomy, label))
    told = conflicts(claimed, lambda at: _select(at, before) | _select(at, anatomy), label)
    clashes.extend(told)
    if not told:  # two that cannot share the stage may leave each other nothing
        faults.extend(_workless(entries, before, table, label))
    for entry in reversed(structural):
        if entry.ingredient.uses("finish"):
            entry.ingredient.finish(shape, context(entry, anatomy, steps))
    memory = forecast(shape, table, [entry.ingredient for entry in entries], stage, stream)
    return StagePlan(stage, index, entries, anatomy, table, steps, stream, memory, tuple(notes), family)


def _entries(stage: Stage, label: str, faults: list[Fault]) -> tuple[Entry, ...]:
    made: list[Entry] = []
    for ingredient in stage.ingredients:
        name = ingredient.name()
        if any(entry.name == name for entry in made):
            faults.append(Fault(f"{label} {name}", "stands twice in one stage", do="Keep one."))
            continue
        made.append(Entry(name, ingredient, ingredient.touches(), f"{stage.name}/{name}"))
    if stage.solver == "sgd" and not any(entry.owns(Place.OPTIMIZER) for entry in made):
        name = registry.DEFAULT_OPTIMIZER
        default = registry.find(name)()
        made.insert(0, Entry(name, default, default.touches(), f"{stage.name}/{name}", default=True))
    return tuple(made)


def _length(
    recipe: Recipe,
    stage: Stage,
    index: int,
    entries: Sequence[Entry],
    lengths: tuple[tuple[int, ...], int] | None,
    context: object,
) -> tuple[Stream | None, int]:
    if stage.solver == "exact":
        return None, 0
    stream: Stream | None = None
    if lengths is not None:
        rows, spare = lengths
        stream = Shuffled(
            rows, stage.batch_size, recipe.seed_of("order"), index, tuple(range(len(rows) - spare, len(rows)))
        )
        for entry in entries:
            stream = entry.ingredient.batches(stream, context(entry))  # type: ignore[operator]
    if stage.steps is not None:
        return stream, stage.steps
    if stage.epochs is None:
        raise RecipeError.of([Fault("", "must say epochs or steps")], "the plan")
    if stream is None:
        raise RecipeError.of([Fault("", "must say steps, as the rows are not known")], "the plan")
    whole = math.floor(stage.epochs)
    steps = sum(stream.count(number) for number in range(whole))
    return stream, max(1, steps + round((stage.epochs - whole) * stream.count(whole)))


def _select(where: Sequence[str], anatomy: Anatomy) -> frozenset[str]:
    found: frozenset[str] = frozenset()
    for selector in where:
        with suppress(RecipeError):  # a number that cannot be: its ingredient tells
            found |= anatomy.select(selector)
    return found


def _idle(entries: Sequence[Entry], before: Anatomy, after: Anatomy, label: str) -> list[Fault]:
    """An ingredient that names weights and matches none would do nothing, silently."""
    faults: list[Fault] = []
    for entry in entries:
        for selector in dict.fromkeys(at for claim in entry.claims if claim.how != "voids" for at in claim.where):
            if selector in WORDS and any(
                _select(claim.where, after) for claim in entry.claims if selector in claim.where
            ):
                continue  # a model may have no bridge; a word is no slip of the pen
            try:
                found = any(anatomy.select(selector) for anatomy in (after, before))
            except RecipeError as error:
                faults.extend(
                    Fault(f"{label} {entry.name} {one.where}", one.must, one.got, one.do) for one in error.faults
                )
                continue
            if not found:
                some = ", ".join(part.canonical for part in after.parts[:3])
                faults.append(
                    Fault(
                        f"{label} {entry.name}",
                        f"matches no weight with {selector!r}",
                        do=f"Weights are named like {some}.",
                    )
                )
    return faults


def _on_frozen(entries: Sequence[Entry], before: Anatomy, table: ParamTable, label: str) -> list[Fault]:
    """An ingredient that edits gradients of frozen weights alone would do nothing, silently; of no weight is told by ``_idle``."""
    trainable = {row.name for row in table.rows if row.trainable}
    faults: list[Fault] = []
    for entry in entries:
        wheres = {
            claim.where for claim in entry.claims if claim.place == Place.GRADIENT and claim.how in ("owns", "wraps")
        }
        for where in wheres:
            chosen = _select(where, table.anatomy)
            if where != ("all",) and (chosen or _select(where, before)) and not chosen & trainable:
                must = "must edit weights that learn in this stage"
                faults.append(Fault(f"{label} {entry.name}", must, f"{', '.join(where)}, all frozen", "Choose others."))
    return faults


def _workless(entries: Sequence[Entry], before: Anatomy, table: ParamTable, label: str) -> list[Fault]:
    """An ingredient that finds no weight to work on that learns would do nothing, silently; who names none is told by ``_idle``."""
    trainable = {row.name for row in table.rows if row.trainable}
    started = frozenset(part.canonical for part in before.parts)
    must = "must work on some weight that learns in this stage"
    faults = []
    for entry in entries:
        part = entry.ingredient
        named = all(_select(claim.where, before) for claim in entry.claims if claim.how == "needs")
        works = part.works_on(table, started) if named else None
        if works is not None and not works & trainable:
            do = f"Choose others (luthier card {entry.name} says which it takes), or drop it."
            faults.append(Fault(f"{label} {entry.name}", must, "none", do))
    return faults


def _carried(stage: Stage, anatomy: Anatomy, label: str) -> list[Fault]:
    faults = []
    for selector in stage.carry or ():
        try:
            if not anatomy.select(selector) and selector not in WORDS:
                faults.append(Fault(f"{label} carry", f"matches no weight with {selector!r}"))
        except RecipeError as error:
            faults.extend(Fault(f"{label} carry {one.where}", one.must, one.got, one.do) for one in error.faults)
    return faults


def _unsolvable(entries: Sequence[Entry], table: ParamTable, anatomy: Anatomy, label: str) -> list[Fault]:
    faults = []
    hooks = ("surgery", "batches", "loss", "optimizer")
    for entry in entries:
        used = [hook for hook in hooks if entry.ingredient.uses(hook)]
        if used:
            faults.append(
                Fault(
                    f"{label} {entry.name}",
                    "cannot work with solver: exact, which takes no steps",
                    do="Drop it, or say solver: sgd.",
                )
            )
    if anatomy.output is None:
        faults.append(Fault(label, "solver: exact needs a head that ends in a linear layer"))
    outside = [row.name for row in table.rows if row.trainable and row.part.role != "head"]
    if outside:
        faults.append(
            Fault(
                label,
                "solver: exact trains only the head",
                f"{len(outside)} trainable weights outside it, such as {outside[0]}",
                "Add freeze: {keep: [head]}, or say solver: sgd.",
            )
        )
    return faults
