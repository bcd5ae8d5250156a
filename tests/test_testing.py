"""The conformance suite catches those who do not keep their promises."""

from __future__ import annotations

import pytest
import torch

from luthier.core.claims import Place, owns, wraps
from luthier.core.ingredient import Findings, Ingredient, ingredient
from luthier.testing import check_ingredient, tiny_model

HIDDEN_STATE = {"calls": 0}


@ingredient
class Honest(Ingredient):
    """Doubles the gradient, and says so."""

    factor: float = 2.0

    def touches(self):
        return (wraps(Place.GRADIENT),)

    def optimizer(self, inner, ctx):
        def double(optimizer, args, named):
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    if weight.grad is not None:
                        weight.grad.mul_(self.factor)

        inner.register_step_pre_hook(double)
        return inner


@ingredient
class MovesWeightsSilently(Ingredient):
    def surgery(self, model, ctx):
        if not next(model.parameters()).is_meta:
            with torch.no_grad():
                model.classifier.weight.add_(1.0)


@ingredient
class ClaimsTooMuch(Ingredient):
    def touches(self):
        return (owns(Place.END_WEIGHTS),)


@ingredient
class ClaimsTheWrongPlace(Ingredient):
    def touches(self):
        return (owns(Place.START_WEIGHTS, "embeddings"),)

    def surgery(self, model, ctx):
        if not next(model.parameters()).is_meta:
            with torch.no_grad():
                model.classifier.weight.add_(1.0)


@ingredient
class EditsOtherGradients(Ingredient):
    """Says the embeddings, and doubles the head's."""

    def touches(self):
        return (wraps(Place.GRADIENT, "embeddings"),)

    def optimizer(self, inner, ctx):
        def double(optimizer, args, named):
            for group in optimizer.param_groups:
                for name, weight in zip(group["names"], group["params"], strict=True):
                    if name == "classifier.weight":
                        weight.grad.mul_(2.0)

        inner.register_step_pre_hook(double)
        return inner


@ingredient
class EditsGradientsSilently(EditsOtherGradients):
    def touches(self):
        return ()


@ingredient
class DrawsGlobally(Ingredient):
    def touches(self):
        return (wraps(Place.LOSS),)

    def loss(self, inner, ctx):
        return lambda model, batch: inner(model, batch) + 0.0 * torch.rand(())


@ingredient
class HidesState(Ingredient):
    """Counts its calls outside the run, so a resumed run counts otherwise."""

    def touches(self):
        return (wraps(Place.LOSS),)

    def loss(self, inner, ctx):
        HIDDEN_STATE["calls"] = 0

        def counted(model, batch):
            HIDDEN_STATE["calls"] += 1
            return inner(model, batch) * HIDDEN_STATE["calls"]

        return counted


@ingredient
class LeavesThingsBehind(Ingredient):
    def touches(self):
        return (wraps(Place.MODULES),)

    def surgery(self, model, ctx):
        model.extra = torch.nn.Linear(2, 2, device=next(model.parameters()).device)


@ingredient
class CalibratesSilently(Ingredient):
    def measure(self, outputs, ctx):
        return Findings(scale=(2.0,))


def test_an_honest_ingredient_passes():
    check_ingredient(Honest())


@pytest.mark.parametrize(
    ("liar", "said"),
    [
        (MovesWeightsSilently(), "touches the start weights and does not claim it"),
        (ClaimsTooMuch(), "claims the end weights and was not seen to touch it"),
        (ClaimsTheWrongPlace(), "outside what it claims"),
        (EditsOtherGradients(), "touches the gradient at classifier.weight, outside what it claims"),
        (EditsGradientsSilently(), "touches the gradient and does not claim it"),
        (DrawsGlobally(), "draws from torch's global generator"),
        (HidesState(), "does not go on exactly"),
        (LeavesThingsBehind(), "leaves"),
        (CalibratesSilently(), "touches the predictions and does not claim it"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Ingredient) else "",
)
def test_a_broken_promise_is_named(liar, said):
    with pytest.raises(AssertionError, match=said):
        check_ingredient(liar)


def test_a_neutral_value_is_seen_to_do_nothing():
    with pytest.raises(AssertionError, match="claims the gradient and was not seen"):
        check_ingredient(Honest(factor=1.0))
    check_ingredient(Honest(factor=1.0), unobservable=[Place.GRADIENT])


def test_the_suite_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    check_ingredient(Honest())
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_tiny_model_is_the_same_each_time():
    one, two = tiny_model().state_dict(), tiny_model().state_dict()
    assert all(torch.equal(value, two[name]) for name, value in one.items())
