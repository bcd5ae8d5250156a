"""mezo: training with forward passes only."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from luthier.core.closure import Closure
from luthier.core.ingredient import Ingredient
from luthier.errors import ConflictError
from luthier.ingredients.gradients.clip import Clip
from luthier.ingredients.optimizers.mezo import ForwardOnly, MeZO
from luthier.ingredients.settings.freeze import Freeze
from luthier.ingredients.settings.llrd import LLRD
from luthier.ingredients.surgery.mixout import Mixout
from luthier.run import begin
from luthier.testing import check_ingredient
from tests.tiny import tiny

BATCH = {"input_ids": torch.arange(3, 35).reshape(4, 8), "labels": torch.tensor([0, 1, 2, 0])}


class Point(nn.Module):
    """A point in the plane of a quadratic bowl."""

    def __init__(self, *at: float):
        super().__init__()
        self.at = nn.Parameter(torch.tensor(at, dtype=torch.float64))


def bowl(model: nn.Module, batch: Tensor) -> Tensor:
    return 0.5 * (batch * model.at**2).sum()


def stepper(model: nn.Module, *, lr: float = 0.1, eps: float = 1e-3, seed: int = 0, decay: float = 0.0) -> ForwardOnly:
    groups = [{"params": list(model.parameters()), "lr": lr, "weight_decay": decay}]
    return ForwardOnly(groups, eps=eps, seed=lambda: seed)


def direction(seed: int, size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_by_hand_one_step_on_a_bowl():
    """L = (a x^2 + b y^2) / 2 is quadratic, so the two-sided slope is exact: g = (a x, b y) . z, and theta - lr g z."""
    model, curve = Point(1.0, -2.0), torch.tensor([3.0, 1.0], dtype=torch.float64)
    made = stepper(model, seed=7)
    made.offer(Closure(model, bowl, [curve]))
    made.step()
    z = direction(7, 2)
    slope = 3.0 * 1.0 * z[0] + 1.0 * -2.0 * z[1]
    expected = torch.tensor([1.0, -2.0], dtype=torch.float64) - 0.1 * slope * z
    assert torch.allclose(model.at.detach(), expected, atol=1e-9)


def test_by_hand_decay_shrinks_what_it_was():
    model, curve = Point(1.0, -2.0), torch.zeros(2, dtype=torch.float64)
    made = stepper(model, decay=0.5)
    made.offer(Closure(model, bowl, [curve]))
    made.step()
    assert model.at.tolist() == pytest.approx([0.95, -1.9], abs=1e-12)


def test_at_rate_zero_the_weights_come_back():
    """float64: three additions of the same number leave at most a few units in the last place."""
    model = Point(1.0, -2.0)
    made = stepper(model, lr=0.0)
    for _ in range(20):
        made.offer(Closure(model, bowl, [torch.ones(2, dtype=torch.float64)]))
        made.step()
    assert torch.allclose(model.at.detach(), torch.tensor([1.0, -2.0], dtype=torch.float64), rtol=0, atol=1e-14)


def test_a_step_that_was_not_offered_moves_nothing():
    model = Point(1.0, -2.0)
    stepper(model).step()
    assert model.at.tolist() == [1.0, -2.0]


def test_the_mean_of_slope_times_direction_is_the_gradient():
    """E[(grad . z) z] = grad. Var of each coordinate is |grad|^2 + grad_i^2; 4 standard errors over 4000 draws."""
    model = nn.Module()
    model.at = nn.Parameter(torch.linspace(-1, 1, 10, dtype=torch.float64))
    gradient = model.at.detach().clone()
    total, draws = torch.zeros(10, dtype=torch.float64), 4000
    for seed in range(draws):
        made = stepper(model, lr=0.0, seed=seed)
        made.offer(Closure(model, bowl, [torch.ones(10, dtype=torch.float64)]))
        total += made._offered[1] * direction(seed, 10)
        made.step()
    error = (gradient.square().sum() + gradient.square()).sqrt() / draws**0.5
    assert ((total / draws - gradient).abs() < 4 * error).all()


def slope_error(kind: torch.dtype, eps: float, *others: Ingredient) -> tuple[float, float]:
    """The difference of the slope from autograd's directional derivative, and the gradient's norm."""
    model = tiny("bert").to(kind)
    run = begin(model, [*others, MeZO(eps=eps)], steps=1)
    start = [weight.detach().clone() for weight in model.parameters()]
    seed = run.optimizer._seed()
    run.offer(run.closure(BATCH))
    slope = run.optimizer._offered[1]
    run.step()
    with torch.no_grad():
        for weight, old in zip(model.parameters(), start, strict=True):
            weight.copy_(old)
    model(**BATCH).loss.backward()
    learnt = [(weight, z) for weight, z, _ in run.optimizer._directions(seed) if weight.grad is not None]
    derivative = sum(float((weight.grad.double() * z.double()).sum()) for weight, z in learnt)
    return slope - derivative, sum(float(weight.grad.double().square().sum()) for weight, _ in learnt) ** 0.5


def test_the_slope_is_autograds_directional_derivative():
    """Relative to the gradient's norm, which over z is the slope's standard deviation.

    float64, all weights: the error is of order eps^2 = 1e-10 times a third derivative along z, whose length is 100.
    float32, the head alone, whose loss bends little: two losses near 1 are rounded by 1e-7 / eps = 1e-5, the norm is 0.3.
    """
    error, norm = slope_error(torch.float64, 1e-5)
    assert abs(error) < 1e-6 * norm
    error, norm = slope_error(torch.float32, 1e-2, Freeze(keep=("head",)))
    assert abs(error) < 1e-3 * norm


def test_the_slopes_error_is_of_the_second_order():
    """A two-sided difference: half the distance, a quarter of the error."""
    ratio = slope_error(torch.float64, 2e-4)[0] / slope_error(torch.float64, 1e-4)[0]
    assert ratio == pytest.approx(4.0, rel=0.02)


def test_offered_again_before_a_step_it_starts_from_the_same_weights():
    """float64: what is left of the moves to and fro is a few units in the last place."""
    one, other, curve = Point(1.0, -2.0), Point(1.0, -2.0), torch.ones(2, dtype=torch.float64)
    for model, times in ((one, 1), (other, 3)):
        made = stepper(model)
        for _ in range(times):
            made.offer(Closure(model, bowl, [curve]))
        made.step()
    assert torch.allclose(one.at, other.at, rtol=0, atol=1e-12)


def test_replaying_seeds_and_slopes_gives_the_final_weights():
    """float64; each replayed step is one multiplication and one addition: 1e-12."""
    model = tiny("bert").double()
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    run, log = begin(model, [MeZO(eps=1e-4)], learning_rate=1e-2, steps=5), []
    for _ in range(5):
        seed = run.optimizer._seed()
        run.offer(run.closure(BATCH))
        log.append((seed, run.optimizer._offered[1]))
        run.step()
    order = [name for group in run.optimizer.param_groups for name in group["names"]]
    for seed, slope in log:
        draw = torch.Generator().manual_seed(seed)
        for name in order:
            start[name] -= 1e-2 * slope * torch.randn(start[name].shape, generator=draw, dtype=torch.float64)
    for name, weight in model.named_parameters():
        assert torch.allclose(weight.detach(), start[name], rtol=0, atol=1e-12)


def test_it_needs_no_gradient_and_no_copy_of_the_weights():
    model = tiny("bert")
    places = [weight.data_ptr() for weight in model.parameters()]
    run = begin(model, [MeZO()], steps=1)
    run.offer(run.closure(BATCH))
    run.step()
    assert all(weight.grad is None for weight in model.parameters())
    assert [weight.data_ptr() for weight in model.parameters()] == places
    assert run.optimizer.state_dict()["state"] == {}


def test_dropout_is_off_for_both_passes_and_modes_come_back():
    model = tiny("bert", dropout=0.5)
    run = begin(model, [MeZO(eps=1e-6)], steps=1)
    losses = [float(run.closure(BATCH).loss(noise=False)) for _ in range(3)]
    assert len(set(losses)) == 1
    run.offer(run.closure(BATCH))
    assert abs(run.optimizer._offered[1]) < 1e4  # with dropout the two losses would differ by chance / 2e-6
    assert model.training


def test_a_loss_that_is_not_a_number_leaves_the_weights_where_they_were():
    model = Point(1.0, -2.0)
    made = stepper(model)
    told = made.offer(
        Closure(model, lambda live, batch: bowl(live, batch) * float("nan"), [torch.ones(2, dtype=torch.float64)])
    )
    assert torch.isnan(told)
    made.step()
    assert torch.allclose(model.at.detach(), torch.tensor([1.0, -2.0], dtype=torch.float64), rtol=0, atol=1e-15)


def test_micro_batches_are_averaged_before_the_slope():
    curves = [torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([5.0, -1.0], dtype=torch.float64)]
    one, other = Point(1.0, -2.0), Point(1.0, -2.0)
    for model, batches in ((one, curves), (other, [(curves[0] + curves[1]) / 2])):
        made = stepper(model)
        made.offer(Closure(model, bowl, batches))
        made.step()
    assert torch.allclose(one.at, other.at, atol=1e-10)


def test_each_group_has_its_own_rate_and_frozen_weights_stay():
    model = tiny("bert")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    run = begin(model, [Freeze(keep=("head", "top:1")), LLRD(0.5), MeZO()], learning_rate=1e-2, steps=1)
    run.offer(run.closure(BATCH))
    run.step()
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved
    assert all(name.startswith(("classifier", "bert.encoder.layer.2.")) for name in moved)


def test_it_cannot_share_a_stage_with_what_edits_gradients():
    with pytest.raises(ConflictError, match="clip edits the gradient, which mezo does away with"):
        begin(tiny("bert"), [Clip(), MeZO()], steps=1)


def test_it_cannot_share_a_stage_with_what_needs_noise():
    with pytest.raises(ConflictError, match="mezo does away with the noise of the forward pass, which mixout needs"):
        begin(tiny("bert"), [MeZO(), Mixout()], steps=1)


def test_it_keeps_its_promises():
    check_ingredient(MeZO(weight_decay=0.1))


def test_it_matters():
    model = Point(1.0, -2.0)
    start = float(bowl(model, torch.ones(2, dtype=torch.float64)).detach())
    for seed in range(200):
        made = stepper(model, lr=0.05, seed=seed)
        made.offer(Closure(model, bowl, [torch.ones(2, dtype=torch.float64)]))
        made.step()
    # each step shrinks the bowl's value on average; after 200 it is a millionth of what it was
    assert float(bowl(model, torch.ones(2, dtype=torch.float64)).detach()) < 1e-6 * start
