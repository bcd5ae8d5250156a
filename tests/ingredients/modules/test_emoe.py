"""EMoE: balanced groups by hand, the gate, the masked form against the one that gathers, every family, and dense again at the end."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from luthier.core.claims import Claim, Place, needs, owns, voids
from luthier.core.ingredient import Ingredient, ingredient
from luthier.errors import ConflictError, RecipeError
from luthier.ingredients.modules.emoe import EMoE, balanced_groups, chosen_units, gate_scores
from luthier.ingredients.modules.lora import LoRA
from luthier.ingredients.settings.freeze import Freeze
from luthier.ingredients.surgery.mixout import Mixout
from luthier.run import Run, begin
from luthier.testing import check_ingredient
from tests.tiny import FAMILIES, tiny

TOKENS = torch.arange(3, 35).reshape(4, 8)
BATCH = {"input_ids": TOKENS, "labels": torch.tensor([0, 1, 2, 0])}
FIRST, LAST = "bert.encoder.layer.1.intermediate.dense", "bert.encoder.layer.1.output.dense"
LABELS = "train/emoe/labels"


@ingredient
class Fresh(Ingredient):
    """Does away with the start weights of a block, as a method that makes them anew does."""

    def touches(self) -> tuple[Claim, ...]:
        return (voids(Place.START_WEIGHTS, "block:-2"),)


def split(model: nn.Module | None = None, *, seed: int = 0, **fields: Any) -> Run:
    """A stage with the tiny BERT's second block from the top, 32 hidden units, in 8 experts of which a token uses 2."""
    return begin(
        model or tiny("bert"), [EMoE(**{"experts": 8, "k": 2, **fields})], learning_rate=1e-2, steps=6, seed=seed
    )


def train(run: Run, steps: int = 3) -> None:
    for _ in range(steps):
        run.offer(run.closure(BATCH))
        run.step()


def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=tokens).logits


def labels_of(run: Run) -> dict[str, Tensor]:
    return run.state_dict()["shelf"][LABELS]


