"""IsoBN: the scale by hand, statistics that no division of the rows changes, and a plain model at the end."""

from __future__ import annotations

import copy
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import luthier
from luthier.core.anatomy import Anatomy
from luthier.core.claims import Claim, Place, needs, owns, wraps
from luthier.core.context import Context, Progress
from luthier.core.groups import groups_of
from luthier.core.ingredient import Ingredient, ingredient
from luthier.errors import ConflictError, ModelError, RecipeError
from luthier.ingredients.averaging.swa import SWA
from luthier.ingredients.losses.freelb import FreeLB
from luthier.ingredients.losses.r_drop import RDrop
from luthier.ingredients.losses.smart import SMART
from luthier.ingredients.modules import isobn
from luthier.ingredients.modules.isobn import IsoBN, Scaling, isotropic, merged, moments
from luthier.ingredients.optimizers.mezo import MeZO
from luthier.ingredients.optimizers.sam import SAM
from luthier.ingredients.settings.freeze import Freeze
from luthier.ingredients.surgery.mixout import Mixout
from luthier.run import Run, begin
from tests.little import recipe, sentences
from tests.tiny import tiny


@ingredient
class PlainSGD(Ingredient):
    """SGD, which hides no factor of the gradient."""

    def touches(self) -> tuple[Claim, ...]:
        return (owns(Place.OPTIMIZER),)

    def optimizer(self, inner: Optimizer, ctx: Context) -> Optimizer:
        return SGD(groups_of(inner), lr=1.0)


VECTORS = ("bert", "roberta", "distilbert", "electra", "deberta-v2", "albert", "mpnet", "modernbert")


def batch(step: int, rows: int = 8) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {
        "input_ids": torch.randint(3, 64, (rows, 6), generator=draw),
        "labels": torch.randint(0, 3, (rows,), generator=draw),
    }


