"""Quick dropout, attention and products: the distribution, the mathematics, and that nothing else changes."""

from __future__ import annotations

import copy
import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from luthier import kernels, quick
from luthier.errors import RecipeError
from luthier.kernels import QuickRandom, attention, drop_chance, dropout, has_onednn, linear
from luthier.quick import quicken

needs_onednn = pytest.mark.skipif(not has_onednn(), reason="this torch has no oneDNN product")


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def heads(*, rows: int = 5, columns: int = 5, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """q (batch, 3, rows, 4), k and v (batch, 3, columns, 4); float64, as strided as a model makes them."""
    sizes = (rows, columns, columns)
    q, k, v = (uniform(batch, size, 12, seed=i).view(batch, size, 3, 4).transpose(1, 2) for i, size in enumerate(sizes))
    return q, k, v


def bert(**changes: object) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**{**SMALL, "attn_implementation": "sdpa", **changes}))


SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
IDS = torch.arange(1, 25).view(3, 8)
SEEN = torch.tensor([[1] * 8, [1] * 6 + [0] * 2, [1] * 3 + [0] * 5])


def logits(model: nn.Module) -> Tensor:
    out = model(input_ids=IDS, attention_mask=SEEN).logits
    assert isinstance(out, Tensor)
    return out


# --- the draw


