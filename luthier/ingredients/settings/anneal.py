"""Anneal: the shape of the learning rate over a stage, with a warm-up.

Source: the linear and cosine shapes with warm-up are those of ``transformers.get_linear_schedule_with_warmup`` and
``get_cosine_schedule_with_warmup``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from luthier.core.claims import Claim, Place, scales
from luthier.core.ingredient import Ingredient, ingredient
from luthier.core.schedule import Constant, Cosine, Linear, Product, Schedule, WarmUp
from luthier.core.table import ParamTable
from luthier.errors import Fault, RecipeError


def shape(name: str, *, warmup: float, end: float) -> Schedule:
    """The factor on the rate as a function of the fraction f of the stage.

    Warm-up: f / w for f < w. After it, with g = (f - w) / (1 - w): constant 1; linear 1 + (e - 1) g;
    cosine e + (1 - e) (1 + cos(pi g)) / 2.

    Args:
        name: ``constant``, ``linear`` or ``cosine``.
        warmup: w, share of the stage in [0, 1).
        end: e, the factor at the end of the stage.
    Source: transformers.optimization, with f = step / steps.
    Differs: nothing but rounding: f is a ratio of whole steps.
    """
    known: dict[str, Schedule] = {"constant": Constant(), "linear": Linear(end), "cosine": Cosine(end)}
    after = known[name]
    return WarmUp(warmup, after) if warmup else after


@ingredient
class Anneal(Ingredient):
    """Anneals the learning rate.

    Args:
        shape: ``constant``, ``linear`` or ``cosine``.
        warmup: share of the stage that warms up.
        warmup_steps: the same in optimizer steps; goes before ``warmup`` when given.
        end: factor on the rate at the end of the stage.
    """

    shape: Literal["constant", "linear", "cosine"] = "linear"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    end: Annotated[float, Field(ge=0, le=1)] = 0.0

    def touches(self) -> tuple[Claim, ...]:
        return (scales(Place.LR),)

    def settings(self, table: ParamTable) -> ParamTable:
        share = self.warmup
        if self.warmup_steps is not None and table.steps:
            if self.warmup_steps >= table.steps:
                must = f"must be below the stage's {table.steps} steps"
                raise RecipeError.of([Fault("anneal.warmup_steps", must, str(self.warmup_steps))], "the plan")
            share = self.warmup_steps / table.steps
        factor = shape(self.shape, warmup=share, end=self.end)
        return table.reschedule(lambda row: factor if row.schedule == Constant() else Product(row.schedule, factor))
