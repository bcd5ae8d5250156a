"""The contract of an ingredient as a test suite that anyone can run on their own.

from luthier.testing import check_ingredient
def test_it_keeps_its_promises():
    check_ingredient(MyIngredient(strength=0.1))
"""

from __future__ import annotations

import copy
import dataclasses
import io
import random
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import nn

from luthier.core.anatomy import Anatomy
from luthier.core.claims import Place
from luthier.core.ingredient import Ingredient
from luthier.observe import STEPS, Observed, batch, begin, observe, stage, step
from luthier.planning.compose import compose, skeleton
from luthier.recipe import registry
from luthier.recipe.text import build, write
from luthier.recipe.values import parse

__all__ = ["check_ingredient", "tiny_model"]

_OBSERVABLE = {
    Place.LR, Place.DECAY, Place.TRAINABLE, Place.START_WEIGHTS, Place.MODULES, Place.FORWARD_WEIGHTS, Place.LOSS, Place.GRADIENT,
    Place.OPTIMIZER, Place.STEP, Place.END_WEIGHTS, Place.BATCHES, Place.PREDICTIONS,
}  # fmt: skip


def tiny_model(*, dropout: float = 0.1, seed: int = 0) -> nn.Module:
    """A BERT of 16 hidden units, 3 blocks and 3 classes; the global generator is left as it was."""
    import transformers

    config: Any = transformers.BertConfig(  # type: ignore[call-arg]
        vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, num_labels=3,
        max_position_embeddings=32, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.BertForSequenceClassification(config)


def check_ingredient(
    ingredient: Ingredient, *, model: Callable[[], nn.Module] = tiny_model, unobservable: Collection[Place] = ()
) -> None:
    """Runs an ingredient on a tiny model and checks what every ingredient promises.

    Args:
        ingredient: with values that make it do something; at its neutral values it is not seen to touch what it claims.
        model: makes the model, the same each time.
        unobservable: places it claims rightly though these values, or this model, do not show it.
    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    with torch.random.fork_rng(devices=[]):
        _declared_is_observed(ingredient, model, unobservable)
        _goes_on_exactly(ingredient, model)
        _plans_without_touching(ingredient, model)
    _leaves_global_generators(ingredient, model)
    _is_frozen(ingredient, model)
    _survives_text(ingredient)


def _declared_is_observed(
    ingredient: Ingredient, model: Callable[[], nn.Module], unobservable: Collection[Place]
) -> None:
    seen: Observed = observe(ingredient, model)
    claims = [
        claim
        for claim in ingredient.touches()
        if claim.how in ("owns", "wraps", "scales") and claim.place in _OBSERVABLE
    ]
    declared = {claim.place for claim in claims}
    undeclared = seen.places - declared
    assert not undeclared, f"{ingredient.name()} touches {_said(undeclared)} and does not claim it"
    idle = declared - seen.places - set(unobservable)
    assert not idle, f"{ingredient.name()} claims {_said(idle)} and was not seen to touch it"
    anatomy = Anatomy.of(model())
    for claim in claims:
        if claim.where == ("all",) or claim.place not in seen.names:
            continue
        covered = {anatomy.part(name).canonical for selector in claim.where for name in anatomy.select(selector)}
        outside = seen.names[claim.place] - covered
        assert not outside, (
            f"{ingredient.name()} touches {claim.place.value} at {sorted(outside)[0]}, outside what it claims"
        )


def _said(places: Collection[Place]) -> str:
    return ", ".join(sorted(place.value for place in places))


def _goes_on_exactly(ingredient: Ingredient, model: Callable[[], nn.Module]) -> None:
    """STEPS steps at once == half of them, saved, everything made anew, loaded, the other half."""
    sample = [batch(90), batch(91)]
    whole = begin(ingredient, model(), sample)
    for number in range(STEPS):
        step(whole, number)
    whole.finish()

    first = begin(ingredient, model(), sample)
    for number in range(STEPS // 2):
        step(first, number)
    file = io.BytesIO()
    torch.save({"model": first.model.state_dict(), "run": first.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)

    second = begin(ingredient, model(), sample)
    second.model.load_state_dict(state["model"])
    second.load_state_dict(state["run"])
    for number in range(STEPS // 2, STEPS):
        step(second, number)
    second.finish()
    ours, theirs = whole.model.state_dict(), second.model.state_dict()
    assert list(ours) == list(theirs) == list(model().state_dict()), (
        f"{ingredient.name()} leaves other names or another order behind"
    )
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), (
            f"{ingredient.name()} does not go on exactly: {name} differs after a resume"
        )


def _plans_without_touching(ingredient: Ingredient, model: Callable[[], nn.Module]) -> None:
    live = model()
    before = copy.deepcopy(live.state_dict())
    shape = skeleton(live)
    names = [name for name, _ in shape.named_parameters()]
    state = torch.random.get_rng_state()
    compose(stage(ingredient), shape, lengths=[8] * 32, out_domain=8)
    assert torch.equal(state, torch.random.get_rng_state()), (
        f"{ingredient.name()} draws from the global generator when it is planned"
    )
    assert all(weight.is_meta for weight in shape.parameters()), f"{ingredient.name()} gives the skeleton storage"
    after = [name for name, _ in shape.named_parameters()]
    assert after == names, f"{ingredient.name()} leaves the skeleton with other names than it found"
    for name, value in live.state_dict().items():
        assert torch.equal(value, before[name]), f"{ingredient.name()} touches the live model when it is planned"


def _leaves_global_generators(ingredient: Ingredient, model: Callable[[], nn.Module]) -> None:
    """Every hook and every step, on a model without dropout, which draws from the global generator itself."""
    live = model()
    _without_dropout(live)
    rows = [batch(number) for number in range(3)]
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    run = begin(ingredient, live, [rows[0]])
    _without_dropout(live)  # also that which surgery put in
    for one in rows:
        run.offer(run.closure(one))
        run.step()
    run.finish()
    for epoch in range(2):
        if run.plan.stream is not None:
            run.plan.stream.epoch(epoch)
    assert torch.equal(before[0], torch.random.get_rng_state()), (
        f"{ingredient.name()} draws from torch's global generator"
    )
    assert before[1] == random.getstate(), f"{ingredient.name()} draws from python's global generator"
    assert (before[2] == np.random.get_state()[1]).all(), f"{ingredient.name()} draws from numpy's global generator"  # type: ignore[index]


def _without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _is_frozen(ingredient: Ingredient, model: Callable[[], nn.Module]) -> None:
    fields: dict[str, Any] = copy.deepcopy(vars(ingredient))
    with torch.random.fork_rng(devices=[]):
        run = begin(ingredient, model(), [batch(0)])
        step(run, 0)
        run.finish()
    assert {key: value for key, value in vars(ingredient).items() if not key.startswith("__")} == {
        key: value for key, value in fields.items() if not key.startswith("__")
    }, f"{ingredient.name()} keeps state on itself"
    name = dataclasses.fields(ingredient)[0].name if dataclasses.fields(ingredient) else None  # type: ignore[arg-type]
    if name:
        try:
            setattr(ingredient, name, None)
        except (AttributeError, TypeError):
            return
        raise AssertionError(f"{ingredient.name()} is not frozen")


def _survives_text(ingredient: Ingredient) -> None:
    """Recipe -> YAML -> the same recipe, for ingredients that recipes know."""
    if registry.INGREDIENTS.get(ingredient.name(), "").endswith(f":{type(ingredient).__name__}"):
        made = stage(ingredient)
        assert build(parse(write(made)), inside="check") == made, (
            f"{ingredient.name()} does not survive being written as text"
        )
