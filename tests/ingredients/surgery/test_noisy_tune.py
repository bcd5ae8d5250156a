"""noisy_tune: before training, each pretrained tensor gets a little uniform noise, in proportion to its own spread."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from luthier.core.anatomy import Anatomy
from luthier.core.claims import Place, owns, wraps
from luthier.core.context import Context, Progress, Shelf
from luthier.errors import ConflictError, RecipeError
from luthier.ingredients.losses.l2sp import L2SP
from luthier.ingredients.modules.lora import LoRA
from luthier.ingredients.surgery.mixout import Mixout
from luthier.ingredients.surgery.noisy_tune import NoisyTune, perturbed
from luthier.run import Run, begin
from luthier.testing import check_ingredient
from tests.tiny import tiny

QUERY = "bert.encoder.layer.0.attention.self.query"


def wide(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def attached(model: nn.Module, *ingredients, seed: int = 0) -> Run:
    return begin(model, list(ingredients), learning_rate=1e-2, steps=2, seed=seed)


def changed(model: nn.Module, clean: nn.Module) -> set[str]:
    before = dict(clean.named_parameters())
    return {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}


def context(model: nn.Module, how: NoisyTune) -> Context:
    return Context(Anatomy.of(model), Progress(1), 0, "train/noisy_tune", how.touches(), Shelf(), [])


# By hand


def test_the_noise_is_the_draw_less_a_half_times_strength_times_the_spread() -> None:
    # W = (1, 3): mean 2, variance ((-1)^2 + 1^2) / (2 - 1) = 2. With strength sqrt(2): 1 + (1 - 1/2) sqrt(2) sqrt(2) = 2
    # and 3 + (1/4 - 1/2) 2 = 2.5. With n in the place of n - 1 the spread would be 1, and the first number 1.7.
    found = perturbed(wide(1, 3), wide(1, 0.25), math.sqrt(2))
    torch.testing.assert_close(found, wide(2, 2.5), atol=1e-15, rtol=0)


def test_a_single_number_and_a_constant_tensor_stay() -> None:
    one, flat = wide(0.7), torch.full((3, 5), 0.1)
    assert perturbed(one, wide(0.9), 0.15) is one
    assert perturbed(flat, torch.rand(3, 5, generator=torch.Generator().manual_seed(0)), 0.15) is flat
    empty = torch.zeros(0)
    assert perturbed(empty, empty, 0.15) is empty


# Identity


@pytest.mark.parametrize("reference", ["noisy", "clean"])
def test_without_strength_no_bit_changes(reference) -> None:
    model = tiny("bert")
    attached(model, NoisyTune(strength=0.0, reference=reference))
    assert not changed(model, tiny("bert"))


# Invariants


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 1.0), st.floats(1e-3, 1e3))
def test_no_number_moves_by_more_than_half_the_strength_times_the_spread(seed, strength, scale) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight = scale * torch.randn(7, 5, generator=draw, dtype=torch.float64)
    moved = perturbed(weight, torch.rand(7, 5, generator=draw, dtype=torch.float64), strength) - weight
    assert moved.abs().max() <= strength * weight.std() / 2 * (1 + 1e-9)  # the subtraction rounds
    assert moved.abs().max() > 0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100.0))
def test_it_commutes_with_the_scale_of_the_tensor(seed, scale) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight, uniform = (torch.rand(6, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    # Two orders of the same products in double precision: a few roundings apart.
    torch.testing.assert_close(
        perturbed(scale * weight, uniform, 0.15), scale * perturbed(weight, uniform, 0.15), atol=0, rtol=1e-12
    )


def test_the_noise_has_mean_zero_and_the_deviation_of_a_uniform_number() -> None:
    """Of n = 1536 uniform draws the deviation is known to sqrt(0.8 / n) / 2 = 1.1 %, the mean to 1 / sqrt(12 n)."""
    model, clean = tiny("bert", layers=6), tiny("bert", layers=6)
    attached(model, NoisyTune(strength=0.15))
    units = []
    for layer in range(6):
        name = f"bert.encoder.layer.{layer}.attention.self.query.weight"
        before = clean.get_parameter(name).detach()
        units.append((model.get_parameter(name).detach() - before) / (0.15 * before.std()))
    unit = torch.cat(units)
    assert unit.numel() == 1536
    assert unit.std().item() == pytest.approx(1 / math.sqrt(12), rel=0.045)  # four sigma
    assert unit.mean().item() == pytest.approx(0.0, abs=4 / math.sqrt(12 * 1536))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_single_precision_result_rounded_once(dtype) -> None:
    draw = torch.Generator().manual_seed(3)
    weight = (0.02 * torch.randn(64, 64, generator=draw)).to(dtype)
    uniform = torch.rand(64, 64, generator=draw)
    found = perturbed(weight, uniform, 0.15)
    assert found.dtype == dtype
    assert torch.equal(found, perturbed(weight.float(), uniform, 0.15).to(dtype))


# Parity


def test_it_is_the_line_of_code_that_goes_with_the_paper() -> None:
    # W + (rand - 0.5) * lambda * std(W), as everyone writes it; in double precision, one rounding apart.
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(8, 6, generator=draw, dtype=torch.float64)
    uniform = torch.rand(8, 6, generator=draw, dtype=torch.float64)
    theirs = weight + (uniform - 0.5) * 0.15 * torch.std(weight)
    torch.testing.assert_close(perturbed(weight, uniform, 0.15), theirs, atol=0, rtol=1e-14)


# Conformance


@pytest.mark.parametrize(
    "how",
    [NoisyTune(), NoisyTune(reference="clean"), NoisyTune(where=("top:1", "bridge"))],
    ids=["noisy", "clean", "top"],
)
def test_it_keeps_the_contract(how) -> None:
    check_ingredient(how)


def test_it_owns_the_start_weights_or_only_wraps_them() -> None:
    assert NoisyTune().touches() == (owns(Place.START_WEIGHTS, "backbone"),)
    clean = NoisyTune(where=("top:2", "head"), reference="clean")
    assert clean.touches() == (wraps(Place.START_WEIGHTS, "top:2", "head"),)


def test_bad_values_are_refused_together() -> None:
    with pytest.raises(RecipeError) as told:
        NoisyTune(strength=-0.1, where=(), reference="dirty")
    assert {fault.where for fault in told.value.faults} == {
        "noisy_tune.strength", "noisy_tune.where", "noisy_tune.reference",
    }  # fmt: skip
    with pytest.raises(RecipeError, match="strength"):
        NoisyTune(strength=math.inf)


def test_weights_that_are_named_and_are_not_there_are_told() -> None:
    with pytest.raises(RecipeError, match=r"noisy_tune.*matches no weight with 'decoder\.\*'"):
        attached(tiny("bert"), NoisyTune(where=("decoder.*",)))


# It matters


def test_the_backbone_gets_noise_and_the_head_and_the_constant_tensors_do_not() -> None:
    model, clean = tiny("bert"), tiny("bert")
    attached(model, NoisyTune())
    # A new BERT has biases of 0 and norms of 1: no spread, no noise.
    spread = {name for name, weight in clean.named_parameters() if weight.unique().numel() > 1}
    assert changed(model, clean) == {name for name in spread if not name.startswith("classifier")}
    assert "classifier.weight" in spread
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_biases_and_norms_that_have_a_spread_get_noise_too() -> None:
    model, clean = tiny("bert"), tiny("bert")
    for one in (model, clean):
        norm = one.bert.embeddings.LayerNorm
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 1.5, 16))
            norm.bias.copy_(torch.linspace(-1, 1, 16))
    attached(model, NoisyTune())
    assert {"bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.bias"} <= changed(model, clean)


def test_a_weight_of_one_number_stays_a_number() -> None:
    model = tiny("bert")
    model.bert.pooler.gate = nn.Parameter(torch.tensor(0.3))
    model.bert.pooler.scale = nn.Parameter(torch.tensor([2.0]))
    attached(model, NoisyTune())
    assert (model.bert.pooler.gate.item(), model.bert.pooler.scale.item()) == (pytest.approx(0.3), 2.0)


def test_buffers_stay() -> None:
    model, clean = tiny("bert"), tiny("bert")
    for one in (model, clean):
        one.bert.pooler.register_buffer("mean", torch.linspace(0, 1, 16))
    attached(model, NoisyTune(where=("all",)))
    kept = dict(clean.named_buffers())
    assert all(torch.equal(value, kept[name]) for name, value in model.named_buffers())


def test_a_tied_weight_gets_noise_once() -> None:
    model, clean = tiny("bert"), tiny("bert")
    attention = model.bert.encoder.layer[0].attention.self
    attention.key.weight = attention.query.weight
    attached(model, NoisyTune(strength=0.2))
    before = clean.get_submodule(QUERY).weight.detach()
    moved = (model.get_submodule(QUERY).weight.detach() - before).abs().max()
    assert 0.09 * before.std() < moved <= 0.1 * before.std() * (1 + 1e-5)  # twice would pass the half with 256 draws
    assert attention.key.weight is attention.query.weight
    alone = tiny("bert")
    attached(alone, NoisyTune(strength=0.2))
    assert torch.equal(alone.get_submodule(QUERY).weight, model.get_submodule(QUERY).weight)


def test_two_attachments_give_the_same_weights_and_another_seed_others() -> None:
    # A run that goes on repeats its surgery from the stage's start weights, so this is what makes it go on exactly.
    one, again, other = tiny("bert"), tiny("bert"), tiny("bert")
    attached(one, NoisyTune())
    attached(again, NoisyTune())
    attached(other, NoisyTune(), seed=1)
    assert not changed(one, again)
    assert f"{QUERY}.weight" in changed(other, one)


def test_each_tensor_has_its_own_stream() -> None:
    shallow, deep, top = tiny("bert", layers=2), tiny("bert", layers=3), tiny("bert", layers=3)
    with torch.no_grad():  # the same numbers under the names that both have
        for name, weight in shallow.named_parameters():
            deep.get_parameter(name).copy_(weight)
            top.get_parameter(name).copy_(weight)
    attached(shallow, NoisyTune())
    attached(deep, NoisyTune())
    assert not changed(shallow, deep)
    attached(top, NoisyTune(where=("block:1",)))
    name = "bert.encoder.layer.1.output.dense.weight"
    assert torch.equal(top.get_parameter(name), deep.get_parameter(name))
    query, key = (deep.get_parameter(f"bert.encoder.layer.0.attention.self.{one}.weight") for one in ("query", "key"))
    clean = tiny("bert", layers=2).bert.encoder.layer[0].attention.self
    assert not torch.allclose((query - clean.query.weight) / clean.query.weight.std(),
                              (key - clean.key.weight) / clean.key.weight.std(), atol=1e-3)  # fmt: skip


def test_a_model_in_double_or_half_precision_gets_noise_of_its_own_type() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        model = tiny("bert").to(dtype)
        attached(model, NoisyTune())
        weight, before = model.get_submodule(QUERY).weight.detach(), tiny("bert").to(dtype).get_submodule(QUERY).weight
        assert weight.dtype == dtype
        assert not torch.equal(weight, before)


def test_quantised_tensors_are_left_alone_and_it_is_said_once() -> None:
    model, how = tiny("bert"), NoisyTune()
    inside = model.get_submodule(QUERY)
    whole = torch.randint(0, 255, (16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    inside.weight = nn.Parameter(whole.clone(), requires_grad=False)
    eighth = torch.linspace(-1, 1, 16).to(torch.float8_e4m3fn)
    inside.bias = nn.Parameter(eighth.clone(), requires_grad=False)
    ctx = context(model, how)
    how.surgery(model, ctx)
    assert torch.equal(inside.weight, whole)
    assert torch.equal(inside.bias.float(), eighth.float())
    assert ctx.notes == [f"noisy_tune leaves 2 quantised tensors alone, such as {QUERY}.weight."]


@pytest.mark.parametrize(("reference", "far"), [("noisy", False), ("clean", True)])
@pytest.mark.parametrize("first", [True, False], ids=["written first", "written last"])
def test_l2sp_pulls_to_the_noisy_or_the_clean_weights_as_is_said(reference, far, first) -> None:
    model, clean = tiny("bert"), tiny("bert")
    pair = [NoisyTune(reference=reference), L2SP(strength=2.0, head_strength=0.0)]

    def nothing(model, batch) -> Tensor:
        return torch.zeros(())

    run = begin(model, pair if first else pair[::-1], steps=1, loss=nothing)
    before = dict(clean.named_parameters())
    squares = sum((weight - before[name]).detach().square().sum().item() for name, weight in model.named_parameters())
    assert squares > 0
    # strength / 2 x |W - W0|^2 with strength 2; the same sum in another order, so 1e-5.
    assert run.loss(model, None).detach().item() == pytest.approx(squares if far else 0.0, rel=1e-5)


@pytest.mark.parametrize("reference", ["noisy", "clean"])
def test_mixout_mixes_with_the_noisy_or_the_clean_weights_as_is_said(reference) -> None:
    model, clean, alone = tiny("bert"), tiny("bert"), tiny("bert")
    attached(model, Mixout(p=0.5), NoisyTune(reference=reference))
    attached(alone, NoisyTune())
    mixing = model.get_submodule(QUERY).parametrizations.weight
    noisy = alone.get_submodule(QUERY).weight
    assert torch.equal(mixing.original, noisy)  # mixout has moved the weight; the noise finds it, and is the same
    assert torch.equal(mixing[0].target, noisy if reference == "noisy" else clean.get_submodule(QUERY).weight)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("reference", ["noisy", "clean"])
def test_that_an_adapter_belongs_to_the_noisy_weights_is_said(reference, first) -> None:
    parts = [NoisyTune(reference=reference), LoRA(r=1)]
    run = begin(tiny("bert"), parts if first else parts[::-1], steps=1)
    run.finish()
    assert sum("the adapter that lora saves belongs to the weights with noise" in note for note in run.notes) == 1
    for others in ([NoisyTune()], [NoisyTune(strength=0.0), LoRA(r=1)]):
        run = begin(tiny("bert"), others, steps=1)
        run.finish()
        assert not any("adapter" in note for note in run.notes)


def test_it_cannot_share_weights_with_another_owner_of_the_start_weights() -> None:
    from luthier.core.ingredient import Ingredient, ingredient

    @ingredient
    class Fresh(Ingredient):
        def touches(self):
            return (owns(Place.START_WEIGHTS, "top:1"),)

    with pytest.raises(ConflictError, match="sets the start weights, which .* sets too"):
        attached(tiny("bert"), NoisyTune(), Fresh())
    attached(tiny("bert"), NoisyTune(where=("bottom:2",)), Fresh())
