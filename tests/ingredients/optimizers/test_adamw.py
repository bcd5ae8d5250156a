"""adamw: Adam with decoupled weight decay."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from luthier.core.context import Context, Progress, Shelf
from luthier.ingredients.optimizers.adamw import AdamW
from luthier.run import begin
from luthier.testing import check_ingredient
from tests.tiny import tiny


def optimizer(ingredient: AdamW, weight: nn.Parameter, *, decay: float = 0.0, lr: float = 0.1) -> torch.optim.Optimizer:
    plain = torch.optim.SGD(
        [{"params": [weight], "lr": lr, "initial_lr": lr, "weight_decay": decay, "names": ("w",)}], lr=lr
    )
    return ingredient.optimizer(plain, Context(None, Progress(1), 0, "x", (), Shelf(), []))  # type: ignore[arg-type]


def test_by_hand_the_first_step_is_the_rate_in_the_direction_of_the_sign():
    # m / (1 - b1) = g and v / (1 - b2) = g^2 at t = 1, so the step is lr * g / (|g| + eps): 0.1 * 2 / (2 + 1) with eps = 1
    weight = nn.Parameter(torch.tensor([5.0], dtype=torch.float64))
    made = optimizer(AdamW(eps=1.0), weight)
    weight.grad = torch.tensor([2.0], dtype=torch.float64)
    made.step()
    assert weight.item() == pytest.approx(5 - 0.1 * 2 / 3, abs=1e-15)


def test_by_hand_decay_is_decoupled():
    # without a gradient: w <- w (1 - lr * decay) = 5 * (1 - 0.1 * 0.5) = 4.75
    weight = nn.Parameter(torch.tensor([5.0], dtype=torch.float64))
    made = optimizer(AdamW(), weight, decay=0.5)
    weight.grad = torch.zeros(1, dtype=torch.float64)
    made.step()
    assert weight.item() == pytest.approx(4.75, abs=1e-15)


def test_it_is_what_a_stage_has_when_nothing_else_is_said():
    batch = {"input_ids": torch.arange(3, 19).reshape(2, 8), "labels": torch.tensor([0, 2])}
    one, other = tiny("bert"), tiny("bert")
    for model, ingredients in ((one, [AdamW()]), (other, [])):
        run = begin(model, ingredients, learning_rate=1e-2, steps=3)
        for _ in range(3):
            run.loss(model, batch).backward()
            run.step()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@given(st.lists(st.floats(-10, 10).filter(lambda value: abs(value) > 1e-3), min_size=1, max_size=6))
def test_without_decay_no_step_is_longer_than_the_rate_at_first(gradient):
    weight = nn.Parameter(torch.zeros(len(gradient), dtype=torch.float64))
    made = optimizer(AdamW(), weight)
    weight.grad = torch.tensor(gradient, dtype=torch.float64)
    made.step()
    assert weight.detach().abs().max() <= 0.1 + 1e-12


def test_parity_with_torch_written_out():
    """Twenty steps against the update's own equations in float64: 1e-12."""
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(7, generator=draw, dtype=torch.float64)
    weight, b1, b2, eps, lr, decay = nn.Parameter(start.clone()), 0.9, 0.98, 1e-6, 0.01, 0.1
    made = optimizer(AdamW(betas=(b1, b2), eps=eps), weight, decay=decay, lr=lr)
    theta, m, v = start.clone(), torch.zeros(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    for t in range(1, 21):
        g = torch.randn(7, generator=draw, dtype=torch.float64)
        weight.grad = g.clone()
        made.step()
        theta = theta * (1 - lr * decay)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        theta = theta - lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
    assert torch.allclose(weight.detach(), theta, rtol=0, atol=1e-12)


def test_biases_and_norms_do_not_decay_unless_asked():
    run = begin(tiny("bert"), [AdamW(weight_decay=0.3)], steps=1)
    decays = {row.part.kind: row.weight_decay for row in run.plan.table.rows}
    assert decays == {"weight": 0.3, "bias": 0.0, "norm": 0.0}
    run = begin(tiny("bert"), [AdamW(weight_decay=0.3, exclude=())], steps=1)
    assert {row.weight_decay for row in run.plan.table.rows} == {0.3}


def test_it_is_fused():
    made = optimizer(AdamW(), nn.Parameter(torch.zeros(1)))
    assert made.defaults["fused"]


def test_its_memory_is_two_numbers_a_trainable_weight():
    run = begin(tiny("bert"), [AdamW()], steps=1)
    weights = sum(weight.numel() * 4 for weight in run.model.parameters())
    assert AdamW().state_bytes(run.plan.table) == 2 * weights


def test_it_keeps_its_promises():
    check_ingredient(AdamW(weight_decay=0.1))


def test_it_matters():
    assert type(begin(tiny("bert"), [AdamW()], steps=1).optimizer) is torch.optim.AdamW
