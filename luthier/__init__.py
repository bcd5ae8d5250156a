"""Luthier fine-tunes pretrained transformers: every method is one small, verified ingredient of a recipe.

    import luthier
    report = luthier.fit("lp-ft", model="path/to/model", data="reviews.csv", out="runs/reviews")

Names load on first use, so that ``import luthier`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.core.anatomy import Anatomy, Family
    from luthier.core.ingredient import Ingredient, ingredient
    from luthier.engine import fit
    from luthier.errors import LuthierError
    from luthier.ingredients.averaging.swa import SWA
    from luthier.ingredients.calibration.temperature import Temperature
    from luthier.ingredients.data.lengths import Lengths
    from luthier.ingredients.gradients.clip import Clip
    from luthier.ingredients.losses.l2sp import L2SP
    from luthier.ingredients.modules.lora import LoRA
    from luthier.ingredients.optimizers.adamw import AdamW
    from luthier.ingredients.optimizers.mezo import MeZO
    from luthier.ingredients.settings.anneal import Anneal
    from luthier.ingredients.settings.freeze import Freeze
    from luthier.ingredients.settings.llrd import LLRD
    from luthier.ingredients.surgery.mixout import Mixout
    from luthier.plan import Plan, compose, skeleton
    from luthier.predictions import predict
    from luthier.recipe.recipe import Recipe, Stage
    from luthier.report import Report
    from luthier.run import Run, begin

__version__ = "0.1.0"

_WHERE = {
    "Anatomy": "luthier.core.anatomy",
    "Family": "luthier.core.anatomy",
    "Ingredient": "luthier.core.ingredient",
    "ingredient": "luthier.core.ingredient",
    "fit": "luthier.engine",
    "predict": "luthier.predictions",
    "LuthierError": "luthier.errors",
    "Plan": "luthier.plan",
    "compose": "luthier.plan",
    "skeleton": "luthier.plan",
    "Recipe": "luthier.recipe.recipe",
    "Stage": "luthier.recipe.recipe",
    "Report": "luthier.report",
    "Run": "luthier.run",
    "begin": "luthier.run",
    "AdamW": "luthier.ingredients.optimizers.adamw",
    "Anneal": "luthier.ingredients.settings.anneal",
    "Clip": "luthier.ingredients.gradients.clip",
    "Freeze": "luthier.ingredients.settings.freeze",
    "L2SP": "luthier.ingredients.losses.l2sp",
    "LLRD": "luthier.ingredients.settings.llrd",
    "Lengths": "luthier.ingredients.data.lengths",
    "LoRA": "luthier.ingredients.modules.lora",
    "MeZO": "luthier.ingredients.optimizers.mezo",
    "Mixout": "luthier.ingredients.surgery.mixout",
    "SWA": "luthier.ingredients.averaging.swa",
    "Temperature": "luthier.ingredients.calibration.temperature",
}

__all__ = [
    "L2SP",
    "LLRD",
    "SWA",
    "AdamW",
    "Anatomy",
    "Anneal",
    "Clip",
    "Family",
    "Freeze",
    "Ingredient",
    "Lengths",
    "LoRA",
    "LuthierError",
    "MeZO",
    "Mixout",
    "Plan",
    "Recipe",
    "Report",
    "Run",
    "Stage",
    "Temperature",
    "begin",
    "compose",
    "fit",
    "ingredient",
    "predict",
    "skeleton",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'luthier' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
