"""Anneal: the shape of the learning rate over a stage, with a warm-up.

Source: linear and cosine with warm-up are those of ``transformers.get_linear_schedule_with_warmup`` and
``get_cosine_schedule_with_warmup``; slanted is the slanted triangle of Howard and Ruder, ACL 2018, equation 3 (arXiv:1801.06146);
one-cycle is that of Smith and Topin 2018 (arXiv:1708.07120) as in ``torch.optim.lr_scheduler.OneCycleLR``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from luthier.core.claims import Claim, Place, scales
from luthier.core.ingredient import Ingredient, ingredient
from luthier.core.schedule import Constant, Cosine, Linear, Product, Schedule, WarmUp
from luthier.core.table import ParamTable
from luthier.errors import Fault, RecipeError

Shape = Literal["constant", "linear", "cosine", "slanted", "one-cycle"]
Factor = Annotated[float, Field(ge=0, le=1)]

# What a shape means when nothing else is said: (share that warms up, factor at the start of it, factor at the end).
USUAL: dict[str, tuple[float, float, float]] = {
    "constant": (0.0, 0.0, 0.0),
    "linear": (0.0, 0.0, 0.0),
    "cosine": (0.0, 0.0, 0.0),
    "slanted": (0.1, 1 / 32, 1 / 32),
    "one-cycle": (0.3, 1 / 25, 1 / 250_000),
}


def shape(name: str, *, warmup: float, start: float, end: float) -> Schedule:
    """The factor on the rate as a function of the fraction f of the stage.

    Warm-up: s + (1 - s) f / w for f < w; for one-cycle the straight line is half a cosine wave. After it, with g = (f - w) / (1 - w):
    constant 1; linear and slanted 1 + (e - 1) g; cosine and one-cycle e + (1 - e) (1 + cos(pi g)) / 2.

    Args:
        name: one of ``USUAL``.
        warmup: w, share of the stage in [0, 1).
        start: s, the factor at the start of the warm-up.
        end: e, the factor at the end of the stage.
    Differs: f is a ratio of whole steps. Howard and Ruder round the warm-up down to whole steps, and so divide by zero in stages of
        fewer than 1 / w steps; torch's one-cycle ends on its last step, ours (like transformers' shapes) would on the step after it.
    """
    after: Schedule = Constant()
    if name in ("linear", "slanted"):
        after = Linear(end)
    elif name in ("cosine", "one-cycle"):
        after = Cosine(end)
    return WarmUp(warmup, after, start, smooth=name == "one-cycle") if warmup else after


@ingredient
class Anneal(Ingredient):
    """Anneals the learning rate. Where a number is not given, it is the shape's usual one.

    Args:
        shape: ``constant``, ``linear``, ``cosine``, ``slanted`` (up from 1/32 over a tenth of the stage, then down to 1/32) or
            ``one-cycle`` (up from 1/25 over three tenths, then down to 1/250000, both along cosine waves).
        warmup: share of the stage that warms up.
        warmup_steps: the same in optimizer steps; goes before ``warmup`` when given.
        start: factor on the rate at the start of the warm-up.
        end: factor on the rate at the end of the stage.
    Raises:
        RecipeError: more warm-up steps than the stage has.
    Differs: one-cycle leaves the momentum alone, which its authors move against the rate.
    """

    shape: Shape = "linear"
    warmup: Annotated[float, Field(ge=0, lt=1)] | None = None
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    start: Factor | None = None
    end: Factor | None = None

    def __post_init__(self) -> None:
        if self.shape == "constant" and self.end is not None:
            raise ValueError("a constant shape has no end")

    def touches(self) -> tuple[Claim, ...]:
        return (scales(Place.LR),)

    def settings(self, table: ParamTable) -> ParamTable:
        usual = USUAL[self.shape]
        share = usual[0] if self.warmup is None else self.warmup
        if self.warmup_steps is not None and table.steps:
            if self.warmup_steps >= table.steps:
                must = f"must be below the stage's {table.steps} steps"
                raise RecipeError.of([Fault("anneal.warmup_steps", must, str(self.warmup_steps))], "the plan")
            share = self.warmup_steps / table.steps
        start = usual[1] if self.start is None else self.start
        end = usual[2] if self.end is None else self.end
        factor = shape(self.shape, warmup=share, start=start, end=end)
        return table.reschedule(lambda row: factor if row.schedule == Constant() else Product(row.schedule, factor))
