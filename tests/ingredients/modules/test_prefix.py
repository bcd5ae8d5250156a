"""prefix: trainable key and value vectors before those of every block's self-attention."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

import luthier
from luthier.core.claims import Place, needs, owns, voids, wraps
from luthier.core.ingredient import Ingredient
from luthier.errors import ConflictError, LuthierError, RecipeError
from luthier.ingredients.modules.lora import LoRA
from luthier.ingredients.modules.prefix import Prefix, Vectors, put_before, seen_by_all
from luthier.ingredients.optimizers.adamw import AdamW
from luthier.ingredients.settings.anneal import Anneal
from luthier.ingredients.settings.freeze import Freeze
from luthier.planning.compose import compose, skeleton
from luthier.recipe import registry
from luthier.recipe.recipe import Recipe, Stage
from luthier.recipe.text import build
from luthier.run import Run, begin
from luthier.testing import check_ingredient
from tests.little import sentences, weights
from tests.tiny import FAMILIES, tiny

TOKENS = torch.arange(3, 35).reshape(4, 8)
BATCH = {"input_ids": TOKENS, "labels": torch.tensor([0, 1, 2, 0])}
REACHED = [family for family in FAMILIES if family not in ("mpnet", "deberta-v2")]
SDPA = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]


def put(model: nn.Module, *, seed: int = 0, **fields: Any) -> Run:
    """A prefix in ``model``, which is in eval mode."""
    run = begin(model, [Prefix(**{"vectors": 5, **fields})], learning_rate=1e-2, steps=3, seed=seed)
    model.eval()
    return run


def held(model: nn.Module) -> dict[str, Vectors]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Vectors)}


@torch.no_grad()
def logits(model: nn.Module, **inputs: Any) -> Tensor:
    return model(**{"input_ids": TOKENS, **inputs}).logits


def train(run: Run, steps: int = 3) -> None:
    for _ in range(steps):
        run.offer(run.closure(BATCH))
        run.step()


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V, written out; mask True: seen. Shape (rows, queries, heads, d)."""
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


class Attention(nn.Module):
    """What an attention function looks at in the module that calls it."""

    def __init__(self, *, is_causal: bool = False, groups: int = 1) -> None:
        super().__init__()
        self.is_causal, self.num_key_value_groups = is_causal, groups


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# By hand


@pytest.mark.parametrize(("asks", "answer"), [(0.0, 4.0), (math.log(2), 5.0)])
def test_by_hand_one_vector_before_two_tokens(asks: float, answer: float) -> None:
    """d = 1, keys 1 | 0, 0 and values 8 | 1, 3.

    The query 0 weighs all three alike: (8 + 1 + 3) / 3 = 4.
    The query ln 2 weighs them e^ln2 : 1 : 1, so (2 x 8 + 1 + 3) / 4 = 5.
    """
    one = torch.ones(1, 1, 1)
    vectors = Vectors(one, 8 * one, SDPA, True, None)
    value = torch.tensor([1.0, 3.0]).reshape(1, 1, 2, 1)
    out, _ = vectors(Attention(), torch.full((1, 1, 2, 1), asks), torch.zeros(1, 1, 2, 1), value, None)
    assert out.flatten().tolist() == pytest.approx([answer, answer])


def test_by_hand_the_number_of_weights() -> None:
    # 3 blocks x 2 (keys, values) x 17 vectors x 16 numbers = 1632; the head 16 x 3 + 3 = 51
    assert begin(tiny("bert"), [Prefix()], steps=1).plan.trainable == 1632 + 51
    # two key heads' worth in a model whose 2 heads share one: 3 x 2 x 17 x 8 = 816; the head 16 x 3 = 48
    assert begin(tiny("llama"), [Prefix()], steps=1).plan.trainable == 816 + 48


def test_by_hand_the_number_of_weights_in_roberta_large() -> None:
    # 24 blocks x 2 x 17 x 1024 = 835584, which the authors tell; the head 1024^2 + 1024 + 3 x 1024 + 3 = 1052675
    config = transformers.RobertaConfig(
        vocab_size=64,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=64,
        num_labels=3,
    )
    with torch.device("meta"):
        model = transformers.RobertaForSequenceClassification(config)
    plan = compose(Recipe(name="x", stages=(Stage(ingredients=(Prefix(),), steps=1),)), model)
    assert plan.stages[0].trainable == 835584 + 1052675