def test_the_share_dropped_lies_within_four_sigma_of_the_chance() -> None:
    # 400 000 draws at p = 6554/65536: sigma = sqrt(p (1 - p) / n) = 0.000474.
    n, p = 400_000, drop_chance(0.1)
    dropped = 1 - QuickRandom(3).keep((n,), 0.1).double().mean().item()
    assert abs(dropped - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_neighbouring_draws_are_uncorrelated() -> None:
    # The correlation of n draws has sigma 1 / sqrt(n); lags 1 to 4, because one number of the stream gives 4.
    n = 400_000
    kept = QuickRandom(5).keep((n,), 0.3).double()
    z = (kept - kept.mean()) / kept.std()
    for lag in range(1, 5):
        assert abs((z[lag:] * z[:-lag]).mean().item()) < 4 / math.sqrt(n)


def test_a_chance_is_a_whole_number_of_65536ths() -> None:
    assert drop_chance(0.1) == 6554 / 65536  # 0.1 * 65536 = 6553.6
    assert drop_chance(0.5) == 0.5
    assert drop_chance(1.0) == 1.0


@given(shape=st.lists(st.integers(0, 5), max_size=3), seed=st.integers(0, 9), step=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_equal_names_give_equal_bits_whatever_was_drawn_before(shape: list[int], seed: int, step: int) -> None:
    one, two = QuickRandom(seed), QuickRandom(seed)
    two.keep((7,), 0.5)
    one.reseed("dropout", step)
    two.reseed("dropout", step)
    assert torch.equal(one.keep(shape, 0.5), two.keep(shape, 0.5))


def test_other_seeds_and_other_names_give_other_bits() -> None:
    drawn = []
    for seed, names in ((0, (1, 2)), (1, (1, 2)), (0, (12,)), (0, (2, 1)), (0, ("1", 2))):
        stream = QuickRandom(seed)
        stream.reseed(*names)
        drawn.append(stream.keep((256,), 0.5).numpy().tobytes())
    assert len(set(drawn)) == len(drawn)


def test_the_bits_of_a_seed_do_not_change_between_versions() -> None:
    # Recorded: a run stopped under one version and resumed under another must see the same masks.
    stream = QuickRandom(0)
    stream.reseed("dropout", 7)
    assert stream.keep((16,), 0.5).tolist() == RECORDED


RECORDED = [1, 0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0]


# --- dropout


def test_dropout_gives_zero_or_the_scaled_value_and_nothing_else() -> None:
    out = dropout(torch.ones(1000, dtype=torch.float64), 0.25, random=QuickRandom(0))
    assert sorted(out.unique().tolist()) == [0.0, 1 / 0.75]


def test_dropout_averages_to_its_input() -> None:
    # Mean over 2000 seeds of x * keep / (1 - p) at p = 1/4 has sigma |x| sqrt(p / (1 - p) / 2000) = 0.0129 |x|.
    x = uniform(40)
    mean = torch.stack([dropout(x, 0.25, random=QuickRandom(seed)) for seed in range(2000)]).mean(0)
    assert ((mean - x).abs() <= 4.5 * 0.0129 * x.abs()).all()  # 40 values at 4.5 sigma


def test_dropout_at_zero_is_the_input_and_draws_nothing() -> None:
    x, used, fresh = uniform(9), QuickRandom(0), QuickRandom(0)
    assert dropout(x, 0.0, random=used) is x
    assert torch.equal(used.keep((64,), 0.5), fresh.keep((64,), 0.5))


def test_dropout_at_one_is_zero() -> None:
    assert torch.equal(dropout(uniform(9), 1.0, random=QuickRandom(0)), torch.zeros(9, dtype=torch.float64))


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_a_chance_outside_the_unit_interval_is_refused(p: float) -> None:
    with pytest.raises(RecipeError, match=r"must be in \[0, 1\]"):
        dropout(uniform(3), p, random=QuickRandom(0))


def test_the_gradients_of_dropout_are_right_to_second_order() -> None:
    def masked(x: Tensor) -> Tensor:
        return dropout(x, 0.4, random=QuickRandom(1)).pow(2)  # the same seed each time: a fixed mask

    x = uniform(3, 7).requires_grad_()
    assert torch.autograd.gradcheck(masked, x)
    assert torch.autograd.gradgradcheck(masked, x)


# --- attention


SEES = torch.tensor([True, True, True, False, False])
MASKS = {
    "none": (None, False),
    "causal": (None, True),
    "padding": (SEES.view(1, 1, 1, 5), False),
    "bool rows": ((uniform(2, 1, 5, 5, seed=9) > -0.5) | torch.eye(5, dtype=torch.bool), False),
    "blind row": ((torch.arange(5) != 2).view(1, 1, 5, 1).expand(2, 1, 5, 5), False),
    "added": (uniform(5, 5, seed=8), False),
    "added by head": (uniform(2, 3, 5, 5, seed=8), False),
    "added, -inf": (torch.zeros(5, 5, dtype=torch.float64).masked_fill(~SEES, -math.inf), False),
}


@pytest.mark.parametrize("block", [1, 1 << 19])
@pytest.mark.parametrize("name", MASKS)
def test_attention_without_dropout_is_torchs(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # float64, sums of 5 terms of size one: 1e-12 is far above rounding and far below any wrong term.
    monkeypatch.setattr(kernels, "_BLOCK", block)
    mask, causal = MASKS[name]
    results = []
    for ours in (True, False):
        parts = [part.detach().requires_grad_() for part in heads()]
        if ours:
            out = attention(*parts, p=0.0, random=QuickRandom(0), mask=mask, causal=causal)
        else:
            out = F.scaled_dot_product_attention(*parts, attn_mask=mask, is_causal=causal)
        results.append((out, *torch.autograd.grad((out * uniform(*out.shape, seed=7)).sum(), parts)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_attention_drops_weights_by_the_mask_the_stream_gives() -> None:
    q, k, v = heads(rows=4, columns=6)
    keep = QuickRandom(2).keep((2, 3, 4, 6), 0.3).double()
    weights = torch.softmax(q @ k.transpose(2, 3) / 2, -1)  # width 4: scaling 1/2
    want = (weights * keep / (1 - drop_chance(0.3))) @ v
    got = attention(q, k, v, p=0.3, random=QuickRandom(2))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert not torch.allclose(got, weights @ v)


@pytest.mark.parametrize("name", ["none", "causal", "padding", "blind row", "added by head"])
def test_the_gradients_of_attention_are_right_to_second_order(name: str) -> None:
    mask, causal = MASKS[name]

    def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, p=0.3, random=QuickRandom(4), mask=mask, causal=causal, scaling=0.7)

    parts = tuple(part[:, :1].detach().requires_grad_() for part in heads())
    if name == "added by head":
        mask = mask[:, :1]  # type: ignore[index]
    assert torch.autograd.gradcheck(dropped, parts)
    assert torch.autograd.gradgradcheck(dropped, parts)


def test_second_order_gradients_skip_what_is_frozen() -> None:
    q, k, v = heads()
    q = q.detach().requires_grad_()

    def dropped(part: Tensor) -> Tensor:
        return attention(part, k, v, p=0.3, random=QuickRandom(4))

    assert torch.autograd.gradgradcheck(dropped, q)


def test_a_learned_mask_receives_its_gradient() -> None:
    q, k, v = heads()
    bias = uniform(1, 3, 5, 5, seed=6).requires_grad_()
    assert torch.autograd.gradcheck(lambda b: attention(q, k, v, p=0.3, random=QuickRandom(4), mask=b), bias)


# --- products


@needs_onednn
@pytest.mark.parametrize("how", ["plain", "strided", "tied bias", "expanded gradient"])
def test_linear_is_torchs_up_to_rounding(how: str) -> None:
    # float32, sums of 32 to 64 terms of size one: rounding is near 1e-6; a wrong stride gives errors near one.
    x, w, b = (t.float() for t in (uniform(4, 16, 48), uniform(32, 48, seed=1), uniform(32, seed=2)))
    results = []
    for product in (linear, F.linear):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        one, two, three = leaves
        if how == "strided":
            one = one.transpose(0, 1)[::2]
        bias = two[:, 0] if how == "tied bias" else three
        out = product(one, two, bias)
        slope = torch.ones(()).expand(out.shape) if how == "expanded gradient" else out.detach().cos()
        results.append((out, *torch.autograd.grad(out, leaves, slope, allow_unused=True)))
    for got, want in zip(*results, strict=True):
        if got is None:
            assert want is None
        else:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


@needs_onednn
def test_the_second_derivative_of_linear_is_torchs() -> None:
    # The gradient of |d sum(y^3) / dx|^2 by weight, whose entries are of size 100: 1e-3 is rounding at float32.
    found = []
    for product in (linear, F.linear):
        x, w = uniform(8, 6).float().requires_grad_(), uniform(4, 6, seed=1).float().requires_grad_()
        (slope,) = torch.autograd.grad(product(x, w).pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.pow(2).sum(), (x, w)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


@needs_onednn
def test_a_frozen_weight_gets_no_gradient_and_its_input_does() -> None:
    x, w = uniform(8, 6).float().requires_grad_(), uniform(4, 6, seed=1).float()
    linear(x, w).sum().backward()
    torch.testing.assert_close(x.grad, w.sum(0).expand(8, 6))  # d sum(x w^T) / dx = the sum of w's rows
    assert w.grad is None


# --- a model


def test_without_dropout_a_training_forward_is_bit_identical() -> None:
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    want = logits(model)
    with quicken(model, QuickRandom(0), linears=False):
        assert torch.equal(logits(model), want)


def test_evaluation_is_bit_identical() -> None:
    model = bert().eval()
    want = logits(model)
    with quicken(model, QuickRandom(0), linears=True):
        assert torch.equal(logits(model), want)


def test_every_dropout_of_bert_draws_from_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    # Embeddings 1; a layer 2 (attention output, feed-forward output) and its attention weights; the pooled vector 1.
    drawn: list[tuple[int, ...]] = []
    keep = QuickRandom.keep
    monkeypatch.setattr(QuickRandom, "keep", lambda self, shape, p: drawn.append(tuple(shape)) or keep(self, shape, p))
    model = bert().train()
    with quicken(model, QuickRandom(0)):
        logits(model)
    assert sorted(drawn) == sorted([(3, 8, 16)] * 5 + [(3, 2, 8, 8)] * 2 + [(3, 16)])


def test_a_step_named_again_repeats_its_masks_and_another_does_not() -> None:
    model, random = bert().train(), QuickRandom(0)
    outs = []
    with quicken(model, random):
        for step in (1, 2, 1):
            random.reseed("dropout", step)
            outs.append(logits(model))
    assert torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0], outs[1])


def test_the_mean_over_seeds_of_a_linear_models_output_is_its_undropped_output() -> None:
    # Output of Dropout(1/2) then Linear: variance over masks = sum (w x)^2 p / (1 - p) = sum (w x)^2; 2000 seeds.
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 3)).train()
    x, random = uniform(1, 16).float(), QuickRandom(0)
    total = torch.zeros(1, 3)
    with quicken(model, random), torch.no_grad():
        for step in range(2000):
            random.reseed(step)
            total += model(x)
    sigma = ((model[1].weight * x) ** 2).sum(1).sqrt() / math.sqrt(2000)
    assert ((total / 2000 - model[1](x)).abs() < 4 * sigma).all()


def test_the_global_generators_are_untouched() -> None:
    model = bert().train()
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    with quicken(model, QuickRandom(0)):
        logits(model).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpys).all()