def passed(model: nn.Module, first: str, last: str) -> tuple[Tensor, Tensor, Tensor]:
    """What goes into the first linear layer, into the last one, and comes out of it, in one forward pass."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(first).register_forward_pre_hook(lambda module, given: seen.update(x=given[0])),
        model.get_submodule(last).register_forward_pre_hook(lambda module, given: seen.update(hidden=given[0])),
        model.get_submodule(last).register_forward_hook(lambda module, given, out: seen.update(y=out)),
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    return seen["x"], seen["hidden"], seen["y"]


def same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


# By hand


@pytest.mark.parametrize("seed", range(8))
def test_groups_are_of_equal_size_even_where_the_points_are_not(seed: int) -> None:
    # 0 | 10 11 12 would be the nearest; of two and two, {0, 10} {11, 12} costs 50 + 1/2, {0, 11} {10, 12} 60.5 + 2.
    points = torch.tensor([[0.0], [10.0], [11.0], [12.0]], dtype=torch.float64)
    labels = balanced_groups(points, 2, draw=torch.Generator().manual_seed(seed)).tolist()
    assert labels in ([0, 0, 1, 1], [1, 1, 0, 0])


def test_the_gate_scores_the_mean_key_and_does_not_count_the_bias() -> None:
    # Expert 0 has the keys (1, 0) and (3, 0), expert 1 (0, 1) and (0, 3): mean keys (2, 0) and (0, 2). x = (1, 2): 2 and 4.
    # With its bias of 100 the first unit would take expert 0 to 52.
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 3.0]])
    bias, labels = torch.tensor([100.0, 0.0, 0.0, 0.0]), torch.tensor([0, 1, 0, 1])
    scores = gate_scores(F.linear(torch.tensor([[1.0, 2.0]]), keys, bias), bias, labels, 2)
    assert scores.tolist() == [[2.0, 4.0]]
    assert chosen_units(scores, labels, 1).tolist() == [[False, True, False, True]]


# Identity


def test_all_experts_are_the_dense_model_bit_for_bit() -> None:
    one, other = tiny("bert"), tiny("bert")
    run, plain = split(one, k=8), begin(other, [], learning_rate=1e-2, steps=6)
    assert torch.equal(logits(one), logits(other))
    for each in (run, plain):
        train(each)
        each.finish()
    assert same(one, other)


def test_before_a_step_the_weights_are_as_they_were_and_after_finish_so_are_the_logits() -> None:
    run = split()
    assert same(run.model, tiny("bert"))
    assert not torch.equal(logits(run.model), logits(tiny("bert")))
    run.finish()
    assert torch.equal(logits(run.model), logits(tiny("bert")))


def test_after_the_stage_the_trained_weights_are_those_of_a_plain_dense_model() -> None:
    run = split()
    train(run)
    run.finish()
    plain = tiny("bert", seed=1)
    plain.load_state_dict(run.model.state_dict())
    assert torch.equal(logits(run.model), logits(plain))
    assert any("dense again" in note for note in run.notes)


# Invariants


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 3, 6, 12, 24]))
def test_every_expert_has_as_many_units(seed: int, groups: int) -> None:
    points = torch.randn(24, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels = balanced_groups(points, groups, draw=torch.Generator().manual_seed(seed + 1))
    assert torch.bincount(labels, minlength=groups).tolist() == [24 // groups] * groups
    assert torch.equal(labels, balanced_groups(points, groups, draw=torch.Generator().manual_seed(seed + 1)))


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_more_rounds_never_lie_farther_from_their_centres(seed: int) -> None:
    """The sum over groups of squared distances to the group's mean; roundings of float64."""
    points = torch.randn(24, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def distance(rounds: int) -> float:
        labels = balanced_groups(points, 4, draw=torch.Generator().manual_seed(seed), rounds=rounds)
        return sum(float((points[labels == g] - points[labels == g].mean(0)).square().sum()) for g in range(4))

    told = [distance(rounds) for rounds in (1, 2, 3, 100)]
    assert all(later <= before + 1e-12 for before, later in itertools.pairwise(told))


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 6), st.booleans())
def test_the_gate_is_the_product_with_the_mean_key(seed: int, k: int, biased: bool) -> None:
    """x . mean over the expert's rows of W_in, row by row; float64, so 1e-12. And each token uses k experts whole."""
    draw = torch.Generator().manual_seed(seed)
    keys, x, bias = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((24, 5), (7, 5), (24,)))
    labels = torch.arange(6).repeat_interleave(4)[torch.randperm(24, generator=draw)]
    given_bias = bias if biased else None
    scores = gate_scores(F.linear(x, keys, given_bias), given_bias, labels, 6)
    for expert in range(6):
        torch.testing.assert_close(scores[:, expert], x @ keys[labels == expert].mean(0), atol=1e-12, rtol=0)
    used = chosen_units(scores, labels, k)
    assert used.sum(-1).tolist() == [4 * k] * 7
    assert all(len(set(labels[one].tolist())) == k for one in used)


def test_the_score_of_half_precision_is_made_in_single_precision() -> None:
    # 256 + 1 is 256 in bf16 (its step there is 2): the mean of 256, 256, 1, 1 is 128.5 in single precision only.
    before = torch.tensor([[256.0, 256.0, 1.0, 1.0]], dtype=torch.bfloat16)
    assert gate_scores(before, None, torch.zeros(4, dtype=torch.int64), 1).tolist() == [[128.5]]


