"""Losses beside each other, in either order: what each is told to do still reaches the gradient."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.core.ingredient import Ingredient
from luthier.ingredients.losses.freelb import FreeLB
from luthier.ingredients.losses.l2sp import L2SP
from luthier.ingredients.losses.label_smoothing import LabelSmoothing
from luthier.ingredients.losses.r_drop import RDrop
from luthier.ingredients.losses.smart import SMART
from luthier.ingredients.surgery.mixout import Mixout
from luthier.ingredients.surgery.neftune import NEFTune
from luthier.run import begin
from tests.ingredients.losses.test_smart import batch
from tests.tiny import tiny

# Each at two strengths: both do the same work, so that a difference is the ingredient's own and not that of more passes.
WEAK_AND_STRONG: dict[str, tuple[Ingredient, Ingredient]] = {
    "freelb": (FreeLB(rate=0.1, radius=None), FreeLB(rate=0.2, radius=None)),
    "l2sp": (L2SP(head_strength=1.0), L2SP(head_strength=2.0)),
    "label_smoothing": (LabelSmoothing(eps=0.1), LabelSmoothing(eps=0.2)),
    "r_drop": (RDrop(alpha=1.0), RDrop(alpha=2.0)),
    "smart": (SMART(step=0.1, radius=0.1), SMART(strength=2.0, step=0.1, radius=0.1)),
    "smart, its pull": (SMART(strength=0.0, pull=1.0), SMART(strength=0.0, pull=2.0)),
    "smart, both": (SMART(step=0.1, radius=0.1, pull=1.0), SMART(strength=2.0, step=0.1, radius=0.1, pull=2.0)),
    "neftune": (NEFTune(alpha=5.0), NEFTune(alpha=10.0)),
    "mixout": (Mixout(p=0.1), Mixout(p=0.5)),
}


def gradient(*ingredients: Ingredient) -> Tensor:
    """The gradient after one step, so that there is a way back to the start."""
    model: Any = tiny("bert", dropout=0.3)
    run = begin(model, ingredients, learning_rate=1e-2, steps=3)
    with torch.random.fork_rng():
        for number in range(2):
            torch.manual_seed(number)
            run.loss(run.forward, batch(number)).backward()
            if not number:
                run.step()
    assert not [note for note in run.notes if "same logits" in note]
    return torch.cat([weight.grad.flatten() for weight in run.model.parameters() if weight.grad is not None])


@pytest.mark.parametrize(
    ("one", "other"),
    [(one, other) for one, other in permutations(WEAK_AND_STRONG, 2) if one.split(",")[0] != other.split(",")[0]],
)
def test_both_still_act(one: str, other: str) -> None:
    (first, more_first), (second, more_second) = WEAK_AND_STRONG[one], WEAK_AND_STRONG[other]
    both = gradient(first, second)
    for more in (gradient(more_first, second), gradient(first, more_second)):
        assert (more - both).norm() > 1e-4 * both.norm()
