"""Label smoothing: torch's own loss by another way, and refused where there are no classes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from luthier.core.anatomy import Anatomy
from luthier.core.claims import Place, wraps
from luthier.core.closure import LossFn
from luthier.core.context import Context, Progress, Shelf
from luthier.errors import ModelError, RecipeError
from luthier.ingredients.losses.label_smoothing import LabelSmoothing, apart, moved, uniform
from luthier.run import begin, own_loss
from tests.tiny import config, tiny

BATCH = {"input_ids": torch.arange(3, 35).reshape(4, 8), "labels": torch.tensor([0, 1, 2, 0])}


class Says(nn.Module):
    """A model whose logits are what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(1, 1)])

    def forward(self, logits: Tensor) -> Tensor:
        return logits


def entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["logits"]).flatten(0, -2), batch["labels"].flatten())


def smoothed(inner: LossFn, **fields: float) -> LossFn:
    made = LabelSmoothing(**fields)
    anatomy: Anatomy = Anatomy.of(tiny("bert"))
    return made.loss(inner, Context(anatomy, Progress(1), 0, "train/label_smoothing", made.touches(), Shelf(), []))


# By hand


def test_two_classes_by_hand() -> None:
    # p = (1/4, 3/4). Against class 1: ln 4/3 = 0.287682. Against both alike: (ln 4 + ln 4/3) / 2 = 0.836988.
    # With eps 0.1: 0.9 x 0.287682 + 0.1 x 0.836988 = 0.342613.
    logits = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64)
    assert uniform(logits).item() == pytest.approx(0.836988, abs=1e-6)
    loss = smoothed(entropy, eps=0.1)(Says(), {"logits": logits, "labels": torch.tensor([1])})
    assert loss.item() == pytest.approx(0.342613, abs=1e-6)


def test_the_best_logits_are_as_far_apart_as_eps_says() -> None:
    # The target of class 0 of 2 is 1 - eps / 2 = 0.95; there, at a difference of ln 19 = 2.944439, the gradient is 0.
    logits = torch.tensor([[math.log(0.95), math.log(0.05)]], dtype=torch.float64, requires_grad=True)
    smoothed(entropy, eps=0.1)(Says(), {"logits": logits, "labels": torch.tensor([0])}).backward()
    assert logits.grad is not None
    assert logits.grad.abs().max().item() < 1e-15


# Identity


def test_without_a_share_the_loss_is_the_inner_loss_itself() -> None:
    assert smoothed(entropy, eps=0.0) is entropy


# Invariants

LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=9)


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.floats(-100, 100, width=32))
def test_the_even_term_is_least_at_equal_logits_and_knows_only_differences(values: list[float], shift: float) -> None:
    logits = torch.tensor([values], dtype=torch.float64)
    assert uniform(logits).item() >= math.log(len(values)) - 1e-12
    assert uniform(torch.zeros_like(logits)).item() == pytest.approx(math.log(len(values)), abs=1e-14)
    torch.testing.assert_close(uniform(logits + shift), uniform(logits), atol=1e-11, rtol=0)


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.floats(0.01, 0.99))
def test_the_gradient_is_what_is_said_less_the_smoothed_target(values: list[float], eps: float) -> None:
    logits = torch.tensor([values], dtype=torch.float64, requires_grad=True)
    smoothed(entropy, eps=eps)(Says(), {"logits": logits, "labels": torch.tensor([0])}).backward()
    target = torch.full_like(logits, eps / len(values))
    target[0, 0] += 1.0 - eps
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - target, atol=1e-14, rtol=0)


def test_half_precision_logits_are_measured_in_single_precision() -> None:
    logits = torch.tensor([[1.0, 2.5, -3.0]], dtype=torch.bfloat16)  # exact in both
    assert uniform(logits).dtype == torch.float32
    assert torch.equal(uniform(logits), uniform(logits.float()))


# Parity


