"""compose: a recipe and a model's skeleton become a Plan. Here a mistake surfaces, before any weight moves.

The skeleton is a copy of the model without storage, so planning needs no memory, touches no live weight and draws no number from a
global generator.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from luthier.core.anatomy import Anatomy
from luthier.core.claims import Claim, Place, conflicts, needs
from luthier.core.claims import voids as gone
from luthier.core.context import Context, Progress, Shelf
from luthier.core.families import Family
from luthier.core.heads import two_layers
from luthier.core.stream import Shuffled, Stream
from luthier.core.table import ParamTable
from luthier.errors import ConflictError, Fault, LuthierError, RecipeError
from luthier.planning import checks
from luthier.planning.cost import forecast
from luthier.planning.plan import Entry, Plan, StagePlan
from luthier.recipe import registry
from luthier.recipe.recipe import Recipe, Stage


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
        ModelError: the model's parts cannot be told apart, or it cannot have the head that the recipe asks for.
    """
    around = (*voids, *(() if out_domain else (gone(Place.OUT_DOMAIN),)))
    family = two_layers(shape, recipe.family) if recipe.head == "mlp" else recipe.family
    rows = None if lengths is None else (tuple(lengths), out_domain)
    composer = _Composer(recipe, shape, family, rows, around, goes_on)
    plans = [composer.stage(at) for at in range(len(recipe.stages))]
    inside = where or recipe.name
    if composer.faults:
        raise RecipeError.of([*composer.faults, *composer.clashes], inside)
    if composer.clashes:
        raise ConflictError.of(composer.clashes, inside)
    return Plan(recipe, tuple(plan for plan in plans if plan))


@dataclass
class _Composer:
    """Makes one stage after the other definite, and collects what is wrong in any.

    Args:
        rows: tokens in each training row, and how many of them, the last ones, are out-domain; None when they are not known.
        faults, clashes: what was found so far.
    """

    recipe: Recipe
    shape: nn.Module
    family: Family | None
    rows: tuple[tuple[int, ...], int] | None
    voids: tuple[Claim, ...]
    goes_on: bool
    faults: list[Fault] = field(default_factory=list)
    clashes: list[Fault] = field(default_factory=list)

    def stage(self, index: int) -> StagePlan | None:
        """The plan of a stage, after whose surgery and end the shape is left as the next one finds it; None where a fault forbids it."""
        stage, notes, shelf = self.recipe.stages[index], list[str](), Shelf()
        label = f"stages[{index}] {stage.name!r}"
        entries = self._entries(stage, label)
        before = Anatomy.of(self.shape, self.family)

        def context(entry: Entry, anatomy: Anatomy, steps: int = 0) -> Context:
            return Context(anatomy, Progress(steps), self.recipe.seed, entry.key, entry.claims, shelf, notes)

        structural = [entry for entry in entries if entry.structural and entry.ingredient.uses("surgery")]
        try:
            for entry in structural:
                entry.ingredient.surgery(self.shape, context(entry, before))
            anatomy = Anatomy.of(self.shape, self.family)
            stream, steps = self._length(index, entries, lambda entry: context(entry, anatomy))
            table = ParamTable.start(
                anatomy,
                learning_rate=stage.learning_rate,
                steps=steps,
                epoch=stream.count(0) if stream else 0,
                seed=self.recipe.seed,
            )
        except LuthierError as error:
            self._collect(error, label)
            return None
        # averages take the end of a schedule over
        for entry in sorted(entries, key=lambda entry: entry.owns(Place.END_WEIGHTS)):
            try:
                table = entry.ingredient.settings(table.signed(entry.name))
            except LuthierError as error:
                self._collect(error, label)
        self._check(index, entries, before, table, label)
        for entry in reversed(structural):
            if entry.ingredient.uses("finish"):
                entry.ingredient.finish(self.shape, context(entry, anatomy, steps))
        memory = forecast(self.shape, table, [entry.ingredient for entry in entries], stage, stream)
        return StagePlan(stage, index, entries, anatomy, table, steps, stream, memory, tuple(notes), self.family)

    def _entries(self, stage: Stage, label: str) -> tuple[Entry, ...]:
        made: list[Entry] = []
        for ingredient in stage.ingredients:
            name = ingredient.name()
            if any(entry.name == name for entry in made):
                self.faults.append(Fault(f"{label} {name}", "stands twice in one stage", do="Keep one."))
                continue
            made.append(Entry(name, ingredient, ingredient.touches(), f"{stage.name}/{name}"))
        if stage.solver == "sgd" and not any(entry.owns(Place.OPTIMIZER) for entry in made):
            name = registry.DEFAULT_OPTIMIZER
            default = registry.find(name)()
            made.insert(0, Entry(name, default, default.touches(), f"{stage.name}/{name}", default=True))
        return tuple(made)

    def _length(
        self, index: int, entries: Sequence[Entry], context: Callable[[Entry], Context]
    ) -> tuple[Stream | None, int]:
        """Which rows make which step, where they are known, and how many steps there are."""
        stage, stream = self.recipe.stages[index], None
        if stage.solver == "exact":
            return None, 0
        if self.rows is not None:
            lengths, spare = self.rows
            out_domain = tuple(range(len(lengths) - spare, len(lengths)))
            stream = self._batches(
                Shuffled(lengths, stage.batch_size, self.recipe.seed_of("order"), index, out_domain), entries, context
            )
        if stage.steps is not None:
            return stream, stage.steps
        if stage.epochs is None:
            raise RecipeError.of([Fault("", "must say epochs or steps")], "the plan")
        if stream is None:
            raise RecipeError.of([Fault("", "must say steps, as the rows are not known")], "the plan")
        whole = math.floor(stage.epochs)
        steps = sum(stream.count(number) for number in range(whole))
        return stream, max(1, steps + round((stage.epochs - whole) * stream.count(whole)))

    def _batches(self, stream: Stream, entries: Sequence[Entry], context: Callable[[Entry], Context]) -> Stream:
        for entry in entries:
            stream = entry.ingredient.batches(stream, context(entry))
        return stream

    def _check(self, index: int, entries: tuple[Entry, ...], before: Anatomy, table: ParamTable, label: str) -> None:
        """What is wrong in a stage whose table is whole."""
        stage, anatomy = self.recipe.stages[index], table.anatomy
        self.faults += checks.idle(entries, before, anatomy, label)
        self.faults += checks.on_frozen(entries, before, table, label)
        self.faults += checks.carried(stage, before, label)
        self.faults += checks.untrained(table, label)
        if stage.solver == "exact":
            self.faults += checks.unsolvable(entries, table, anatomy, label)
        carried = stage.carry if stage.carry and index + 1 < len(self.recipe.stages) else ("all",)
        claimed = [
            *((entry.name, entry.claims) for entry in entries),
            ("the surroundings", self.voids),
            ("the stages before", (needs(Place.EARLIER),) if index else ()),
            ("the run", (needs(Place.GOES_ON, *carried),) if self.goes_on else ()),
        ]
        clashes = conflicts(claimed, lambda at: checks.selected(at, before) | checks.selected(at, anatomy), label)
        self.clashes += clashes
        if not clashes:  # two that cannot share the stage may leave each other nothing
            self.faults += checks.workless(entries, before, table, label)

    def _collect(self, error: LuthierError, label: str) -> None:
        """Keeps the faults of an error; one without any, a missing package, say, goes through."""
        if not error.faults:
            raise error
        self.faults += (Fault(f"{label} {fault.where}", fault.must, fault.got, fault.do) for fault in error.faults)
