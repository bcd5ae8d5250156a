"""clip: the global norm of the gradient is kept below a bound."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from luthier.core.context import Context, Progress, Shelf
from luthier.ingredients.gradients.clip import Clip
from luthier.run import begin
from luthier.testing import check_ingredient
from tests.tiny import tiny


def clipped(gradients: list[list[float]], max_norm: float) -> list[torch.Tensor]:
    """What the optimizer sees of ``gradients``."""
    weights = [nn.Parameter(torch.zeros(len(one), dtype=torch.float64)) for one in gradients]
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:]}], lr=1.0)
    nothing = Context(None, Progress(1), 0, "x", (), Shelf(), [])  # type: ignore[arg-type]
    Clip(max_norm).optimizer(optimizer, nothing)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
    optimizer.step()
    return [-weight.detach() for weight in weights]  # SGD at rate 1 moves by minus the gradient


def test_by_hand_three_and_four_in_two_groups_have_norm_five():
    # factor 1 / (5 + 1e-6)
    (one, two) = clipped([[3.0], [4.0]], 1.0)
    assert one.item() == pytest.approx(3 / (5 + 1e-6), abs=1e-12)
    assert two.item() == pytest.approx(4 / (5 + 1e-6), abs=1e-12)


def test_a_bound_that_is_not_reached_changes_nothing():
    (one, two) = clipped([[3.0, -0.25], [4.0]], 1e9)
    assert one.tolist() == [3.0, -0.25]
    assert two.tolist() == [4.0]


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=4), min_size=2, max_size=4), st.floats(1e-3, 1e3))
def test_the_norm_is_bounded_and_the_direction_kept(gradients, max_norm):
    after = torch.cat(clipped(gradients, max_norm))
    before = torch.tensor([value for one in gradients for value in one], dtype=torch.float64)
    assert after.norm() <= max_norm * (1 + 1e-9)
    if before.norm() > 0:
        scale = min(1.0, max_norm / (before.norm().item() + 1e-6))
        assert torch.allclose(after, before * scale, rtol=1e-9, atol=1e-12)


def test_parity_with_torch():
    batch = {"input_ids": torch.arange(3, 19).reshape(2, 8), "labels": torch.tensor([0, 2])}
    one, other = tiny("bert").double(), tiny("bert").double()
    run = begin(one, [Clip(0.05)], learning_rate=1e-2, steps=1)
    run.loss(one, batch).backward()
    run.step()
    by_hand = begin(other, [], learning_rate=1e-2, steps=1)
    by_hand.loss(other, batch).backward()
    norm = nn.utils.clip_grad_norm_(other.parameters(), 0.05)
    assert norm > 0.05
    by_hand.step()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_frozen_weights_without_a_gradient_are_no_fault():
    from luthier.ingredients.settings.freeze import Freeze

    model = tiny("bert")
    run = begin(model, [Freeze(), Clip(1e-3)], learning_rate=1.0, steps=1)
    run.loss(model, {"input_ids": torch.arange(3, 19).reshape(2, 8), "labels": torch.tensor([0, 2])}).backward()
    run.step()
    assert math.isfinite(float(model.classifier.weight.detach().sum()))


def test_it_keeps_its_promises():
    check_ingredient(Clip(0.1))


def test_it_matters():
    assert clipped([[3.0], [4.0]], 1.0)[0].item() != 3.0