def test_a_row_does_not_depend_on_those_beside_it() -> None:
    """Float64: other shapes of the products may round otherwise, no more than 1e-12."""
    model = tiny("bert").double()
    split(model)
    together = logits(model)
    alone = torch.cat([logits(model, TOKENS[row : row + 1]) for row in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=0)


def test_experts_that_no_token_chose_have_no_gradient_and_the_gate_gives_none() -> None:
    # Two tokens with one expert each: at most 2 of 16 experts, so 28 of 32 units at least are silent.
    run = split(experts=16, k=1)
    batch = {"input_ids": TOKENS[:1, :2], "labels": torch.tensor([1])}
    run.offer(run.closure(batch))
    first, last = run.model.get_submodule(FIRST), run.model.get_submodule(LAST)
    silent = (first.weight.grad == 0).all(dim=1)
    assert 28 <= int(silent.sum()) < 32
    assert torch.equal(silent, (last.weight.grad == 0).all(dim=0))
    before = torch.randn(2, 32, requires_grad=True)
    assert not gate_scores(before, first.bias, labels_of(run)[FIRST], 16).requires_grad


def test_the_gate_follows_the_weights_and_the_groups_stay() -> None:
    # Keys of the opposite sign: every score changes its sign, so the best 4 of 8 experts are now the other 4.
    model = tiny("bert")
    run = split(model, k=4)
    before = labels_of(run)[FIRST]
    used = passed(model, FIRST, LAST)[1] != 0
    with torch.no_grad():
        model.get_submodule(FIRST).weight.neg_()
    assert torch.equal(used, passed(model, FIRST, LAST)[1] == 0)
    assert torch.equal(before, labels_of(run)[FIRST])


# Parity


@pytest.mark.parametrize(("family", "first", "last"), [
    ("bert", FIRST, LAST),
    ("distilbert", "distilbert.transformer.layer.1.ffn.lin1", "distilbert.transformer.layer.1.ffn.lin2"),
    ("gpt2", "transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"),
])  # fmt: skip
def test_it_equals_the_form_that_computes_only_the_chosen_experts(family: str, first: str, last: str) -> None:
    """Token by token: sum over its k best experts of act(W_e x + b_e) V_e, and the output's bias once; float64, so 1e-12."""
    model = tiny(family).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))  # biases too
    labels = labels_of(split(model))[first]
    x, _, y = passed(model, first, last)
    one, other = model.get_submodule(first), model.get_submodule(last)
    keys, values = (one.weight.T, other.weight.T) if family == "gpt2" else (one.weight, other.weight)
    gelu = transformers.activations.ACT2FN[
        getattr(model.config, "hidden_act", None) or {"gpt2": "gelu_new"}.get(family, "gelu")
    ]
    means = torch.stack([keys[labels == expert].mean(0) for expert in range(8)])
    for token, out in zip(x.reshape(-1, 16), y.reshape(-1, 16), strict=True):
        mine = other.bias.clone()
        for expert in (means @ token).topk(2).indices:
            at = labels == expert
            mine = mine + gelu(keys[at] @ token + one.bias[at]) @ values[:, at].T
        torch.testing.assert_close(out, mine, atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gated_layers_equal_the_authors_permuted_form(family: str) -> None:
    """Rows of each expert put side by side, the choice repeated over them: down(act(gate x) * up x * repeat(chosen)); float64, 1e-12."""
    model = tiny(family).double()
    labels = labels_of(split(model))["model.layers.1.mlp.gate_proj"]
    mlp, order = model.model.layers[1].mlp, labels.argsort()
    x, _, y = passed(model, "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj")
    gate, up, down = mlp.gate_proj.weight[order], mlp.up_proj.weight[order], mlp.down_proj.weight[:, order]
    best = (x @ gate.view(8, 4, 16).mean(1).T).topk(2).indices
    chosen = F.one_hot(best, 8).sum(-2).double().repeat_interleave(4, dim=-1)
    theirs = (F.silu(x @ gate.T) * (x @ up.T) * chosen) @ down.T
    torch.testing.assert_close(y, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "modernbert"])
def test_the_layer_is_found_in_every_family_and_the_weights_keep_their_names(family: str) -> None:
    model, names = tiny(family), [name for name, _ in tiny(family).named_parameters()]
    run = split(model, where=("blocks",))
    found = labels_of(run)
    assert len(found) == (1 if family == "albert" else 3)
    assert all(torch.bincount(labels).tolist() == [4] * 8 for labels in found.values())
    assert [name for name, _ in model.named_parameters()] == names
    assert not torch.equal(logits(model), logits(tiny(family)))
    run.finish()
    assert torch.equal(logits(model), logits(tiny(family)))


