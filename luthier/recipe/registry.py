"""The table of ingredients: a name in a recipe -> where its class is. A literal, so that listing loads nothing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from luthier.core.ingredient import Ingredient

INGREDIENTS: dict[str, str] = {
    "adamw": "luthier.ingredients.optimizers.adamw:AdamW",
    "anneal": "luthier.ingredients.settings.anneal:Anneal",
    "best": "luthier.ingredients.averaging.best:Best",
    "child_tuning": "luthier.ingredients.gradients.child_tuning:ChildTuning",
    "clip": "luthier.ingredients.gradients.clip:Clip",
    "conformal": "luthier.ingredients.calibration.conformal:Conformal",
    "discriminative": "luthier.ingredients.settings.discriminative:Discriminative",
    "ema": "luthier.ingredients.averaging.ema:EMA",
    "emoe": "luthier.ingredients.modules.emoe:EMoE",
    "freelb": "luthier.ingredients.losses.freelb:FreeLB",
    "freeze": "luthier.ingredients.settings.freeze:Freeze",
    "gmt": "luthier.ingredients.gradients.gmt:GMT",
    "grouped_llrd": "luthier.ingredients.settings.grouped_llrd:GroupedLLRD",
    "head_scale": "luthier.ingredients.surgery.head_scale:HeadScale",
    "isobn": "luthier.ingredients.modules.isobn:IsoBN",
    "isotonic": "luthier.ingredients.calibration.isotonic:Isotonic",
    "l2sp": "luthier.ingredients.losses.l2sp:L2SP",
    "label_smoothing": "luthier.ingredients.losses.label_smoothing:LabelSmoothing",
    "lengths": "luthier.ingredients.data.lengths:Lengths",
    "lisa": "luthier.ingredients.settings.lisa:LISA",
    "llrd": "luthier.ingredients.settings.llrd:LLRD",
    "lora": "luthier.ingredients.modules.lora:LoRA",
    "lora_plus": "luthier.ingredients.settings.lora_plus:LoRAPlus",
    "mezo": "luthier.ingredients.optimizers.mezo:MeZO",
    "mixout": "luthier.ingredients.surgery.mixout:Mixout",
    "neftune": "luthier.ingredients.surgery.neftune:NEFTune",
    "noisy_tune": "luthier.ingredients.surgery.noisy_tune:NoisyTune",
    "out_domain": "luthier.ingredients.data.out_domain:OutDomain",
    "prefix": "luthier.ingredients.modules.prefix:Prefix",
    "prior_decay": "luthier.ingredients.optimizers.prior_decay:PriorDecay",
    "r_drop": "luthier.ingredients.losses.r_drop:RDrop",
    "rec_adam": "luthier.ingredients.optimizers.rec_adam:RecAdam",
    "reinit": "luthier.ingredients.surgery.reinit:Reinit",
    "sam": "luthier.ingredients.optimizers.sam:SAM",
    "smart": "luthier.ingredients.losses.smart:SMART",
    "swa": "luthier.ingredients.averaging.swa:SWA",
    "temperature": "luthier.ingredients.calibration.temperature:Temperature",
    "thaw": "luthier.ingredients.settings.thaw:Thaw",
    "vector": "luthier.ingredients.calibration.vector:VectorScaling",
    "wise": "luthier.ingredients.averaging.wise:WiSE",
}

# What a stage gets when no ingredient of it owns the optimizer.
DEFAULT_OPTIMIZER = "adamw"


def find(name: str) -> type[Ingredient]:
    """The class called ``name`` in recipes; loads its file.

    Raises:
        KeyError: there is no such name.
    """
    module, _, attribute = INGREDIENTS[name].partition(":")
    found: type[Ingredient] = getattr(importlib.import_module(module), attribute)
    return found


def family(name: str) -> str:
    """The family of ``name``: the folder its file is in, such as ``settings`` or ``optimizers``."""
    return INGREDIENTS[name].split(".")[2]