def parts(of: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    return [{name: value[at : at + size] for name, value in of.items()} for at in range(0, len(of["labels"]), size)]


def train(run: Run, first: int, last: int, size: int = 8) -> None:
    for step in range(first, last):
        run.offer(run.closure(*parts(batch(step), size)))
        run.step()


def look(run: Run, at: dict[str, Tensor]) -> None:
    """A step in which no weight moves."""
    run.offer(run.closure(at))
    run.optimizer.zero_grad()
    run.advance()


def inside(run: Run) -> Scaling:
    found = run.model.get_submodule(f"{run.plan.anatomy.output}.isobn")
    assert isinstance(found, Scaling)
    return found


def drawn(seed: int, rows: int = 12, features: int = 5) -> Tensor:
    """Features of unlike spread that hang together."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=draw, dtype=torch.float64)
    return torch.randn(rows, features, generator=draw, dtype=torch.float64) @ mixing + 3.0


# By hand


def test_two_features_that_are_one_are_scaled_down_and_a_lone_one_up() -> None:
    # Mean squared correlations 2/3, 2/3, 1/3; theta = (0.667667)^-1/2, (0.334333)^-1/2 = 1.223827, 1.729459.
    # k = (3 / (1.497753 + 1.497753 + 2.991027 + 0.001))^1/2 = 0.707843; k theta = 0.866277, 0.866277, 1.224184.
    covariance = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    scale = isotropic(covariance, torch.ones(3, dtype=torch.float64), beta=0.5, eps=1e-3)
    assert scale.tolist() == pytest.approx([0.866277, 0.866277, 1.224184], abs=2e-6)


def test_the_moments_of_two_rows() -> None:
    # (1, 2) and (3, 6) lie (-1, -2) and (1, 2) from their mean (2, 4): squares 1 + 1, products 2 + 2, squares 4 + 4.
    rows, mean, scatter = moments(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    assert (rows.item(), mean.tolist(), scatter.tolist()) == (2.0, [2.0, 4.0], [[2.0, 4.0], [4.0, 8.0]])


def test_the_running_statistics_are_an_average_with_weights_that_sum_to_one() -> None:
    # Variances 1 and 4. With momentum 1/2 the first step counts whole; at the second 1/2 of 1/2 + 1/4, that is 2/3:
    # C = 1 + 2/3 (4 - 1) = 3, and the deviation 1 + 2/3 (2 - 1) = 5/3.
    scaling = Scaling(torch.ones(1, 1, dtype=torch.float64), "head", Progress(1))
    for number, (spread, expected) in enumerate([(1.0, (1.0, 1.0)), (2.0, (3.0, 5 / 3))], start=1):
        scaling.take(scaling, (torch.tensor([[5.0 - spread], [5.0 + spread]], dtype=torch.float64),))
        scaling.update(0.5, 1e-3, 0.5)
        assert (scaling.covariance.item(), scaling.deviation.item()) == pytest.approx(expected, abs=1e-14)
        assert int(scaling.steps) == number


# Identity


def test_before_the_first_step_and_without_beta_nothing_changes_bit_for_bit() -> None:
    before = tiny("bert")(**batch(0)).logits
    run = begin(tiny("bert"), [IsoBN()], steps=1)
    run.model.eval()
    assert torch.equal(run.model(**batch(0)).logits, before)

    ends = []
    for ingredients in ([IsoBN(beta=0.0)], []):
        run = begin(tiny("bert", dropout=0.1), ingredients, learning_rate=1e-2, steps=3)
        torch.manual_seed(0)
        train(run, 0, 3)
        run.finish()
        ends.append(run.model.state_dict())
    assert list(ends[0]) == list(ends[1])
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_features_of_one_spread_that_know_nothing_of_each_other_stay() -> None:
    # All theta are one number t and k = (h / (h t^2 + eps))^1/2, so that k t is 1 but for eps.
    scale = isotropic(torch.eye(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64), beta=0.5, eps=1e-12)
    torch.testing.assert_close(scale, torch.ones(4, dtype=torch.float64), atol=1e-11, rtol=0)


# Invariants


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 1.0), st.floats(1e-6, 1e-2))
def test_the_sum_of_the_variances_stays(seed: int, beta: float, eps: float) -> None:
    rows, _, scatter = moments(drawn(seed))
    covariance = scatter / rows
    scale = isotropic(covariance, covariance.diagonal().sqrt(), beta=beta, eps=eps)
    before, after = covariance.diagonal().sum(), (covariance.diagonal() * scale**2).sum()
    # after / before = A / (A + eps) with A = sum C theta^2, which the scale gives back as after / k^2
    theta = (_correlations(covariance).square().mean(1) * covariance.diagonal().sqrt() + eps) ** -beta
    held = (covariance.diagonal() * theta**2).sum()
    torch.testing.assert_close(after, before * held / (held + eps), rtol=1e-10, atol=0)
    assert after <= before


def _correlations(covariance: Tensor) -> Tensor:
    spread = covariance.diagonal().sqrt()
    return covariance / torch.outer(spread, spread)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(1, 11), max_size=4, unique=True))
def test_the_moments_do_not_know_how_the_rows_came(seed: int, cuts: list[int]) -> None:
    features = drawn(seed)
    pieces = [moments(piece) for piece in torch.tensor_split(features, sorted(cuts))]
    total = pieces[0]
    for piece in pieces[1:]:
        total = merged(total, piece)
    for ours, whole in zip(total, moments(features), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(total[2] / len(features), torch.cov(features.T, correction=0), rtol=1e-10, atol=1e-10)


def test_what_does_not_vary_and_single_rows_leave_finite_numbers() -> None:
    flat = torch.zeros(3, 3, dtype=torch.float64)
    assert isotropic(flat, torch.zeros(3, dtype=torch.float64), beta=0.5, eps=1e-3).tolist() == [1.0, 1.0, 1.0]
    flat[0, 0] = 1.0
    assert torch.isfinite(isotropic(flat, flat.diagonal().sqrt(), beta=0.5, eps=1e-3)).all()
    scaling = Scaling(torch.ones(2, 3), "head", Progress(1))
    for features in (torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, torch.inf]])):
        scaling.take(scaling, (features,))
        scaling.update(0.05, 1e-3, 0.5)
        assert int(scaling.steps) == 0
        assert scaling.scale.tolist() == [1.0, 1.0, 1.0]


def test_half_precision_features_are_measured_in_single_precision_also_under_autocast() -> None:
    scaling = Scaling(torch.ones(2, 5, dtype=torch.bfloat16), "head", Progress(1))
    features = drawn(0).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given_back = scaling.take(scaling, (features,))[0]
    assert given_back.dtype == torch.bfloat16
    scaling.update(1.0, 1e-3, 0.5)
    # The rounding of the features to bf16 is theirs; what is made of them is right to single precision.
    expected = torch.cov(features.double().T, correction=0)
    torch.testing.assert_close(scaling.covariance.double(), expected, rtol=1e-4, atol=1e-5)


# Parity


def test_it_is_the_authors_scale_with_statistics_divided_by_the_weight_they_have() -> None:
    # Their running values begin at zero and have weight 1 - (1 - m)^t after t batches. Their formula, in float64.
    m, eps, beta = 0.05, 1e-3, 0.5
    covariance, deviation = np.zeros((5, 5)), np.zeros(5)
    scaling = Scaling(torch.ones(2, 5, dtype=torch.float64), "head", Progress(1))
    for t in range(1, 8):
        features = drawn(t)
        scaling.take(scaling, (features,))
        scaling.update(m, eps, beta)
        x = features.numpy() - features.numpy().mean(axis=0)
        covariance = covariance + m * (x.T @ x / len(x) - covariance)
        deviation = deviation + m * (np.sqrt((x**2).mean(axis=0)) - deviation)
        c, s = (value / (1 - (1 - m) ** t) for value in (covariance, deviation))
        gamma = np.array([np.mean([np.clip(c[i, j] / (s[i] * s[j]), -1, 1) ** 2 for j in range(5)]) for i in range(5)])
        theta = 1 / (gamma * s + eps) ** beta
        theirs = theta * np.sqrt(np.trace(c) / ((np.diag(c) * theta**2).sum() + eps))
        np.testing.assert_allclose(scaling.scale.numpy(), theirs, rtol=1e-11)


# Conformance


def test_it_keeps_the_contract() -> None:
    from luthier.testing import check_ingredient

    check_ingredient(IsoBN())


def test_it_claims_the_modules_and_training_mode_and_whole_weights() -> None:
    assert IsoBN().touches() == (
        wraps(Place.MODULES),
        needs(Place.NOISE, "head"),
        needs(Place.WHOLE_WEIGHTS),
    )
    with pytest.raises(ConflictError, match="noise of the forward pass"):
        begin(tiny("bert"), [IsoBN(), MeZO()], steps=1)


def test_bad_values_are_refused_together() -> None:
    with pytest.raises(RecipeError) as told:
        IsoBN(momentum=0.0, eps=0.0, beta=1.5)
    assert {fault.where for fault in told.value.faults} == {"isobn.momentum", "isobn.eps", "isobn.beta"}


@pytest.mark.parametrize("family", VECTORS)
def test_what_is_left_is_the_plain_model_with_the_same_logits(family: str) -> None:
    """Double precision: two orders of three factors, 1e-13."""
    model = tiny(family, dropout=0.1).double()
    names, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    run = begin(model, [IsoBN()], learning_rate=1e-2, steps=3)
    torch.manual_seed(0)
    train(run, 0, 3)
    scale = inside(run).scale.clone()
    assert float((scale - 1).abs().max()) > 0.1
    model.eval()
    scaled = model(**batch(9)).logits
    run.finish()
    torch.testing.assert_close(model(**batch(9)).logits, scaled, atol=1e-13, rtol=0)
    assert list(model.state_dict()) == names
    assert [type(module) for module in model.modules()] == kinds
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "qwen2", "t5"])
def test_heads_that_read_every_token_are_refused_when_they_are_planned(family: str) -> None:
    with pytest.raises(RecipeError, match=r"one vector a row.*Drop isobn"):
        begin(tiny(family), [IsoBN()], steps=1)


def test_a_head_that_cannot_be_tried_beforehand_is_refused_at_its_first_pass() -> None:
    run = begin(tiny("gpt2"), [IsoBN()], steps=1)
    with pytest.raises(ModelError, match=r"score.*one vector a row"):
        run.loss(run.forward, batch(0))


def test_a_missing_a_changed_and_a_shared_output_are_refused() -> None:
    with pytest.raises(RecipeError, match="the head.*got none"):
        begin(tiny("bert", head=False), [IsoBN()], steps=1)
    with pytest.raises(RecipeError, match=r"got one that mixout mixes\.  Write isobn before mixout"):
        begin(tiny("bert"), [Mixout(where=("head",)), IsoBN()], steps=1)
    begin(tiny("bert"), [IsoBN(), Mixout(where=("head",))], steps=1)
    model = tiny("bert")
    model.classifier.weight = nn.Parameter(torch.ones(3, 16))
    model.other = nn.Linear(16, 3)
    model.other.weight = model.classifier.weight
    with pytest.raises(RecipeError, match="shares its weight"):
        begin(model, [IsoBN()], steps=1)


# It matters


def test_micro_batches_change_nothing_but_rounding() -> None:
    ends = []
    for size in (8, 4, 3, 1):
        model = tiny("bert").double()
        run = begin(model, [IsoBN()], learning_rate=1e-2, steps=4)
        for step in range(4):
            made = parts(batch(step), size)
            for one in made:
                (run.loss(run.forward, one) * len(one["labels"]) / 8).backward()
            run.step()
        ends.append((inside(run).scale.clone(), model.classifier.weight.detach().clone()))
    for scale, weight in ends[1:]:
        torch.testing.assert_close(scale, ends[0][0], atol=1e-9, rtol=0)
        torch.testing.assert_close(weight, ends[0][1], atol=1e-9, rtol=0)


def test_processes_share_their_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads in the place of two processes: 5 and 7 rows of one step give both the statistics of the 12."""
    meet, slots, mine = threading.Barrier(2), {}, threading.local()

    def summed(value: Tensor) -> Tensor:
        slots[mine.rank] = value
        meet.wait(timeout=10)
        total = slots[0] + slots[1]
        meet.wait(timeout=10)
        return total

    monkeypatch.setattr(isobn, "_summed", summed)
    monkeypatch.setattr(isobn.dist, "is_initialized", lambda: True)
    features, made = drawn(3), [Scaling(torch.ones(2, 5, dtype=torch.float64), "head", Progress(1)) for _ in range(2)]

    def process(rank: int) -> None:
        mine.rank = rank
        made[rank].take(made[rank], (features[:5] if rank == 0 else features[5:],))
        made[rank].update(0.05, 1e-3, 0.5)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = torch.cov(features.T, correction=0)
    for one in made:
        torch.testing.assert_close(one.covariance, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(made[0].scale, made[1].scale)


def test_the_statistics_are_those_before_dropout() -> None:
    model = tiny("bert", dropout=0.5)
    run = begin(model, [Freeze(keep=("head",)), IsoBN(momentum=1.0)], steps=1)
    run.offer(run.closure(batch(0)))
    run.step()
    model.eval()
    with torch.no_grad():
        pooled = model.bert(input_ids=batch(0)["input_ids"]).pooler_output
    torch.testing.assert_close(inside(run).covariance, torch.cov(pooled.T, correction=0), atol=1e-6, rtol=0)


def test_the_gradient_takes_the_scale_for_a_constant_and_scales_the_weights_by_it() -> None:
    grads, scales = [], []
    for ingredients in ([IsoBN()], []):
        model = tiny("bert").double()
        run = begin(model, ingredients, steps=2)
        look(run, batch(0))
        logits = model(input_ids=batch(1)["input_ids"]).logits
        logits.sum().backward()
        grads.append(model.classifier.weight.grad.clone())
        scales += [inside(run).scale] if ingredients else []
    assert not scales[0].requires_grad
    torch.testing.assert_close(grads[0], grads[1] * scales[0], atol=1e-13, rtol=0)  # logits = W diag(s) x


def test_validation_sees_the_scale_and_an_evaluation_made_twice_is_the_same() -> None:
    run = begin(tiny("bert"), [IsoBN()], steps=2)
    plain = tiny("bert")(**batch(5)).logits
    look(run, batch(0))
    ready = run.closure(batch(1))
    assert torch.equal(ready.loss(), ready.loss())
    run.model.eval()
    kept = inside(run).scale.clone()
    seen = run.model(**batch(5)).logits
    assert not torch.allclose(seen, plain, atol=1e-4)
    assert torch.equal(inside(run).scale, kept)


@pytest.mark.parametrize(
    ("others", "size"), [([SAM(rho=0.5)], 8), ([FreeLB()], 8), ([SMART()], 8), ([RDrop()], 8), ([SAM(), SMART()], 3)]
)
def test_each_row_of_a_step_counts_once_however_often_the_step_is_evaluated(others: list[Any], size: int) -> None:
    run = begin(tiny("bert", dropout=0.1), [IsoBN(momentum=1.0), *others], learning_rate=1e-2, steps=2)
    for step in range(2):
        run.offer(run.closure(*parts(batch(step), size)))
        assert inside(run)._seen is not None
        assert inside(run)._seen[0].item() == 8.0
        run.step()


@pytest.mark.parametrize("other", [SAM(rho=0.5), SMART()])
def test_the_statistics_are_those_of_the_pass_that_nothing_perturbs(other: Any) -> None:
    found = []
    for others in ([other], []):
        run = begin(tiny("bert"), [IsoBN(momentum=1.0), *others], steps=1)
        look(run, batch(0))
        found.append(inside(run).covariance.clone())
    assert torch.equal(*found)


def fitted(family: str = "bert") -> nn.Module:
    """A model whose head looks as if it had been trained: its bias is not zero."""
    model = tiny(family).double()
    output = model.get_submodule(str(Anatomy.of(model).output))
    nn.init.constant_(output.bias, 0.5)  # type: ignore[arg-type]
    nn.init.normal_(output.weight, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_head_that_was_fitted_keeps_its_function_whatever_the_scale_does(family: str) -> None:
    """Double precision: W / s times s x, 1e-12."""
    run = begin(fitted(family), [IsoBN(momentum=0.5)], steps=3)
    before = fitted(family)(**batch(9)).logits
    for step in range(3):
        old = inside(run).scale.clone()
        run.train()
        look(run, batch(step))
        assert float((inside(run).scale / old - 1).abs().max()) > 0.05
        run.model.eval()
        torch.testing.assert_close(run.model(**batch(9)).logits, before, atol=1e-12, rtol=0)
    run.finish()
    torch.testing.assert_close(run.model(**batch(9)).logits, before, atol=1e-12, rtol=0)


def test_a_fitted_head_learns_by_gradients_that_the_scale_weighs() -> None:
    # logits = W diag(s) x: the step of SGD on W is s g, and so that of what a plain model would have, W diag(s), s^2 g.
    run = begin(fitted(), [IsoBN(), PlainSGD()], learning_rate=1.0, steps=2)
    look(run, batch(0))
    scale, start = inside(run).scale.clone(), (run.model.classifier.weight * inside(run).scale).detach().clone()
    model = fitted()
    model(**batch(1)).loss.backward()
    run.offer(run.closure(batch(1)))
    run.step()
    found = run.model.classifier.weight * inside(run).scale
    torch.testing.assert_close(found, start - scale**2 * model.classifier.weight.grad, atol=1e-12, rtol=0)


def test_a_fresh_head_is_scaled_as_in_the_paper() -> None:
    # Its bias is zero. W x becomes W diag(s) x with the first scale, and W stays.
    run = begin(tiny("bert").double(), [IsoBN()], steps=2)
    weight = run.model.classifier.weight.detach().clone()
    look(run, batch(0))
    assert torch.equal(run.model.classifier.weight, weight)
    with torch.no_grad():
        run.model.eval()
        pooled = run.model.bert(input_ids=batch(9)["input_ids"]).pooler_output
        expected = (pooled * inside(run).scale) @ weight.T
    torch.testing.assert_close(run.model(**batch(9)).logits, expected, atol=1e-13, rtol=0)


def test_a_head_without_a_bias_counts_as_fitted() -> None:
    model = tiny("bert").double()
    model.classifier.bias = None
    before = model(**batch(9)).logits
    run = begin(model, [IsoBN()], steps=2)
    look(run, batch(0))
    run.model.eval()
    torch.testing.assert_close(run.model(**batch(9)).logits, before, atol=1e-13, rtol=0)


def test_after_a_solved_probe_a_rate_of_nothing_changes_no_answer(tiny_model, tmp_path) -> None:
    told = []
    for name, parts in (("plain", []), ("isobn", ["isobn"])):
        made = recipe(["adamw", *parts], probe=True, lr=1e-9)
        told.append(luthier.fit(made, model=tiny_model, data=sentences(), out=tmp_path / name).metrics["test"])
    assert told[0]["accuracy"] == told[1]["accuracy"]
    assert told[0]["nll"] == pytest.approx(told[1]["nll"], rel=1e-4)


def test_where_mixout_holds_a_fitted_head_the_jump_is_said() -> None:
    run = begin(fitted(), [IsoBN(), Mixout(where=("head",))], steps=2)
    look(run, batch(0))
    assert any("its logits jump" in note for note in run.notes)


def test_an_average_of_the_weights_is_scaled_once() -> None:
    run = begin(tiny("bert").double(), [IsoBN(), SWA(start=0.1)], learning_rate=1e-2, steps=4)
    train(run, 0, 4)
    with run.ended():
        run.model.eval()
        before = run.model(**batch(9)).logits
    run.finish()
    torch.testing.assert_close(run.model(**batch(9)).logits, before, atol=1e-13, rtol=0)


def test_a_stage_of_single_rows_changes_nothing_and_says_so() -> None:
    run = begin(tiny("bert"), [IsoBN()], steps=2)
    start = copy.deepcopy(tiny("bert").state_dict())
    for step in range(2):
        look(run, batch(step, rows=1))
    run.finish()
    assert all(torch.equal(value, start[name]) for name, value in run.model.state_dict().items())
    assert any("isobn saw no step with two rows" in note for note in run.notes)


def test_a_copy_of_the_model_made_meanwhile_scales_by_itself() -> None:
    run = begin(tiny("bert"), [IsoBN()], learning_rate=1e-2, steps=2)
    train(run, 0, 1)
    other: Any = copy.deepcopy(run.model)
    kept = inside(run).covariance.clone()
    other.train()
    other(**batch(1))
    other.classifier.isobn.update(0.05, 1e-3, 0.5)
    assert torch.equal(inside(run).covariance, kept)
    assert not torch.equal(other.classifier.isobn.covariance, kept)