def test_t5s_gated_layer_is_split_by_the_one_that_is_activated() -> None:
    config = transformers.T5Config(
        vocab_size=64,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=3,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        num_labels=3,
    )
    with torch.random.fork_rng(devices=[]):
        run = split(transformers.T5ForTokenClassification(config))
    assert list(labels_of(run)) == ["transformer.encoder.block.1.layer.1.DenseReluDense.wi_0"]


def test_the_defaults_fit_a_model_of_384_units_and_six_blocks() -> None:
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=3,
    )
    with torch.random.fork_rng(devices=[]):
        model = transformers.BertForSequenceClassification(config)
    run = begin(model, [EMoE()], steps=1)
    ((name, labels),) = labels_of(run).items()
    assert name == "bert.encoder.layer.4.intermediate.dense"
    assert torch.bincount(labels).tolist() == [24] * 64


def test_gradient_checkpointing_chooses_the_same_units() -> None:
    """The same operations on the same numbers: equal to the bit."""
    told = []
    for again in (None, False, True):
        model = tiny("bert")
        if again is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": again})
        run = split(model, where=("blocks",))
        run.closure(BATCH, {**BATCH, "input_ids": TOKENS.flip(0)}).backward()
        told.append({name: weight.grad for name, weight in model.named_parameters()})
    for other in told[1:]:
        assert all(torch.equal(value, other[name]) for name, value in told[0].items())


# Conformance


@pytest.mark.parametrize("fields", [{"k": 2}, {"k": 1, "where": ("top:2",)}])
def test_it_keeps_its_promises(fields: dict[str, Any]) -> None:
    """It sets which weights the forward pass sees by hooks, not by parametrizations, which is where the check looks."""
    check_ingredient(EMoE(experts=8, **fields), unobservable={Place.FORWARD_WEIGHTS})


def test_a_run_that_goes_on_has_the_groups_that_were_saved() -> None:
    whole, first = split(seed=0), split(seed=0)
    second = split(tiny("bert", seed=3), seed=1)
    assert not torch.equal(labels_of(first)[FIRST], labels_of(second)[FIRST])
    assert not torch.equal(logits(first.model), logits(second.model))  # its own groups have been used before it goes on
    for each in (whole, first, second):
        each.train()
    train(whole, 5)
    train(first, 2)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    assert torch.equal(labels_of(first)[FIRST], labels_of(second)[FIRST])
    assert torch.equal(logits(first.model), logits(second.model))
    second.train()
    train(second, 3)
    assert same(whole.model, second.model)


def test_the_groups_depend_on_the_directions_of_the_keys_and_on_the_seed() -> None:
    longer = tiny("bert")
    with torch.no_grad():  # powers of two: exact, so that directions are the same to the bit
        longer.get_submodule(FIRST).weight.mul_(2.0 ** (torch.arange(32) % 5)[:, None])
    assert torch.equal(labels_of(split())[FIRST], labels_of(split(longer))[FIRST])
    assert not torch.equal(labels_of(split())[FIRST], labels_of(split(seed=1))[FIRST])


def test_it_owns_the_weights_that_the_forward_pass_sees_and_needs_them_pretrained_and_trained() -> None:
    at = ("top:1", "block:0")
    assert EMoE(where=at).touches() == (
        owns(Place.FORWARD_WEIGHTS, *at),
        needs(Place.START_WEIGHTS, *at),
        needs(Place.TRAINABLE, *at),
    )


@pytest.mark.parametrize(("other", "why"), [
    (LoRA(), "emoe sets the weights as the forward pass sees them, which lora sets too"),
    (Mixout(), "emoe sets the weights as the forward pass sees them, which mixout sets too"),
    (Freeze(), "emoe needs what is trainable, which freeze does away with"),
    (Fresh(), "emoe needs the start weights, which test_emoe does away with"),
])  # fmt: skip
def test_what_it_cannot_share_a_stage_with(other: Ingredient, why: str) -> None:
    with pytest.raises(ConflictError, match=why):
        begin(tiny("bert"), [EMoE(experts=8, k=2), other], steps=1)


