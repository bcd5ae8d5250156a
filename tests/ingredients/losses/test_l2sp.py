"""L2-SP: the gradient and the fixed point by hand, who is pulled where, and wrapped, sharded and resumed models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from luthier.core.anatomy import Anatomy
from luthier.core.claims import Claim, Place, needs, owns, wraps
from luthier.core.closure import LossFn
from luthier.core.context import Context, Progress, Shelf
from luthier.core.families import Family
from luthier.core.groups import groups_of
from luthier.core.ingredient import Ingredient, ingredient
from luthier.core.wrappers import plain
from luthier.errors import ModelError, RecipeError
from luthier.ingredients.losses.l2sp import L2SP, distance
from luthier.ingredients.settings.freeze import Freeze
from luthier.run import Run, begin
from tests.processes import mesh
from tests.tiny import tiny

TOY = Family(blocks="blocks", head=("head",))


class Toy(nn.Module):
    """One pretrained weight w and one head weight v."""

    def __init__(self, w: float, v: float, *, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(1, 1, bias=False, dtype=dtype)])
        self.head = nn.Linear(1, 1, bias=False, dtype=dtype)
        nn.init.constant_(self.w, w)
        nn.init.constant_(self.head.weight, v)

    @property
    def w(self) -> nn.Parameter:
        return self.blocks[0].weight  # type: ignore[return-value]


def bowl(model: nn.Module, batch: Any) -> Tensor:
    """Half the squared distance of both weights to 3."""
    return sum(((weight - 3) ** 2).sum() / 2 for weight in model.parameters())  # type: ignore[return-value]


def nothing(model: nn.Module, batch: Any) -> Tensor:
    return torch.zeros((), dtype=torch.float64)


@ingredient
class PlainSGD(Ingredient):
    """SGD, which hides no factor of the gradient."""

    def touches(self) -> tuple[Claim, ...]:
        return (owns(Place.OPTIMIZER),)

    def optimizer(self, inner: Optimizer, ctx: Context) -> Optimizer:
        return SGD(groups_of(inner), lr=1.0)


def penalty(model: nn.Module, pull: L2SP, start: dict[str, Tensor], family: Family | None = TOY) -> LossFn:
    """The penalty alone, for a model whose start weights are ``start`` by canonical name."""
    ctx = Context(Anatomy.of(model, family), Progress(1), 0, "train/l2sp", pull.touches(), Shelf(), [], start)
    return pull.loss(nothing, ctx)


def started(model: nn.Module, by: float = 0.0) -> dict[str, Tensor]:
    return {name: value.detach().clone() + by for name, value in model.named_parameters()}


def batch(step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {
        "input_ids": torch.randint(3, 64, (4, 6), generator=draw),
        "labels": torch.randint(0, 3, (4,), generator=draw),
    }


def train(run: Run, first: int, last: int) -> None:
    for step in range(first, last):
        run.loss(run.forward, batch(step)).backward()
        run.step()


# By hand


def test_the_penalty_and_its_gradient_are_those_of_the_equation() -> None:
    # w = 5 from w0 = 2 with alpha 0.5: 0.5/2 x 9 = 2.25, gradient 0.5 x 3 = 1.5. v = 4 with beta 0.25: 0.25/2 x 16 = 2,
    # gradient 0.25 x 4 = 1; where the head started does not count.
    model = Toy(5.0, 4.0)
    pull = penalty(model, L2SP(strength=0.5, head_strength=0.25), started(model, -3.0))
    loss = pull(model, None)
    assert loss.item() == 4.25
    loss.backward()
    assert model.w.grad is not None
    assert model.head.weight.grad is not None
    assert (model.w.grad.item(), model.head.weight.grad.item()) == (1.5, 1.0)


def test_training_ends_where_the_pulls_balance() -> None:
    # (w - 3) + 1 (w - 1) = 0 at w = 2, half way from the start 1 to the bottom 3. (v - 3) + 0.5 v = 0 at v = 2.
    # Each step of SGD at rate 0.5 leaves 0 and 1/4 of the distance: after 40 steps less than 1e-20.
    model = Toy(1.0, 0.0)
    pulls = [L2SP(strength=1.0, head_strength=0.5), PlainSGD()]
    run = begin(model, pulls, learning_rate=0.5, steps=40, loss=bowl, family=TOY)
    for _ in range(40):
        run.loss(run.forward, None).backward()
        run.step()
    assert model.w.item() == pytest.approx(2.0, abs=1e-14)
    assert model.head.weight.item() == pytest.approx(2.0, abs=1e-14)


# Identity


def test_without_strength_the_loss_is_the_inner_loss_itself() -> None:
    model = Toy(1.0, 1.0)
    assert penalty(model, L2SP(strength=0.0, head_strength=0.0), started(model)) is nothing


def test_at_the_start_the_pull_to_it_changes_no_gradient_bit_for_bit() -> None:
    pulled, free = tiny("bert"), tiny("bert")
    first = begin(pulled, [L2SP(strength=0.3, head_strength=0.0)], steps=1)
    second = begin(free, [], steps=1)
    first.loss(pulled, batch(0)).backward()
    second.loss(free, batch(0)).backward()
    expected = dict(free.named_parameters())
    for name, weight in pulled.named_parameters():
        assert weight.grad is not None
        assert expected[name].grad is not None
        assert torch.equal(weight.grad, expected[name].grad)  # type: ignore[arg-type]


# Invariants

FLOATS = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(FLOATS, st.floats(-10, 10, width=32))
def test_the_gradient_is_the_difference(values: list[float], start: float) -> None:
    weight = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    distance(weight, torch.full_like(weight, start)).backward()
    assert weight.grad is not None
    # Exact: 2 (w - w0) / 2, and a factor of two is lossless.
    assert torch.equal(weight.grad, weight.detach() - start)


def test_half_precision_weights_are_measured_in_single_precision() -> None:
    # 4096 differences of 1/128 make 4096 / 128^2 / 2 = 1/8; summed in bf16 they would stop growing at 256 of them.
    weight = torch.full((4096,), 1 + 1 / 128, dtype=torch.bfloat16, requires_grad=True)
    found = distance(weight, torch.ones(4096, dtype=torch.bfloat16))
    assert found.dtype == torch.float32
    assert found.item() == 0.125


# Parity


def test_the_pull_of_the_head_is_the_weight_decay_of_sgd() -> None:
    # beta v is what torch's SGD adds to the gradient for weight_decay = beta; in double precision, one rounding apart.
    model, other = Toy(1.0, 4.0), Toy(1.0, 4.0)
    optimizer = SGD([model.head.weight], lr=0.1)
    theirs = SGD([other.head.weight], lr=0.1, weight_decay=0.3)
    pull = penalty(model, L2SP(strength=0.0, head_strength=0.3), started(model))
    for _ in range(5):
        optimizer.zero_grad()
        theirs.zero_grad()
        (bowl(model, None) + pull(model, None)).backward()
        bowl(other, None).backward()
        optimizer.step()
        theirs.step()
    torch.testing.assert_close(model.head.weight, other.head.weight, atol=1e-14, rtol=0)


# Conformance


def test_it_keeps_the_contract() -> None:
    from luthier.testing import check_ingredient

    check_ingredient(L2SP())


def test_it_goes_on_after_a_stop_from_the_same_start_bit_for_bit() -> None:
    whole, first, second = tiny("bert"), tiny("bert"), tiny("bert")
    unbroken = begin(whole, [L2SP(strength=1.0)], learning_rate=1e-2, steps=6)
    train(unbroken, 0, 6)

    stopped = begin(first, [L2SP(strength=1.0)], learning_rate=1e-2, steps=6)
    train(stopped, 0, 3)
    resumed = begin(second, [L2SP(strength=1.0)], learning_rate=1e-2, steps=6)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(stopped.state_dict())
    train(resumed, 3, 6)
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in second.state_dict().items())


def test_it_claims_the_loss_and_the_reference() -> None:
    assert L2SP().touches() == (wraps(Place.LOSS), needs(Place.REFERENCE, "backbone"))


def test_negative_strengths_are_refused_together() -> None:
    with pytest.raises(RecipeError) as told:
        L2SP(strength=-1.0, head_strength=-1.0)
    assert {fault.where for fault in told.value.faults} == {"l2sp.strength", "l2sp.head_strength"}


# It matters


def test_frozen_weights_do_not_count() -> None:
    model = Toy(5.0, 4.0)
    model.head.weight.requires_grad_(False)
    pull = penalty(model, L2SP(strength=0.5, head_strength=0.25), started(model, -3.0))
    assert pull(model, None).item() == 2.25  # the first test's 4.25 without the head's 2


def test_weights_that_were_not_there_at_the_start_are_pulled_to_zero() -> None:
    model = Toy(5.0, 4.0)
    start = {name: value for name, value in started(model).items() if name.startswith("head")}
    # w counts as new: 0.25/2 x 25 + 0.25/2 x 16 = 5.125.
    assert penalty(model, L2SP(strength=0.5, head_strength=0.25), start)(model, None).item() == 5.125


class Wrapper(nn.Module):
    """What data parallelism does to names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def _compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "wrap",
    [Wrapper, torch.compile, lambda model: torch.compile(Wrapper(model)), lambda model: Wrapper(_compiled(model))],
    ids=["parallel", "compiled", "compiled parallel", "parallel compiled"],
)
def test_wrapped_models_are_pulled_alike(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = Toy(5.0, 4.0)
    pull = penalty(model, L2SP(strength=0.5, head_strength=0.25), started(model, -3.0))
    assert pull(wrap(model), None).item() == 4.25


def test_a_module_that_is_called_module_keeps_its_name() -> None:
    assert plain("module.weight", {"module.weight": 0}) == "module.weight"
    assert plain("module.module.weight", {"module.weight": 0}) == "module.weight"


def test_a_weight_that_nobody_planned_for_is_told() -> None:
    model = Toy(5.0, 4.0)
    pull = penalty(model, L2SP(), started(model))
    model.extra = nn.Parameter(torch.ones(1))
    with pytest.raises(ModelError, match="extra"):
        pull(model, None)


def test_every_weight_of_a_real_model_but_the_head_is_held_back() -> None:
    # A pull that is far stronger than the loss: SGD at rate 0.01 x strength 50 halves the way from the start each step.
    held, free = tiny("bert"), tiny("bert")
    start = started(held)
    for model, pulls in ((held, [L2SP(strength=50.0, head_strength=0.0)]), (free, [])):
        train(begin(model, [*pulls, PlainSGD()], learning_rate=0.01, steps=20), 0, 20)
    far = {name: (value - start[name]).norm() for name, value in free.named_parameters()}
    near = {name: (value - start[name]).norm() for name, value in held.named_parameters()}
    moved = [name for name, way in far.items() if way > 1e-4 and not name.startswith("classifier")]
    assert len(moved) > 10
    assert all(near[name] < far[name] / 2 for name in moved)


def test_with_only_the_head_trainable_the_body_adds_nothing() -> None:
    model = tiny("bert")
    run = begin(model, [Freeze(keep=("head",)), L2SP(strength=9.0, head_strength=2.0)], steps=1)
    head = sum(weight.square().sum() for name, weight in model.named_parameters() if name.startswith("classifier"))
    expected = model(**batch(0)).loss + head  # beta / 2 x the square, beta = 2
    torch.testing.assert_close(run.loss(model, batch(0)), expected)


def test_sharded_weights_are_pulled_alike() -> None:
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    with mesh() as only:
        model = Toy(5.0, 4.0)
        start = started(model, -3.0)
        model.blocks[0].weight = nn.Parameter(distribute_tensor(model.w.detach(), only, [Shard(0)]))
        model.head.weight = nn.Parameter(distribute_tensor(model.head.weight.detach(), only, [Shard(0)]))
        loss = penalty(model, L2SP(strength=0.5, head_strength=0.25), start)(model, None)
        assert not isinstance(loss, DTensor)
        loss.backward()
        assert loss.item() == 4.25
        assert isinstance(model.w.grad, DTensor)
        assert model.w.grad.to_local().item() == 1.5
