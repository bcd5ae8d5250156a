"""Reinit: the topmost blocks and the bridge start anew, in every family as the model itself would draw them; all else stays."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from luthier.core.anatomy import Anatomy, canonical, select_all
from luthier.core.claims import Place, needs, owns, voids
from luthier.core.families import Family
from luthier.core.seeds import borrowed
from luthier.errors import ConflictError, ModelError, RecipeError
from luthier.ingredients.averaging.swa import SWA
from luthier.ingredients.averaging.wise import WiSE
from luthier.ingredients.losses.l2sp import L2SP
from luthier.ingredients.modules.lora import LoRA
from luthier.ingredients.settings.freeze import Freeze
from luthier.ingredients.settings.llrd import LLRD
from luthier.ingredients.settings.thaw import Thaw
from luthier.ingredients.surgery.mixout import Mixout
from luthier.ingredients.surgery.noisy_tune import NoisyTune
from luthier.ingredients.surgery.reinit import Reinit, drawn_anew
from luthier.planning.compose import compose, skeleton
from luthier.recipe.recipe import Recipe, Stage
from luthier.run import begin
from luthier.testing import check_ingredient
from tests.tiny import tiny

# family: (the stack of blocks, the weights of the bridge), as transformers names them
NAMED: dict[str, tuple[str, set[str]]] = {
    "bert": ("bert.encoder.layer", {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}),
    "roberta": ("roberta.encoder.layer", set()),
    "distilbert": ("distilbert.transformer.layer", set()),
    "electra": ("electra.encoder.layer", set()),
    "deberta-v2": ("deberta.encoder.layer", set()),
    "mpnet": ("mpnet.encoder.layer", set()),
    "modernbert": ("model.layers", {"model.final_norm.weight"}),
    "gpt2": ("transformer.h", {"transformer.ln_f.weight", "transformer.ln_f.bias"}),
    "llama": ("model.layers", {"model.norm.weight"}),
    "qwen2": ("model.layers", {"model.norm.weight"}),
    "t5": ("transformer.encoder.block", {"transformer.encoder.final_layer_norm.weight"}),
}
NORMAL = ("bert", "roberta", "distilbert", "electra", "deberta-v2", "mpnet", "gpt2", "llama", "qwen2")
BATCH = {"input_ids": torch.arange(3, 35).reshape(4, 8), "labels": torch.tensor([0, 1, 2, 0])}


def trained(family: str, **values: Any) -> nn.Module:
    """A tiny model none of whose weights is where its initialiser would put it."""
    model = tiny(family, **values)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=draw).sign() * 0.3)
    return model


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {canonical(name) for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def chosen(model: nn.Module, *selectors: str) -> frozenset[str]:
    return select_all(Anatomy.of(model), selectors)


def spread(tensors: list[Tensor]) -> tuple[float, int]:
    """The standard deviation about zero of all numbers together, and how many there are."""
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors]).double()
    return float(flat.square().mean().sqrt()), len(flat)


# By hand


def test_a_share_of_the_depth_is_rounded_to_whole_blocks() -> None:
    # 40 % of 12 blocks is 4.8, of 6 blocks 2.4; the nearest whole numbers are 5 and 2.
    for layers, first in ((12, 7), (6, 4)):
        model = trained("bert", layers=layers)
        before = values(model)
        begin(model, [Reinit(top="40%", bridge=False)], steps=1)
        blocks = {int(name.split(".")[3]) for name in changed(model, before)}
        assert blocks == set(range(first, layers))


def test_the_projections_into_gpt2s_residual_are_drawn_smaller_by_the_root_of_twice_the_depth() -> None:
    # three blocks with two projections each: 0.02 / sqrt(6) = 0.0081650
    model = trained("gpt2")
    begin(model, [Reinit(top=3)], steps=1)
    seen, count = spread([weight for name, weight in model.named_parameters() if name.endswith("c_proj.weight")])
    assert count == 3 * (16 * 16 + 32 * 16)
    assert seen == pytest.approx(0.0081650, abs=3 * 0.0081650 / math.sqrt(2 * count))


@pytest.mark.parametrize(
    ("layer", "scale"), [("q", 16 * 8), ("k", 16), ("v", 16), ("o", 2 * 8), ("wi", 16), ("wo", 32)]
)
def test_t5_has_a_scale_for_each_layer(layer: str, scale: int) -> None:
    # T5's own: one over the root of what the layer reads, and for queries of d_model times d_kv (16 and 8 here).
    model = trained("t5")
    begin(model, [Reinit(top=3)], steps=1)
    seen, count = spread([weight for name, weight in model.named_parameters() if name.endswith(f".{layer}.weight")])
    assert seen == pytest.approx(scale**-0.5, abs=3 * scale**-0.5 / math.sqrt(2 * count))


def test_modernberts_numbers_are_cut_off_at_its_own_bounds() -> None:
    # its cut-off is 2 standard deviations: of 0.02, and of 0.02 / sqrt(6) for what goes into the residual of three blocks
    model = trained("modernbert")
    assert model.config.initializer_cutoff_factor == 2.0
    begin(model, [Reinit(top=2)], steps=1)
    weights = {name: weight for name, weight in model.named_parameters() if name.startswith("model.layers.2.")}
    for name, weight in weights.items():
        if "norm" not in name:
            bound = 0.04 / (math.sqrt(6) if ".Wo." in name else 1.0)
            assert 0.9 * bound < float(weight.detach().abs().max()) <= bound * (1 + 1e-6)


# Identity


@pytest.mark.parametrize("top", [0, "0%", "0.0%"])
def test_without_blocks_and_bridge_nothing_changes_bit_for_bit(top: int | str) -> None:
    one, other = trained("bert", dropout=0.1), trained("bert", dropout=0.1)
    for model, ingredients in ((one, [Reinit(top=top, bridge=False)]), (other, [])):
        run = begin(model, ingredients, learning_rate=1e-2, steps=2)
        with borrowed(3):
            for _ in range(2):
                run.offer(run.closure(BATCH))
                run.step()
        run.finish()
    assert not changed(one, values(other))


def test_without_blocks_the_bridge_alone_changes() -> None:
    model = trained("bert")
    before = values(model)
    begin(model, [Reinit(top=0)], steps=1)
    assert changed(model, before) == NAMED["bert"][1]


# Invariants


@pytest.mark.parametrize("bridge", [True, False])
@pytest.mark.parametrize("family", NAMED)
def test_exactly_the_named_weights_change(family: str, bridge: bool) -> None:
    stack, after = NAMED[family]
    model = trained(family)
    before = values(model)
    begin(model, [Reinit(top=2, bridge=bridge)], steps=1)
    blocks = {name for name in before if name.startswith((f"{stack}.1.", f"{stack}.2."))}
    assert len(blocks) >= 2 * 6
    assert changed(model, before) == blocks | (after if bridge else set())


@pytest.mark.parametrize("family", NAMED)
def test_norms_are_one_and_zero_and_biases_zero(family: str) -> None:
    model = trained(family)
    names = chosen(model, "top:2", "bridge")
    begin(model, [Reinit(top=2)], steps=1)
    kinds = set()
    for part in Anatomy.of(model).parts:
        if part.name in names and part.kind != "weight":
            value = model.get_parameter(part.name).detach()
            one = part.kind == "norm" and part.name.endswith("weight")
            kinds.add(part.kind)
            assert torch.equal(value, torch.ones_like(value) if one else torch.zeros_like(value)), part.name
    assert "norm" in kinds


@pytest.mark.parametrize("family", NORMAL)
def test_weights_have_the_spread_of_the_models_initialiser(family: str) -> None:
    """The standard deviation of N normal numbers has itself a standard deviation of sigma / sqrt(2 N); three of them."""
    model = trained(family, layers=4)
    names = chosen(model, "top:3")
    begin(model, [Reinit(top=3)], steps=1)
    parts = [part for part in Anatomy.of(model).parts if part.name in names and part.kind == "weight"]
    seen, count = spread([model.get_parameter(part.name) for part in parts if "c_proj" not in part.name])
    sigma = model.config.initializer_range
    assert sigma == 0.02
    assert seen == pytest.approx(sigma, abs=3 * sigma / math.sqrt(2 * count))


@pytest.mark.parametrize("family", NAMED)
def test_what_the_blocks_below_give_is_unchanged_and_what_the_top_gives_is_not(family: str) -> None:
    model = trained(family)
    names = Anatomy.of(model).block_names
    seen: dict[str, Tensor] = {}

    def listen(name: str) -> Any:
        def hook(module: nn.Module, given: Any, out: Any) -> None:
            seen[name] = (out if isinstance(out, Tensor) else out[0]).detach().clone()

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(listen(name))
    rows = {"input_ids": BATCH["input_ids"], "attention_mask": torch.ones(4, 8, dtype=torch.long)}
    model(**rows)
    before = dict(seen)
    begin(model, [Reinit(top=1)], steps=1)
    model.eval()(**rows)
    below, top = names[-2], names[-1]
    assert torch.equal(seen[below], before[below])
    assert not torch.allclose(seen[top], before[top])


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3))
def test_for_any_seed_lower_layers_and_the_head_are_bit_identical(seed: int, top: int) -> None:
    model = trained("bert")
    before = values(model)
    names = chosen(model, f"top:{top}")
    drawn_anew(model, names, seed)
    assert changed(model, before) == set(names)
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


# Parity


@pytest.mark.parametrize("family", NAMED)
def test_the_numbers_are_those_that_transformers_draws_for_weights_that_a_checkpoint_lacks(family: str) -> None:
    """Its own way: what is marked as read from the checkpoint is passed over. The same calls in the same order: equal to the bit."""
    ours, theirs = trained(family), trained(family)
    names = chosen(ours, "top:2", "bridge")
    drawn_anew(ours, names, 11)
    for module in theirs.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    for name, weight in theirs.named_parameters():
        weight._is_hf_initialized = name not in names
    with borrowed(11):
        theirs.initialize_weights()
    assert not changed(ours, values(theirs))


def test_layers_that_only_know_how_to_reset_themselves_are_reset_as_torch_makes_them() -> None:
    model, fresh = little(), little()
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(9.0)
    before = values(model)
    run = begin(model, [Reinit(top=1)], steps=1, loss=sum_of, family=FAMILY)
    block = model.blocks[1]
    assert changed(model, before) == {name for name in before if name.startswith("blocks.1.")}
    assert torch.equal(block.norm1.weight, torch.ones(16))
    for name in ("norm1.bias", "self_attn.in_proj_bias", "self_attn.out_proj.bias"):
        assert torch.equal(block.get_parameter(name), fresh.blocks[1].get_parameter(name))  # zeros
    # Xavier: uniform up to sqrt(6 / (16 + 48)); linear layers: up to 1 / sqrt(16)
    assert 0.9 * 0.3062 < float(block.self_attn.in_proj_weight.detach().abs().max()) <= 0.30619
    assert 0.22 < float(block.linear1.weight.detach().abs().max()) <= 0.25
    assert run.model is model


# Conformance


@pytest.mark.parametrize("one", [Reinit(), Reinit(top="67%", bridge=False)])
def test_it_keeps_its_promises(one: Reinit) -> None:
    check_ingredient(one)


def test_it_claims_what_it_draws_and_nothing_at_its_neutral_value() -> None:
    at = ("top:2", "bridge")
    assert Reinit(top=2).touches() == (
        owns(Place.START_WEIGHTS, *at), needs(Place.TRAINABLE, *at), voids(Place.START_WEIGHTS, *at),
        voids(Place.REFERENCE, *at), voids(Place.EARLIER),
    )  # fmt: skip
    assert Reinit(top=0, bridge=False).touches() == ()


@pytest.mark.parametrize(("other", "reason"), [
    (Mixout(p=0.5), r"reinit does away with the reference weights, which mixout needs"),
    (L2SP(), r"reinit does away with the reference weights, which l2sp needs"),
    (WiSE(alpha=0.5), r"reinit does away with the reference weights, which wise needs"),
    (Freeze(keep=("head",)), r"reinit needs what is trainable, which freeze does away with"),
    (Freeze(keep=("head", "top:1")), r"reinit needs what is trainable, which freeze does away with"),
    (LoRA(r=2), r"reinit needs what is trainable, which lora does away with"),
    (Thaw(bands=1), r"reinit needs what is trainable, which thaw does away with"),
    (NoisyTune(), r"reinit sets the start weights, which noisy_tune sets too"),
    (NoisyTune(reference="clean"), r"reinit does away with the start weights, which noisy_tune edits"),
])  # fmt: skip
def test_methods_that_need_the_pretrained_top_are_refused_with_the_reason(other: Any, reason: str) -> None:
    for ingredients, told in (
        ((Reinit(top=2), other), reason),
        ((other, Reinit(top=2)), "and reinit cannot share a stage"),
    ):
        stage = Stage(name="train", ingredients=ingredients, steps=4)
        with pytest.raises(ConflictError, match=told):
            compose(Recipe(name="x", stages=(stage,)), skeleton(tiny("bert")))


@pytest.mark.parametrize("other", [
    Mixout(p=0.5, where=("block:0",)), Freeze(keep=("head", "bridge", "top:2")), NoisyTune(where=("embeddings",)), LLRD(0.9), SWA(),
])  # fmt: skip
def test_methods_that_leave_the_top_alone_are_welcome(other: Any) -> None:
    model = trained("bert")
    before = values(model)
    begin(model, [other, Reinit(top=2)], steps=4)
    assert not torch.equal(
        model.bert.encoder.layer[2].output.dense.weight, before["bert.encoder.layer.2.output.dense.weight"]
    )


def test_a_stage_after_the_first_cannot_draw_anew_what_was_trained() -> None:
    stages = (Stage(name="lp", ingredients=(Freeze(),), steps=2), Stage(name="ft", ingredients=(Reinit(),), steps=2))
    with pytest.raises(ConflictError) as caught:
        compose(Recipe(name="x", stages=stages), skeleton(tiny("bert")))
    told = str(caught.value)
    assert "stages[1] 'ft': reinit cannot stand here" in told
    assert "reinit does away with what earlier stages trained, which the stages before need" in told
    compose(Recipe(name="x", stages=stages[::-1]), skeleton(tiny("bert")))  # first it may


def test_at_its_neutral_value_it_may_stand_in_any_stage() -> None:
    neutral = Stage(name="ft", ingredients=(Reinit(top=0, bridge=False),), steps=2)
    made = compose(Recipe(name="x", stages=(Stage(name="lp", steps=2), neutral)), skeleton(tiny("bert")))
    assert [plan.name for plan in made.stages] == ["lp", "ft"]


@pytest.mark.parametrize(("family", "one", "must"), [
    ("albert", Reinit(top=1), "blocks of this model share one set of weights"),
    ("roberta", Reinit(top=0), "matches no weight with 'bridge'"),
    ("bert", Reinit(top=9), "must be between top:0 and top:3 for this model of 3 blocks; got 9"),
    ("bert", Reinit(top="140%"), "must be between top:0 and top:3 for this model of 3 blocks; got 140%"),
])  # fmt: skip
def test_blocks_or_a_bridge_that_are_not_there_are_refused(family: str, one: Reinit, must: str) -> None:
    with pytest.raises(RecipeError, match=must):
        begin(tiny(family), [one], steps=1)


@pytest.mark.parametrize("top", [-1, 1.5, "half", "-5%", "%"])
def test_values_that_are_no_count_and_no_share_are_refused(top: Any) -> None:
    with pytest.raises(RecipeError, match="top"):
        Reinit(top=top)


# It matters


def test_the_numbers_are_named_by_the_seed_and_the_rest_does_not_move_with_top() -> None:
    """Head, lower layers and the order of the rows are the same for every ``top``; nothing is drawn from the global generator."""
    start = values(trained("bert"))
    orders, tops, states = [], {}, [torch.random.get_rng_state()]
    for top, seed in ((1, 0), (1, 0), (2, 0), (1, 1)):
        model = trained("bert")
        stage = Stage(name="train", ingredients=(Reinit(top=top),), epochs=1.0, batch_size=4)
        stream = compose(Recipe(name="x", stages=(stage,)), skeleton(model), lengths=[8] * 24).stages[0].stream
        assert stream is not None
        orders.append(stream.epoch(0))
        run = begin(model, [Reinit(top=top)], steps=1, seed=seed)
        states.append(torch.random.get_rng_state())
        assert run.notes == []
        tops.setdefault((top, seed), []).append(values(model))
    assert all(torch.equal(states[0], state) for state in states)
    assert orders[0] == orders[1] == orders[2]
    name = "bert.encoder.layer.2.output.dense.weight"
    first, again = tops[1, 0]
    assert all(torch.equal(value, again[one]) for one, value in first.items())
    assert not torch.equal(first[name], tops[1, 1][0][name])
    assert not torch.equal(first[name], start[name])
    for one in ("classifier.weight", "classifier.bias", "bert.encoder.layer.0.output.dense.weight"):
        assert torch.equal(first[one], start[one])
        assert torch.equal(tops[2, 0][0][one], start[one])


def test_a_model_that_was_loaded_is_drawn_anew_as_one_that_was_made(tmp_path: Any) -> None:
    """transformers marks what it has read, so that its initialisers pass over it."""
    trained("bert").save_pretrained(tmp_path)
    model = type(tiny("bert")).from_pretrained(tmp_path)
    before = values(model)
    for thing in (*model.parameters(), *model.modules()):
        thing._is_hf_initialized = True
    made = trained("bert")
    begin(made, [Reinit(top=1, bridge=False)], steps=1)
    begin(model, [Reinit(top=1, bridge=False)], steps=1)
    assert changed(model, before) == {name for name in before if name.startswith("bert.encoder.layer.2.")}
    assert not changed(model, values(made))
    assert all(thing._is_hf_initialized for thing in (*model.parameters(), *model.modules()))


def test_half_precision_weights_stay_half() -> None:
    model = trained("bert").to(torch.bfloat16)
    begin(model, [Reinit(top=3)], steps=1)
    weight = model.bert.encoder.layer[0].output.dense.weight
    assert weight.dtype == torch.bfloat16
    # three standard deviations of a spread over 512 numbers; rounding to bf16 moves each by at most one part in 256
    assert spread([weight])[0] == pytest.approx(0.02, abs=3 * 0.02 / math.sqrt(2 * 512) + 0.02 / 256)


class Gated(nn.TransformerEncoderLayer):
    """A block with a weight of its own that nothing can draw."""

    def __init__(self) -> None:
        super().__init__(16, 2, 32, batch_first=True)
        self.gate = nn.Parameter(torch.ones(1))
        self.norm = nn.BatchNorm1d(16)


def little(top: type[nn.Module] | None = None) -> Any:
    """Two blocks of torch's own, an embedding and a head; no transformers."""
    model: Any = nn.Module()
    with borrowed(5):
        model.embed = nn.Embedding(64, 16)
        block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        other = top() if top else nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        model.blocks = nn.ModuleList([block, other])
        model.head = nn.Linear(16, 3)
    return model