@pytest.mark.parametrize("eps", [0.05, 0.1, 0.7])
def test_over_cross_entropy_it_is_torchs_own(eps: float) -> None:
    # Double precision, two orders of the same additions: 1e-14.
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(16, 5, generator=draw, dtype=torch.float64) * 4
    labels = torch.randint(0, 5, (16,), generator=draw)
    loss = smoothed(entropy, eps=eps)(Says(), {"logits": logits, "labels": labels})
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, label_smoothing=eps), atol=1e-14, rtol=0)


def test_tokens_that_do_not_count_are_left_out_as_torch_does() -> None:
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 4, 5, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, 5, (3, 4), generator=draw)
    labels[:, 2:] = -100
    loss = smoothed(entropy, eps=0.2)(Says(), {"logits": logits, "labels": labels})
    theirs = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.2)
    torch.testing.assert_close(loss, theirs, atol=1e-14, rtol=0)


def test_over_the_loss_of_a_real_model_it_is_torchs_own() -> None:
    model = tiny("bert").double()
    run = begin(model, [LabelSmoothing(eps=0.3)], steps=1)
    logits = model(input_ids=BATCH["input_ids"]).logits
    theirs = F.cross_entropy(logits, BATCH["labels"], label_smoothing=0.3)
    model.eval()
    torch.testing.assert_close(run.loss(run.forward, BATCH), theirs, atol=1e-14, rtol=0)


def spoken(name: str) -> nn.Module:
    made = {
        "llama": lambda: T.LlamaForCausalLM(config("llama")),
        "gpt2": lambda: T.GPT2LMHeadModel(config("gpt2")),
        "masked": lambda: T.BertForMaskedLM(config("bert")),
        "tokens": lambda: T.BertForTokenClassification(config("bert", labels=64)),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return made[name]()


WORDS = torch.randint(3, 64, (4, 8), generator=torch.Generator().manual_seed(0))
SPOKEN = {"input_ids": WORDS, "labels": torch.where(torch.arange(8) < 5, -100, WORDS)}  # what was asked does not count


def theirs(model: nn.Module, eps: float, *, ahead: bool) -> Tensor:
    with torch.no_grad():
        logits, labels = model(input_ids=WORDS).logits, SPOKEN["labels"]
    logits, labels = (logits[:, :-1], labels[:, 1:]) if ahead else (logits, labels)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=eps)


@pytest.mark.parametrize(("name", "ahead"), [("llama", True), ("gpt2", True), ("masked", False), ("tokens", False)])
def test_a_token_is_smoothed_against_the_label_that_the_model_compares_it_with(name: str, ahead: bool) -> None:
    # Single precision, two orders of the same additions: 1e-6.
    model = spoken(name)
    run = begin(model, [LabelSmoothing(eps=0.3)], steps=2)
    model.eval()
    for _ in range(2):  # what the first loss told is kept
        torch.testing.assert_close(run.loss(model, SPOKEN), theirs(model, 0.3, ahead=ahead), atol=0, rtol=1e-6)
    assert abs(theirs(model, 0.3, ahead=ahead) - theirs(model, 0.3, ahead=not ahead)) > 1e-5


def test_a_causal_language_model_in_the_trainer_has_torchs_own_loss(tmp_path: Path) -> None:
    from luthier.hosts import hf

    model = spoken("llama")
    run = begin(model, [LabelSmoothing(eps=0.3)], steps=1)
    args = T.TrainingArguments(str(tmp_path), max_steps=1, max_grad_norm=0, report_to=[], use_cpu=True)
    trainer = hf.parts(run, args).Trainer(model, args)
    expected = theirs(model.eval(), 0.3, ahead=True)
    torch.testing.assert_close(trainer.compute_loss(model.train(), SPOKEN), expected, atol=0, rtol=1e-6)