def test_names_and_modules_stay_and_removal_restores_all() -> None:
    model = bert().train()
    held = dict(model.__dict__)
    keys, kinds = list(model.state_dict()), [type(part) for part in model.modules()]
    torch.manual_seed(1)
    want = logits(model)
    handle = quicken(model, QuickRandom(0))
    assert list(model.state_dict()) == keys
    assert [type(part) for part in model.modules()] == kinds
    assert inspect.signature(model.forward) == inspect.signature(type(model).forward.__get__(model))
    logits(model)
    handle.remove()
    handle.remove()
    assert model.__dict__.keys() == held.keys()
    torch.manual_seed(1)
    assert torch.equal(logits(model), want)


def test_a_copy_runs_its_own_weights_and_is_released_with_the_original() -> None:
    model, random = bert().train(), QuickRandom(0)
    handle = quicken(model, random)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.zero_()
    random.reseed(1)
    assert not logits(twin).any()
    assert logits(model).any()
    handle.remove()
    before = torch.get_rng_state()
    logits(twin)
    assert not torch.equal(torch.get_rng_state(), before)  # torch draws again


def test_a_wrapper_put_on_later_survives_the_removal() -> None:
    model = bert().train()
    handle = quicken(model, QuickRandom(0))
    inner = model.forward
    model.forward = lambda **batch: inner(**batch)
    handle.remove()
    before = torch.get_rng_state()
    logits(model)
    assert not torch.equal(torch.get_rng_state(), before)