def test_it_shares_a_stage_with_those_that_stay_out_of_its_blocks() -> None:
    run = begin(
        tiny("bert"), [EMoE(experts=8, k=2), Freeze(keep=("top:2", "head")), Mixout(p=0.5, where=("top:1",))], steps=1
    )
    assert list(labels_of(run)) == [FIRST]


# Faults, before any weight moves


@pytest.mark.parametrize(("experts", "near"), [(5, "4 and 8"), (64, "32"), (31, "16 and 32")])
def test_experts_that_do_not_divide_the_units_are_told_with_those_that_do(experts: int, near: str) -> None:
    with pytest.raises(
        RecipeError,
        match=rf"emoe.experts  must divide the 32 hidden units of .*; got {experts}.  Nearest that do: {near}\.",
    ):
        split(experts=experts, k=1)


def test_more_chosen_than_there_are_is_a_fault() -> None:
    with pytest.raises(RecipeError, match="k must be at most experts: 9 of 8"):
        EMoE(experts=8, k=9)


@pytest.mark.parametrize("where", ["head", "embeddings"])
def test_what_names_no_block_is_a_fault(where: str) -> None:
    with pytest.raises(RecipeError, match=rf"emoe.where  must name blocks; got {where}"):
        split(where=(where,))


def test_a_fused_gate_is_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"layers.1 with mlp.Wi \(16 -> 64, float32\), mlp.Wo \(32 -> 16, float32\).*fused gates"
    ):
        split(tiny("modernbert"))


def test_a_model_that_has_experts_already_is_refused() -> None:
    config = transformers.Qwen2MoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, num_labels=3,
        num_key_value_heads=2, moe_intermediate_size=24, shared_expert_intermediate_size=32, num_experts=4, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = transformers.Qwen2MoeForSequenceClassification(config)
    with pytest.raises(RecipeError, match=r"without experts of their own; got model.layers.1 with mlp.experts\."):
        split(model)


@pytest.mark.parametrize(("family", "where", "missed"), [
    ("bert", "*layer.1.attention*", f"{FIRST}, {LAST}"),
    ("bert", "*layer.1.intermediate*", LAST),
    ("llama", "*layers.1.mlp.[gd]*", "model.layers.1.mlp.up_proj"),
])  # fmt: skip
def test_a_where_that_misses_a_matrix_of_the_layer_is_a_fault(family: str, where: str, missed: str) -> None:
    with pytest.raises(
        RecipeError, match=rf"emoe.where  must name all matrices .*; got no {missed}\.  Name whole blocks"
    ):
        split(tiny(family), where=(where,))
    begin(tiny("bert"), [EMoE(experts=8, k=2, where=("*layer.1.*dense.weight",))], steps=1)  # biases are not asked for


def test_two_layers_side_by_side_of_which_none_is_known_as_the_gate_are_refused() -> None:
    model = tiny("bert")
    model.bert.encoder.layer[1].intermediate.other = nn.Linear(16, 32)
    with pytest.raises(RecipeError, match="must name blocks with one linear layer from h to d_ff > h"):
        split(model)


def test_quantised_weights_are_refused() -> None:
    model = tiny("bert")
    model.get_submodule(FIRST).weight = nn.Parameter(torch.zeros(32, 16, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(RecipeError, match=r"dense \(16 -> 32, uint8\).*quantised weights"):
        split(model)


# It matters


def test_it_trains_other_weights_than_the_dense_layer_and_validation_sees_the_split_one() -> None:
    model, plain = tiny("bert"), tiny("bert")
    scores: list[Tensor] = []

    def score(live: nn.Module) -> dict[str, float]:
        scores.append(logits(live))
        return {"accuracy": 0.0}

    run = begin(model, [EMoE(experts=8, k=2)], learning_rate=1e-2, steps=3, score=score)
    dense = begin(plain, [], learning_rate=1e-2, steps=3)
    train(run)
    train(dense)
    run.validate()
    assert torch.equal(scores[0], logits(model))
    run.finish()
    assert not torch.equal(scores[0], logits(model))
    assert not same(model, plain)
