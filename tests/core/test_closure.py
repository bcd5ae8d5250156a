"""One step's data as a function of the weights."""

from __future__ import annotations

import torch
from torch import nn

from luthier.core.closure import Closure
from tests.tiny import tiny


def squared(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch) - 1).square().mean()


def test_micro_batches_weighted_by_their_share_are_the_big_batch():
    """float64, so that only the order of additions differs: 1e-14."""
    rows = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one, other = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    other.load_state_dict(one.state_dict())
    whole = Closure(one, squared, [rows]).backward()
    parts = Closure(other, squared, [rows[:2], rows[2:6], rows[6:]], shares=[2 / 7, 4 / 7, 1 / 7]).backward()
    assert torch.allclose(whole, parts, rtol=1e-14)
    assert torch.allclose(one.weight.grad, other.weight.grad, rtol=1e-13)


def test_by_hand_two_parts_of_one_and_three_rows():
    # losses of the parts: 4 and mean(1, 1, 4) = 2; weighted 4 * 1/4 + 2 * 3/4 = 2.5
    model = nn.Identity()
    parts = [torch.tensor([3.0]), torch.tensor([2.0, 0.0, 3.0])]
    assert Closure(model, squared, parts, shares=[0.25, 0.75]).loss().item() == 2.5


def test_evaluated_twice_it_sees_the_same_dropout():
    model = tiny("bert", dropout=0.3).train()
    batches = [{"input_ids": torch.arange(3, 19).reshape(2, 8), "labels": torch.tensor([0, 2])}] * 2
    closure = Closure(
        model, lambda live, batch: live(**batch).loss, batches, before=lambda number: torch.manual_seed(number) and None
    )
    with torch.random.fork_rng():
        first, second = closure.loss(), closure.loss()
        assert torch.equal(first, second)
        assert torch.equal(first, closure.backward())
        assert not torch.equal(first, closure.loss(noise=False))


def test_without_noise_every_modules_mode_comes_back():
    model = tiny("bert", dropout=0.3).train()
    model.bert.embeddings.eval()
    modes = [module.training for module in model.modules()]
    batch = {"input_ids": torch.arange(3, 19).reshape(2, 8), "labels": torch.tensor([0, 2])}
    Closure(model, lambda live, rows: live(**rows).loss, [batch]).loss(noise=False)
    assert [module.training for module in model.modules()] == modes


def test_the_loss_alone_leaves_no_gradient():
    model = nn.Linear(3, 2)
    Closure(model, squared, [torch.ones(2, 3)]).loss()
    assert model.weight.grad is None