def test_a_forward_that_fails_leaves_torch_as_it_was() -> None:
    model = bert().train()
    with quicken(model, QuickRandom(0)):
        with pytest.raises(IndexError):
            model(input_ids=IDS + 1000)
        before = torch.get_rng_state()
        F.dropout(torch.ones(8), 0.5)
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing_the_gradient_is_of_the_mask_that_ran(reentrant: bool) -> None:
    # y = dropout(x): dy/dx is y / x, mask and scale alike; a second, different mask would break it.
    class Part(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out = checkpoint(lambda t: F.dropout(t * 1.0, 0.5, self.training), x, use_reentrant=reentrant)
            assert isinstance(out, Tensor)
            return out

    model = Part().train()
    x = (uniform(200) + 2).requires_grad_()
    with quicken(model, QuickRandom(0)):
        y = model(x)
        (slope,) = torch.autograd.grad(y.sum(), x) if not reentrant else (None,)
        if reentrant:
            y.sum().backward()
            slope = x.grad
    torch.testing.assert_close(slope * x, y)


def test_gradient_checkpointing_of_a_model_is_left_to_torch_and_said() -> None:
    model = bert().train()
    model.gradient_checkpointing_enable()
    handle = quicken(model, QuickRandom(0))
    assert any("checkpointing" in note for note in handle.notes)
    before = torch.get_rng_state()
    logits(model)
    assert not torch.equal(torch.get_rng_state(), before)


def test_torch_func_sees_torchs_own_operations() -> None:
    model = nn.Linear(6, 4).train()
    x = uniform(5, 6).float()
    with quicken(model, QuickRandom(0)):
        jacobians = torch.func.vmap(torch.func.jacrev(lambda row: model(row)))(x)
    torch.testing.assert_close(jacobians, model.weight.expand(5, 4, 6))  # d(w x)/dx = w


def family(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    shared = {**SMALL, "attn_implementation": "sdpa"}
    if name == "roberta":
        return RobertaForSequenceClassification(RobertaConfig(**{**shared, "max_position_embeddings": 20}))
    if name == "deberta":
        return DebertaV2ForSequenceClassification(
            DebertaV2Config(**SMALL, relative_attention=True, pooler_hidden_size=16)
        )
    if name == "gpt2":
        return GPT2ForSequenceClassification(
            GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, pad_token_id=0, attn_implementation="sdpa")
        )
    if name == "llama":
        return LlamaForSequenceClassification(LlamaConfig(**shared, num_key_value_heads=1, attention_dropout=0.2))
    return bert(attn_implementation="eager")


@pytest.mark.parametrize("name", ["roberta", "deberta", "gpt2", "llama", "eager bert"])
def test_the_family_never_draws_from_torch_and_learns_from_a_reproducible_mask(name: str) -> None:
    model, random = family(name).train(), QuickRandom(0)
    found = []
    before = torch.get_rng_state()
    with quicken(model, random):
        for step in (1, 2, 1):
            random.reseed(step)
            model.zero_grad()
            logits(model).pow(2).sum().backward()
            found.append(torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_what_is_not_served_is_said() -> None:
    notes = quicken(family("eager bert"), QuickRandom(0), linears=False).notes
    assert notes[0] == "8 dropout modules draw 16-bit masks"  # 1 + 2 layers x 3 + 1
    assert notes[1] == "linear layers stay with torch"
    assert notes[2].startswith("attention is 'eager'")


@needs_onednn
def test_quick_products_serve_a_models_linear_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rounding only: 1e-4 of gradients of size one after two layers in float32.
    monkeypatch.setattr(quick, "_WORTH", 0)
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    calls: list[int] = []
    product = quick.linear
    monkeypatch.setattr(quick, "linear", lambda x, w, b: calls.append(1) or product(x, w, b))
    found = []
    for on in (False, True):
        handle = quicken(model, QuickRandom(0), linears=on)
        model.zero_grad()
        logits(model).pow(2).sum().backward()
        found.append(torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]))
        handle.remove()
    assert len(calls) == 2 * 6 + 2  # a layer: q, k, v, output, two of the feed-forward; then pooler and head
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
