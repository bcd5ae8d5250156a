"""Plan: a recipe made definite for one model and one set of rows. Frozen values: they can be printed, compared and tested without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from luthier.core.anatomy import Anatomy
from luthier.core.claims import Claim, Place
from luthier.core.context import Context, Progress, Shelf
from luthier.core.families import Family
from luthier.core.ingredient import Ingredient
from luthier.core.stream import Stream
from luthier.core.table import ParamTable
from luthier.planning.cost import Memory
from luthier.planning.view import as_json, as_text
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
    """A recipe made definite: order, tables, steps, cost. Holds no weights.

    Args:
        recipe: what was asked.
        stages: in order, each made definite for the model as the one before leaves it.
    """

    recipe: Recipe
    stages: tuple[StagePlan, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values: what plan.json holds."""
        return as_json(self)

    def __str__(self) -> str:
        return as_text(self)
