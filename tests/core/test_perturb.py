"""Perturbed word embeddings: the same as handing the model its embeddings, in every family and wrapper, and noise made again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luthier.core.context import Progress
from luthier.core.perturb import (
    Draws,
    afresh,
    copied,
    embeddings,
    lent,
    named,
    perturbed,
    rewinder,
    slope,
    uncompiled,
    unwrapped,
    zeros,
)
from luthier.errors import ModelError, RunError
from luthier.quick import QuickRandom, quicken
from tests.tiny import FAMILIES, tiny

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 3, 0]])
REAL = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
BATCH = {"input_ids": IDS, "attention_mask": REAL}


class Wrapper(nn.Module):
    """What data parallelism does to a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **given: Any) -> Any:
        return self.module(**given)


def drawn(delta: Tensor) -> Tensor:
    return torch.randn(delta.shape, generator=torch.Generator().manual_seed(0), dtype=delta.dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_same_as_handing_the_model_its_embeddings(family: str) -> None:
    model = tiny(family)
    delta, mask = zeros(model, BATCH)
    assert mask[..., 0].tolist() == REAL.tolist()
    delta = drawn(delta) * mask
    given = model.get_input_embeddings()(IDS) + delta
    with torch.no_grad():
        plain = model(**BATCH).logits
        with perturbed(model, delta):
            moved = model(**BATCH).logits
        after = model(**BATCH).logits
        if family not in ("gpt2", "llama", "qwen2"):  # they find the last token by its number
            expected = model(inputs_embeds=given, attention_mask=REAL).logits
            assert torch.equal(moved, expected)
    assert not torch.equal(moved, plain)
    assert torch.equal(after, plain)


@pytest.mark.parametrize(
    "wrap",
    [
        Wrapper,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: torch.compile(Wrapper(model), backend="eager"),
    ],
    ids=["parallel", "compiled", "compiled parallel"],
)
def test_it_reaches_the_model_inside_its_wrappers(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = tiny("bert", layers=1)
    delta = drawn(zeros(model, BATCH)[0])
    whole = wrap(model)
    with torch.no_grad():
        plain = whole(**BATCH).logits  # what is compiled is compiled here, without the addition
        with perturbed(model, delta):
            expected = model(**BATCH).logits
        with perturbed(whole, delta):
            assert torch.equal(whole(**BATCH).logits, expected)
        assert torch.equal(whole(**BATCH).logits, plain)
    assert not torch.equal(plain, expected)
    assert unwrapped(whole) is model


def test_inside_it_what_was_compiled_is_not_used() -> None:
    used: list[int] = []

    def backend(graph: Any, given: Any) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            used.append(1)
            return graph(*args)

        return call

    model = tiny("bert", layers=1)
    whole = torch.compile(model, backend=backend)
    with torch.no_grad():
        whole(**BATCH)
        before = len(used)
        with perturbed(whole, drawn(zeros(model, BATCH)[0])):
            whole(**BATCH)
        assert len(used) == before > 0
        whole(**BATCH)
    assert len(used) > before


def test_without_a_mask_every_token_is_real_and_double_precision_stays() -> None:
    delta, mask = zeros(tiny("bert").double(), {"input_ids": IDS})
    assert delta.shape == (2, 4, 16)
    assert delta.dtype == mask.dtype == torch.float64
    assert mask.sum() == 8
    assert zeros(tiny("bert").bfloat16(), BATCH)[0].dtype == torch.float32


def test_a_model_that_does_not_say_where_its_embeddings_are_is_told_so() -> None:
    with pytest.raises(ModelError, match=r"Sequential.*get_input_embeddings"):
        embeddings(nn.Sequential(nn.Linear(1, 1)))


class Deaf(nn.Module):
    """Has embeddings and does not call them; or calls them with other tokens."""

    def __init__(self, calls: bool) -> None:
        super().__init__()
        self.words, self.calls = nn.Embedding(9, 2), calls

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, tokens: Tensor) -> Any:
        return self.words(tokens[:1]) if self.calls else tokens


@pytest.mark.parametrize(
    ("calls", "told"), [(False, "must call its word embeddings"), (True, r"\(2, 4, 2\); got \(1, 4, 2\)")]
)
def test_a_perturbation_that_does_not_arrive_is_told(calls: bool, told: str) -> None:
    model = Deaf(calls)
    with pytest.raises(RunError, match=told), perturbed(model, torch.zeros(2, 4, 2)):
        model(IDS)
    assert not model.words._forward_hooks


def test_the_slope_is_that_of_the_perturbation_and_leaves_no_gradient_on_weights() -> None:
    model = Deaf(calls=True)
    delta = torch.zeros(1, 4, 2, requires_grad=True)
    with perturbed(model, delta):
        value = (model(IDS) * torch.tensor([2.0, -1.0])).sum()
    assert slope(value, delta, keep=True).tolist() == [[[2.0, -1.0]] * 4]
    assert slope(value, delta, keep=False).tolist() == [[[2.0, -1.0]] * 4]
    assert model.words.weight.grad is None
    with pytest.raises(RunError, match="must depend on what is added"):
        slope(model.words.weight.sum(), delta, keep=False)


def test_row_numbers_are_left_out_only_where_the_embeddings_are_frozen() -> None:
    model, batch = tiny("bert"), {**BATCH, "rows": [0, 1]}
    assert afresh(model, batch) is batch
    model.get_input_embeddings().weight.requires_grad_(False)
    assert set(afresh(model, batch)) == {"input_ids", "attention_mask"}
    assert afresh(model, BATCH) is BATCH


@pytest.mark.parametrize("quick", [False, True], ids=["torch's dropout", "quick dropout"])
def test_a_rewound_pass_has_the_dropout_it_had_and_the_next_has_another(quick: bool) -> None:
    model = tiny("bert", dropout=0.5).train()
    handle = quicken(model, QuickRandom(0)) if quick else None
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model(**BATCH)  # somewhere in the stream
        rewind = rewinder(Wrapper(model))
        first, other = model(**BATCH).logits, model(**BATCH).logits
        rewind()
        again, next = model(**BATCH).logits, model(**BATCH).logits
    if handle is not None:
        handle.remove()
    assert torch.equal(first, again)
    assert torch.equal(other, next)
    assert not torch.equal(first, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_too_a_rewound_pass_has_the_dropout_it_had() -> None:
    model = tiny("bert", dropout=0.5).train().cuda()
    rows = {name: value.cuda() for name, value in BATCH.items()}
    with torch.no_grad():
        rewind = rewinder(model)
        first, other = model(**rows).logits, model(**rows).logits
        rewind()
        assert torch.equal(model(**rows).logits, first)
        assert torch.equal(model(**rows).logits, other)
    assert not torch.equal(first, other)


def test_remembering_the_noise_does_not_move_it() -> None:
    before = torch.get_rng_state()
    rewinder(tiny("bert"))()
    assert torch.equal(torch.get_rng_state(), before)


class Counts(nn.Module):
    """Gives the number of its draw, as a module of its own or as a hook on another."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self.draws: Draws[int] = Draws(progress, signer="counts", where="here")

    def forward(self, *given: Any) -> int:
        return self.draws.next(lambda number: number)


@pytest.mark.parametrize("hooked", [False, True], ids=["a module", "a hook"])
def test_noise_with_a_stream_of_its_own_is_rewound_and_begins_anew_in_each_evaluation(hooked: bool) -> None:
    progress = Progress(9)
    model: nn.Module = Counts(progress)
    if hooked:
        model, owner = nn.Identity(), model
        model.register_forward_hook(owner.forward)
    with torch.no_grad():
        early = rewinder(model)  # before the first draw
        assert [model(0), model(0)] == [0, 1]
        rewind = rewinder(model)
        assert [model(0), model(0)] == [2, 3]
        rewind()
        assert [model(0), model(0)] == [2, 3]
        early()
        assert model(0) == 0
        progress.turn += 1
        late = rewinder(model)  # it has not yet seen this evaluation
        assert [model(0), model(0)] == [0, 1]
        late()
        assert model(0) == 0
        progress.step += 1
        assert model(0) == 0


def test_lent_weights_are_given_back_and_their_gradients_are_untouched() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    weight, storage = model.weight, model.weight.data_ptr()
    loss = model(torch.ones(1, 1)).square().sum()
    with torch.no_grad(), lent(Wrapper(model), {"weight": torch.full((1, 1), 5.0, dtype=torch.float64)}):
        assert model(torch.ones(1, 1)).item() == 5.0
    loss.backward()
    assert model.weight is weight
    assert weight.data_ptr() == storage
    assert weight.item() == 2.0
    assert weight.grad is not None
    assert weight.grad.item() == 4.0  # 2 w, of the weight that the pass was made with


def test_lent_weights_come_back_after_an_error() -> None:
    model = nn.Linear(1, 1, bias=False)
    own = model.weight.detach().clone()
    with pytest.raises(KeyError), lent(model, {"weight": torch.zeros(1, 1)}):
        raise KeyError
    assert torch.equal(model.weight, own)


def test_lent_weights_do_not_stay_in_autocasts_cache() -> None:
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    x = torch.ones(1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).item() == 2.0
        with torch.no_grad(), lent(model, {"weight": torch.full((1, 2), 3.0)}):
            assert model(x).item() == 6.0
        assert model(x).item() == 2.0


def test_weights_of_an_optimizer_are_named_and_copied_wide() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([{"params": [weight], "names": ("w",)}], lr=0.1)
    assert [(name, value is weight) for name, value in named(optimizer)] == [("w", True)]
    assert copied(weight).dtype == torch.float32
    single = torch.ones(2)
    assert copied(single).data_ptr() != single.data_ptr()


def test_a_model_that_is_not_compiled_is_left_alone() -> None:
    with uncompiled(nn.Linear(1, 1)) as found:
        assert found is None