def test_a_loss_that_is_neither_is_refused_and_one_that_may_be_both_is_asked_again() -> None:
    def odd(model: nn.Module, batch: Any) -> Tensor:
        return entropy(model, batch) + 1.0

    draw = torch.Generator().manual_seed(1)
    even, labels = torch.zeros(3, 4, 5), torch.randint(0, 5, (3, 4), generator=draw)
    logits = torch.randn(3, 4, 5, generator=draw)
    with pytest.raises(ModelError, match="must be the mean cross-entropy over tokens"):
        smoothed(odd)(Says(), {"logits": logits, "labels": labels})
    loss = smoothed(entropy, eps=0.5)
    assert loss(Says(), {"logits": even, "labels": labels}).item() == pytest.approx(math.log(5), abs=1e-6)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.5)
    torch.testing.assert_close(loss(Says(), {"logits": logits, "labels": labels}), expected)


def test_labels_are_moved_by_one_and_the_last_token_has_none() -> None:
    labels = torch.tensor([[1, 2, 0], [0, 0, 1]])
    assert moved(labels).tolist() == [[2, 0, -100], [0, 1, -100]]
    # p = 1/2 each at the first token and (1/4, 3/4) at the second: against (0, 1) as they are ln 2 and ln 4/3, whose mean is
    # 0.490415; moved, the first against 1 is ln 2 = 0.693147. The loss ln 2 is 0.202733 from the one and at the other.
    logits = torch.tensor([[[0.0, 0.0], [0.0, math.log(3.0)]]])
    here, ahead = apart(logits, torch.tensor([[0, 1]]), torch.tensor(math.log(2.0)))
    assert (here, ahead) == (pytest.approx(0.202733, abs=1e-6), pytest.approx(0.0, abs=1e-6))


# Conformance


def test_it_keeps_the_contract() -> None:
    from luthier.testing import check_ingredient

    check_ingredient(LabelSmoothing())


def test_it_claims_the_loss() -> None:
    assert LabelSmoothing().touches() == (wraps(Place.LOSS),)


@pytest.mark.parametrize("eps", [-0.1, 1.0, math.nan])
def test_a_share_outside_zero_and_one_is_refused(eps: float) -> None:
    with pytest.raises(RecipeError, match=r"label_smoothing\.eps"):
        LabelSmoothing(eps=eps)


def test_a_head_with_one_output_is_refused_when_it_is_planned() -> None:
    with pytest.raises(RecipeError, match="Drop label_smoothing") as told:
        begin(tiny("bert", labels=1), [LabelSmoothing()], steps=1)
    assert told.value.faults[0].where == "stages[0] 'train' classifier"
    begin(tiny("bert", labels=1), [LabelSmoothing(eps=0.0)], steps=1)  # which changes nothing, and so may stand


def test_a_head_that_no_plan_can_see_is_refused_at_its_first_loss() -> None:
    def squared(model: nn.Module, batch: Any) -> Tensor:
        return model(batch["logits"]).square().mean()

    for logits in (torch.ones(4, 1), torch.ones(4)):
        with pytest.raises(ModelError, match="Drop label_smoothing"):
            smoothed(squared)(Says(), {"logits": logits})
    with pytest.raises(ModelError, match="a loss without a forward pass"):
        smoothed(lambda model, batch: torch.ones(()))(Says(), {})


# It matters


def test_the_gradient_of_a_real_model_changes() -> None:
    grads = []
    for ingredients in ([LabelSmoothing(eps=0.3)], []):
        model = tiny("bert")
        run = begin(model, ingredients, steps=1)
        run.loss(run.forward, BATCH).backward()
        grads.append(model.classifier.weight.grad.clone())
    assert float((grads[0] - grads[1]).abs().max()) > 1e-3


def test_a_penalty_that_comes_after_it_keeps_its_weight() -> None:
    def doubled(model: nn.Module, batch: Any) -> Tensor:
        return own_loss(model, batch) + 1.0

    model = tiny("bert")
    inside, alone = smoothed(doubled, eps=0.25)(model, BATCH), smoothed(own_loss, eps=0.25)(model, BATCH)
    torch.testing.assert_close(inside, alone + 0.75)  # written before it, the penalty is weighted by 1 - eps