def test_by_hand_a_mask_lets_all_see_the_vectors_and_a_bias_says_nothing_of_them() -> None:
    assert seen_by_all(torch.tensor([[True, False]]), 2).tolist() == [[True, True, True, False]]
    assert seen_by_all(torch.tensor([[0.5, -9.0]]), 2).tolist() == [[0.0, 0.0, 0.5, -9.0]]


# Identity


@pytest.mark.parametrize("family", FAMILIES)
def test_no_vectors_are_the_frozen_model_of_which_the_head_learns(family: str) -> None:
    ours, theirs = tiny(family), tiny(family)
    first, second = (begin(model, [one], learning_rate=1e-2, steps=3) for model, one in (
        (ours, Prefix(vectors=0)), (theirs, Freeze(keep=("head",), quiet=False)),
    ))  # fmt: skip
    if family != "t5":
        for run in (first, second):
            train(run)
    ours.eval(), theirs.eval()
    assert torch.equal(logits(ours), logits(theirs))
    assert list(ours.state_dict()) == list(tiny(family).state_dict())


@pytest.mark.parametrize("family", REACHED)
def test_taken_out_the_model_is_the_plain_one_bit_for_bit(family: str) -> None:
    model = tiny(family).requires_grad_(False)
    names, before = list(model.state_dict()), logits(model)
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    run = put(model)
    assert not torch.equal(logits(model), before)
    run.finish()
    assert torch.equal(logits(model), before)
    assert list(model.state_dict()) == names
    after = [module.config for module in model.modules() if hasattr(module, "config")]
    assert all(old is new for old, new in zip(configs, after, strict=True))


# Invariants


