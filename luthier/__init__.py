"""Luthier fine-tunes pretrained transformers: every method is one small, verified ingredient of a recipe.

    import luthier
    report = luthier.fit("lp-ft", model="path/to/model", data="reviews.csv", out="runs/reviews")

Names load on first use, so that ``import luthier`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from luthier.recipe.registry import INGREDIENTS

if TYPE_CHECKING:
    from luthier.comparison import Comparison
    from luthier.core.anatomy import Anatomy
    from luthier.core.families import Family
    from luthier.core.ingredient import Ingredient, ingredient
    from luthier.errors import LuthierError
    from luthier.finished.diff import diff
    from luthier.finished.predictions import predict
    from luthier.finished.reruns import rerun
    from luthier.finished.soups import soup
    from luthier.finished.studying import study
    from luthier.ingredients.averaging.best import Best
    from luthier.ingredients.averaging.ema import EMA
    from luthier.ingredients.averaging.swa import SWA
    from luthier.ingredients.averaging.wise import WiSE
    from luthier.ingredients.calibration.conformal import Conformal
    from luthier.ingredients.calibration.isotonic import Isotonic
    from luthier.ingredients.calibration.temperature import Temperature
    from luthier.ingredients.calibration.vector import VectorScaling
    from luthier.ingredients.data.lengths import Lengths
    from luthier.ingredients.data.out_domain import OutDomain
    from luthier.ingredients.gradients.child_tuning import ChildTuning
    from luthier.ingredients.gradients.clip import Clip
    from luthier.ingredients.gradients.gmt import GMT
    from luthier.ingredients.losses.freelb import FreeLB
    from luthier.ingredients.losses.l2sp import L2SP
    from luthier.ingredients.losses.label_smoothing import LabelSmoothing
    from luthier.ingredients.losses.r_drop import RDrop
    from luthier.ingredients.losses.smart import SMART
    from luthier.ingredients.modules.emoe import EMoE
    from luthier.ingredients.modules.isobn import IsoBN
    from luthier.ingredients.modules.lora import LoRA
    from luthier.ingredients.modules.prefix import Prefix
    from luthier.ingredients.optimizers.adamw import AdamW
    from luthier.ingredients.optimizers.mezo import MeZO
    from luthier.ingredients.optimizers.prior_decay import PriorDecay
    from luthier.ingredients.optimizers.rec_adam import RecAdam
    from luthier.ingredients.optimizers.sam import SAM
    from luthier.ingredients.settings.anneal import Anneal
    from luthier.ingredients.settings.discriminative import Discriminative
    from luthier.ingredients.settings.freeze import Freeze
    from luthier.ingredients.settings.grouped_llrd import GroupedLLRD
    from luthier.ingredients.settings.lisa import LISA
    from luthier.ingredients.settings.llrd import LLRD
    from luthier.ingredients.settings.lora_plus import LoRAPlus
    from luthier.ingredients.settings.thaw import Thaw
    from luthier.ingredients.surgery.head_scale import HeadScale
    from luthier.ingredients.surgery.mixout import Mixout
    from luthier.ingredients.surgery.neftune import NEFTune
    from luthier.ingredients.surgery.noisy_tune import NoisyTune
    from luthier.ingredients.surgery.reinit import Reinit
    from luthier.planning.compose import compose, skeleton
    from luthier.planning.plan import Plan
    from luthier.recipe.recipe import Recipe, Stage
    from luthier.report import Report
    from luthier.run import Run, begin
    from luthier.training.engine import fit
    from luthier.trials.comparing import compare, gather

__version__ = "0.1.0"

_WHERE = {
    "Anatomy": "luthier.core.anatomy",
    "Family": "luthier.core.families",
    "Ingredient": "luthier.core.ingredient",
    "ingredient": "luthier.core.ingredient",
    "diff": "luthier.finished.diff",
    "compare": "luthier.trials.comparing",
    "gather": "luthier.trials.comparing",
    "Comparison": "luthier.comparison",
    "fit": "luthier.training.engine",
    "predict": "luthier.finished.predictions",
    "soup": "luthier.finished.soups",
    "rerun": "luthier.finished.reruns",
    "study": "luthier.finished.studying",
    "LuthierError": "luthier.errors",
    "Plan": "luthier.planning.plan",
    "compose": "luthier.planning.compose",
    "skeleton": "luthier.planning.compose",
    "Recipe": "luthier.recipe.recipe",
    "Stage": "luthier.recipe.recipe",
    "Report": "luthier.report",
    "Run": "luthier.run",
    "begin": "luthier.run",
    **{place.partition(":")[2]: place.partition(":")[0] for place in INGREDIENTS.values()},
}

__all__ = [
    "EMA",
    "GMT",
    "L2SP",
    "LISA",
    "LLRD",
    "SAM",
    "SMART",
    "SWA",
    "AdamW",
    "Anatomy",
    "Anneal",
    "Best",
    "ChildTuning",
    "Clip",
    "Comparison",
    "Conformal",
    "Discriminative",
    "EMoE",
    "Family",
    "FreeLB",
    "Freeze",
    "GroupedLLRD",
    "HeadScale",
    "Ingredient",
    "IsoBN",
    "Isotonic",
    "LabelSmoothing",
    "Lengths",
    "LoRA",
    "LoRAPlus",
    "LuthierError",
    "MeZO",
    "Mixout",
    "NEFTune",
    "NoisyTune",
    "OutDomain",
    "Plan",
    "Prefix",
    "PriorDecay",
    "RDrop",
    "RecAdam",
    "Recipe",
    "Reinit",
    "Report",
    "Run",
    "Stage",
    "Temperature",
    "Thaw",
    "VectorScaling",
    "WiSE",
    "begin",
    "compare",
    "compose",
    "diff",
    "fit",
    "gather",
    "ingredient",
    "predict",
    "rerun",
    "skeleton",
    "soup",
    "study",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'luthier' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