FAMILY = Family(blocks="blocks", embeddings=("embed",), head=("head",))


def sum_of(model: nn.Module, batch: Any) -> Tensor:
    return torch.stack([weight.sum() for weight in model.parameters()]).sum()


def test_a_weight_without_an_initialiser_is_told_and_nothing_is_changed() -> None:
    model = little(Gated)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.fill_(7)
    before, state = values(model), torch.random.get_rng_state()
    with pytest.raises(ModelError, match=r"blocks\.1\.gate  must have an initialiser.*reset_parameters"):
        begin(model, [Reinit(top=1)], steps=1, loss=sum_of, family=FAMILY)
    assert not changed(model, before)
    assert torch.equal(state, torch.random.get_rng_state())


def test_an_initialiser_that_fails_leaves_the_weights_as_they_were() -> None:
    class Broken(nn.TransformerEncoderLayer):
        def __init__(self) -> None:
            super().__init__(16, 2, 32, batch_first=True)
            self.gate = nn.Parameter(torch.ones(1))

        def reset_parameters(self) -> None:
            raise RuntimeError("broken")

    model = little(Broken)
    before = values(model)
    with pytest.raises(RuntimeError, match="broken"):
        drawn_anew(model, frozenset(f"blocks.1.{name}" for name, _ in model.blocks[1].named_parameters()), 0)
    assert not changed(model, before)


def test_quantised_weights_are_refused() -> None:
    model = tiny("bert")
    layer = model.bert.encoder.layer[2].output.dense
    layer.weight = nn.Parameter(torch.zeros(16, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match=r"layer\.2\.output\.dense\.weight  must not be quantised"):
        drawn_anew(model, chosen(model, "top:1"), 0)


def test_a_model_inside_a_wrapper_is_drawn_by_its_own_initialiser() -> None:
    """Where the outermost module is no model of transformers': BERT's numbers, not those that torch gives a linear layer."""
    model: Any = nn.Module()
    model.inner = trained("bert")
    stack = "inner.bert.encoder.layer.2."
    drawn_anew(model, frozenset(name for name, _ in model.named_parameters() if name.startswith(stack)), 0)
    seen, count = spread(
        [weight for name, weight in model.inner.bert.encoder.layer[2].named_parameters() if weight.dim() == 2]
    )
    assert count == 4 * 256 + 2 * 512
    assert seen == pytest.approx(0.02, abs=3 * 0.02 / math.sqrt(2 * count))