@given(st.integers(1, 6), st.integers(1, 5), st.sampled_from(["none", "padded", "causal"]), st.sampled_from([1, 2]))
def test_it_is_the_softmax_over_vectors_and_tokens(vectors: int, length: int, kind: str, groups: int) -> None:
    """float64 against the same formula in other kernels: 1e-12."""
    query = drawn(1, 2, 4, length, 3)
    key, value = drawn(2, 2, 4 // groups, length, 3), drawn(3, 2, 4 // groups, length, 3)
    first, second = drawn(4, 4 // groups, vectors, 3), drawn(5, 4 // groups, vectors, 3)
    mask = None
    if kind == "padded":
        mask = torch.ones(2, 1, length, length, dtype=torch.bool)
        mask[1, :, :, 1:] = False
    module = Attention(is_causal=kind == "causal", groups=groups)
    out, _ = Vectors(first, second, SDPA, True, None)(module, query, key, value, mask)
    keys, values = (put_before(*both).repeat_interleave(groups, 1) for both in ((first, key), (second, value)))
    seen = torch.ones(length, length, dtype=torch.bool).tril() if kind == "causal" else mask
    if seen is not None:
        seen = torch.cat([torch.ones(*seen.shape[:-1], vectors, dtype=torch.bool), seen], dim=-1)
    torch.testing.assert_close(out, plain(query, keys, values, seen), atol=1e-12, rtol=0)


@given(st.integers(0, 2**31), st.integers(1, 6))
def test_it_is_the_gated_sum_of_attention_to_the_vectors_and_to_the_tokens(seed: int, vectors: int) -> None:
    """(1 - g) own + g attention to the vectors, g = sum exp to the vectors / sum exp to all; float64, 1e-12."""
    query, key, value = (drawn(seed + at, 2, 2, 4, 3) for at in range(3))
    first, second = drawn(seed + 3, 2, vectors, 3), drawn(seed + 4, 2, vectors, 3)
    out, _ = Vectors(first, second, SDPA, True, None)(Attention(), query, key, value, None)
    own, theirs = (torch.logsumexp(query @ keys.transpose(-1, -2) / math.sqrt(3), -1) for keys in (key, first))
    gate = torch.sigmoid(theirs - own).transpose(1, 2)[..., None]
    gated = (1 - gate) * plain(query, key, value) + gate * plain(query, first[None], second[None])
    torch.testing.assert_close(out, gated, atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", REACHED)
def test_both_ways_to_compute_attention_give_the_same_logits(family: str) -> None:
    """float64: 1e-10 of the largest logit, and 1e-6 where the eager way has its softmax in single precision."""
    close = 1e-6 if family in ("llama", "qwen2", "modernbert") else 1e-10
    ours, theirs = tiny(family).double(), tiny(family).double()
    theirs.set_attn_implementation("eager")
    put(ours, std=1.0), put(theirs, std=1.0)
    padded = (torch.arange(8) < torch.tensor([[8], [5], [3], [8]])).long()
    for mask in (None, padded):
        one, other = logits(ours, attention_mask=mask), logits(theirs, attention_mask=mask)
        torch.testing.assert_close(one, other, atol=close * float(one.abs().max()), rtol=0)


@pytest.mark.parametrize("family", [family for family in REACHED if family != "t5"])
def test_padding_changes_no_rows_logits(family: str) -> None:
    """float64: 1e-10 of the largest logit."""
    model = tiny(family).double()
    put(model, std=1.0)
    rows = TOKENS.clone()
    rows[1, 5:] = 0
    padded = logits(model, input_ids=rows, attention_mask=(rows > 0).long())
    alone = logits(model, input_ids=rows[1:2, :5], attention_mask=torch.ones(1, 5, dtype=torch.long))
    torch.testing.assert_close(padded[1:2], alone, atol=1e-10 * float(padded.abs().max()), rtol=0)


# Parity


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_vectors_of_real_tokens_are_those_tokens(family: str) -> None:
    """A causal model: the keys and values of three tokens, then the others at positions 3 and on. float64: 1e-12."""
    model = tiny(family).double()
    whole = logits(model, input_ids=TOKENS[:1])
    with torch.no_grad():
        layers = model.base_model(input_ids=TOKENS[:1, :3], use_cache=True).past_key_values.layers
    run = put(model, vectors=3)
    with torch.no_grad():
        for vectors, layer in zip(held(model).values(), layers, strict=True):
            vectors.key.copy_(layer.keys[0])
            vectors.value.copy_(layer.values[0])
    said = logits(model, input_ids=TOKENS[:1, 3:], position_ids=torch.arange(3, 8)[None])
    torch.testing.assert_close(said, whole, atol=1e-12, rtol=0)
    run.finish()
    assert not torch.allclose(logits(model, input_ids=TOKENS[:1, 3:]), whole, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_vectors_of_real_tokens_are_those_tokens_in_an_encoder_too(family: str) -> None:
    """Its first tokens see the others, so their keys and values are of the whole pass. float64: 1e-12."""
    model = tiny(family).double()
    caught: dict[str, Tensor] = {}

    def catch(name: str) -> Any:
        return lambda module, given, out: caught.__setitem__(name, out)

    hooks = [
        module.register_forward_hook(catch(name))
        for name, module in model.named_modules()
        if name.endswith(("self.key", "self.value"))
    ]
    start = 1 if family == "roberta" else 0  # its positions begin after that of padding
    places = torch.arange(start, start + 8)[None]
    with torch.no_grad():
        whole = model.base_model(input_ids=TOKENS[:1], position_ids=places)[0]
    for hook in hooks:
        hook.remove()
    put(model, vectors=3)
    with torch.no_grad():
        for name, vectors in held(model).items():
            for at in ("key", "value"):
                first = caught[f"{name.removesuffix('prefix')}{at}"][0, :3]
                getattr(vectors, at).copy_(first.view(3, 2, 8).transpose(0, 1))
        said = model.base_model(input_ids=TOKENS[:1, 3:], position_ids=places[:, 3:])[0]
    torch.testing.assert_close(said, whole[:, 3:], atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama", "qwen2"])
def test_it_is_pefts_prefix_but_for_the_positions(family: str) -> None:
    """PEFT's tokens begin at position T. float64, logits and gradients: 1e-10."""
    ours, base = tiny(family).double(), tiny(family).double()
    run = put(ours, std=1.0, vectors=4)
    theirs = get_peft_model(base, PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)).double().eval()
    table = theirs.prompt_encoder["default"].embedding.weight
    each = [weight for vectors in held(ours).values() for weight in (vectors.key, vectors.value)]
    with torch.no_grad():
        table.copy_(torch.cat([weight.transpose(0, 1).flatten(1) for weight in each], dim=1))
    labels, start = BATCH["labels"], 5 if family == "roberta" else 4
    mine = ours(input_ids=TOKENS, position_ids=torch.arange(start, start + 8)[None], labels=labels)
    other = theirs(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), labels=labels)
    torch.testing.assert_close(mine.logits, other.logits, atol=1e-10, rtol=0)
    mine.loss.backward(), other.loss.backward()
    grads = torch.cat([weight.grad.transpose(0, 1).flatten(1) for weight in each], dim=1)
    torch.testing.assert_close(grads, table.grad, atol=1e-10, rtol=0)
    assert run.plan.trainable == table.numel() + sum(p.part.numel for p in run.plan.table.rows if p.part.role == "head")


# Training


@pytest.mark.parametrize("family", [family for family in REACHED if family != "t5"])
def test_the_gradient_reaches_every_vector(family: str) -> None:
    model = tiny(family)
    run = put(model, std=1.0)
    run.closure(BATCH).backward()
    assert len(held(model)) == (1 if family == "albert" else 3)
    for vectors in held(model).values():
        for weight in (vectors.key, vectors.value):
            assert bool((weight.grad.abs().sum(-1) > 0).all())


def test_only_the_vectors_and_the_head_learn() -> None:
    model = tiny("bert")
    run = put(model)
    start = copy.deepcopy(model.state_dict())
    run.train()
    train(run)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    ours = {f"{name}.{at}" for name in held(model) for at in ("key", "value")}
    assert moved == {*ours, "classifier.weight", "classifier.bias"}


def test_the_vectors_start_as_normal_numbers_of_the_recipes_seed() -> None:
    one, other, again = tiny("bert"), tiny("bert"), tiny("bert")
    put(one, vectors=2000), put(other, vectors=2000, seed=1), put(again, vectors=2000)
    first, second, third = (
        torch.cat([p.detach().flatten() for v in held(m).values() for p in v.parameters()]) for m in (one, other, again)
    )
    assert torch.equal(first, third) and not torch.equal(first, second)
    assert len(first.unique()) > 0.99 * len(first)  # no two attentions start alike
    # 192000 numbers: the standard error of their mean is 0.01 / 438 = 2.3e-5, of their deviation 1.6e-5
    assert abs(float(first.mean())) < 1e-4 and abs(float(first.std()) - 0.01) < 1e-4


def test_where_says_which_blocks_get_vectors() -> None:
    model = tiny("bert")
    put(model, where=("top:1", "block:0"))
    assert list(held(model)) == [f"bert.encoder.layer.{at}.attention.self.prefix" for at in (0, 2)]


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    """The same operations on the same numbers: equal to the bit."""
    told = []
    for again in (None, False, True):
        model = tiny("bert")
        if again is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": again})
        run = put(model)
        run.train()
        run.closure(BATCH).backward()
        told.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    for other in told[1:]:
        assert all(torch.equal(value, other[name]) for name, value in told[0].items())


def test_a_copy_of_the_model_has_vectors_of_its_own() -> None:
    model = tiny("bert")
    run = put(model)
    before, other = logits(model), copy.deepcopy(model)
    with torch.no_grad():
        for vectors in held(other).values():
            vectors.value.add_(1.0)
    assert torch.equal(logits(model), before)
    assert not torch.allclose(logits(other), before)
    run.finish()
    assert held(other) and not held(model)


def test_half_precision_around_the_model_takes_the_vectors_along() -> None:
    model = tiny("bert")
    put(model, std=1.0)
    single = logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = logits(model)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), single, atol=0.05, rtol=0.05)  # bfloat16 keeps 8 bits


# Conformance


@pytest.mark.parametrize("fields", [{}, {"vectors": 3, "where": ("top:1",)}])
def test_it_keeps_its_promises(fields: dict[str, Any]) -> None:
    check_ingredient(Prefix(**fields))


@pytest.mark.parametrize("family", ["gpt2", "modernbert"])
def test_it_keeps_its_promises_in_other_families(family: str) -> None:
    chance = 0.1 if family == "gpt2" else 0.0  # the other's is no module that the check could turn off
    check_ingredient(Prefix(vectors=3), model=lambda: tiny(family, dropout=chance))


def test_what_it_claims() -> None:
    assert Prefix(where=("top:2",)).touches() == (
        wraps(Place.MODULES, "top:2"),
        owns(Place.TRAINABLE),
        voids(Place.TRAINABLE, "backbone"),
        needs(Place.WHOLE_WEIGHTS),
        voids(Place.GOES_ON, "backbone"),
    )
    assert voids(Place.GOES_ON, "backbone") not in Prefix(vectors=0).touches()


@pytest.mark.parametrize(("carry", "stages"), [(["head"], 1), (None, 2), (["head", "norms"], 2)])
def test_a_run_whose_weights_would_need_the_vectors_is_refused(carry, stages, tiny_model) -> None:
    first = {"name": "first", "steps": 2, "ingredients": ["prefix"], "carry": carry}
    made = build({"name": "two", "stages": [first, {"name": "then", "steps": 2}][:stages]}, inside="a test")
    with pytest.raises(ConflictError, match="prefix cannot stand here.*carry the head only"):
        luthier.fit(made, model=tiny_model, data=sentences())


@pytest.mark.parametrize("other", [LoRA(), Freeze()])
def test_what_it_cannot_share_a_stage_with(other: Ingredient) -> None:
    with pytest.raises(ConflictError, match="what is trainable"):
        begin(tiny("bert"), [Prefix(), other], steps=1)


# Faults, before any weight moves


@pytest.mark.parametrize("family", ["mpnet", "deberta-v2"])
def test_a_family_that_computes_attention_itself_is_refused_and_left_as_it_was(family: str) -> None:
    model = tiny(family)
    before, names = logits(model), list(model.state_dict())
    with pytest.raises(
        LuthierError, match=rf"prefix.where  must name blocks whose self-attention goes through .*layer.0 of {family}"
    ):
        put(model)
    assert torch.equal(logits(model), before) and list(model.state_dict()) == names


def test_an_attention_function_that_is_not_known_is_refused() -> None:
    model = tiny("bert")
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(LuthierError, match=r"must compute its attention by sdpa or eager; got flex_attention.  Load"):
        put(model)
    assert all(module.config is model.config for module in model.modules() if hasattr(module, "config"))


def test_a_module_of_ones_own_is_refused() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.out = nn.ModuleList(nn.Linear(4, 4) for _ in range(2)), nn.Linear(4, 2)

    family = luthier.Family(blocks="layers", head=("out",))
    with pytest.raises(LuthierError, match=r"must name blocks whose self-attention .* layers.0 of declared"):
        begin(Stack(), [Prefix()], steps=1, family=family)


@pytest.mark.parametrize("where", ["head", "embeddings"])
def test_what_names_no_block_is_a_fault(where: str) -> None:
    with pytest.raises(RecipeError, match=rf"prefix.where  must name blocks; got {where}"):
        put(tiny("bert"), where=(where,))


@pytest.mark.parametrize("fields", [{"vectors": -1}, {"std": -0.1}, {"std": math.inf}, {"where": ()}])
def test_bad_values_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        Prefix(**fields)


# It matters


def test_only_the_head_goes_on_and_the_saved_model_is_a_plain_one(
    tiny_model: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.INGREDIENTS, "prefix", "luthier.ingredients.modules.prefix:Prefix")

    adam = (AdamW(weight_decay=0.0), Anneal("constant"))
    stages = (
        Stage("head", (Prefix(std=1.0), *adam), steps=8, learning_rate=1e-2, batch_size=8, carry=("head",)),
        Stage("rest", (Freeze(keep=("norms",)), *adam), steps=1, learning_rate=1e-9, batch_size=8),
    )
    recipe = Recipe(name="little", stages=stages, max_length=16)
    report = luthier.fit(recipe, model=tiny_model, data=sentences(), out=tmp_path / "run")
    saved = weights(tmp_path / "run")
    start = AutoModelForSequenceClassification.from_pretrained(tiny_model).state_dict()
    body = [name for name in saved if "classifier" not in name and "LayerNorm" not in name]
    assert body and all(torch.equal(saved[name], start[name]) for name in body)
    assert saved.keys() == start.keys()
    assert "its vectors are taken out after the stage and not saved" in str(report.to_json())
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert all(torch.equal(value, saved[name]) for name, value in again.state_dict().items())


def test_the_head_learns_otherwise_beside_the_vectors_than_without() -> None:
    heads = []
    for vectors in (0, 5):
        model = tiny("bert")
        run = put(model, vectors=vectors, std=5.0)
        train(run)
        run.finish()
        heads.append(model.classifier.weight.detach())
    assert not torch.allclose(*heads, atol=1e-4)


def test_validation_sees_the_vectors_and_the_end_does_not() -> None:
    model = tiny("bert")
    seen: list[Tensor] = []

    def score(live: nn.Module) -> dict[str, float]:
        seen.append(logits(live.eval()))
        return {"accuracy": 0.0}

    run = begin(model, [Prefix(std=5.0)], learning_rate=1e-2, steps=3, score=score)
    train(run)
    run.validate()
    run.finish()
    assert not torch.allclose(seen[0], logits(model), atol=1e-4)


def test_the_plan_says_before_anything_runs_what_becomes_of_the_vectors() -> None:
    plan = compose(Recipe(name="x", stages=(Stage(ingredients=(Prefix(),), steps=1),)), skeleton(tiny("bert")))
    assert "its vectors are taken out after the stage and not saved" in str(plan)
