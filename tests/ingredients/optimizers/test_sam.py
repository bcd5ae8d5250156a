"""sam: the gradient uphill by hand, the weights bit for bit back, and one optimizer for whoever hooks onto it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from luthier.core.claims import Claim, Place, needs, owns, wraps
from luthier.core.closure import Closure
from luthier.core.context import Context, Progress, Shelf
from luthier.core.groups import groups_of
from luthier.core.ingredient import Ingredient, ingredient
from luthier.core.seeds import reseed
from luthier.errors import ConflictError, RecipeError
from luthier.hosts import hf
from luthier.ingredients.gradients.clip import Clip
from luthier.ingredients.optimizers.adamw import AdamW
from luthier.ingredients.optimizers.mezo import MeZO
from luthier.ingredients.optimizers.sam import SAM, climb, reach
from luthier.ingredients.settings.freeze import Freeze
from luthier.ingredients.surgery.neftune import NEFTune
from luthier.run import Run, begin
from luthier.testing import check_ingredient
from tests.processes import mesh
from tests.tiny import tiny


class Point(nn.Module):
    """A point in the plane of a bowl."""

    def __init__(self, *at: float, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor(at, dtype=dtype))


def bowl(model: nn.Module, batch: Tensor) -> Tensor:
    """L = (a x^2 + b y^2) / 2, whose gradient is (a x, b y)."""
    return 0.5 * (batch * model.at**2).sum()


@ingredient
class PlainSGD(Ingredient):
    """SGD, which hides no factor of the gradient."""

    def touches(self) -> tuple[Claim, ...]:
        return (owns(Place.OPTIMIZER),)

    def optimizer(self, inner: Optimizer, ctx: Context) -> Optimizer:
        return SGD(groups_of(inner), lr=1.0)


def attached(sam: SAM, model: nn.Module, *, lr: float = 0.1) -> Any:
    """SAM on plain SGD over the model's weights."""
    parts: Any = None  # SAM does not read the model's parts
    ctx = Context(parts, Progress(1), 0, "train/sam", sam.touches(), Shelf(), [])
    return sam.optimizer(SGD(model.parameters(), lr=lr), ctx)


def curve(a: float, b: float) -> Tensor:
    return torch.tensor([a, b], dtype=torch.float64)


def batch(step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {
        "input_ids": torch.randint(3, 64, (4, 6), generator=draw),
        "labels": torch.randint(0, 3, (4,), generator=draw),
    }


def train(run: Run, steps: int) -> None:
    for step in range(steps):
        run.offer(run.closure(batch(step)))
        run.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


# By hand


def test_the_gradient_is_that_of_a_point_uphill() -> None:
    # At (3, 4) of a round bowl g = (3, 4), |g| = 5: with rho 0.5 uphill is (3.3, 4.4), and so is the gradient there.
    # SGD at rate 0.1 then goes to (3 - 0.33, 4 - 0.44).
    model = Point(3.0, 4.0)
    made = attached(SAM(rho=0.5), model)
    told = made.offer(Closure(model, bowl, [curve(1, 1)]))
    assert told.item() == 12.5  # the loss where the weights are: (9 + 16) / 2
    assert model.at.grad.tolist() == pytest.approx([3.3, 4.4], abs=1e-14)
    made.step()
    assert model.at.tolist() == pytest.approx([2.67, 3.56], abs=1e-14)


def test_adaptive_goes_further_where_weights_are_larger() -> None:
    # At (1, -2) with a = 3, b = 1: g = (3, -2), |w| g = (3, -4), whose length is 5. With rho 1 the way is w^2 g / 5 =
    # (0.6, -1.6), to (1.6, -3.6), where the gradient is (4.8, -3.6).
    model = Point(1.0, -2.0)
    made = attached(SAM(rho=1.0, adaptive=True), model)
    made.offer(Closure(model, bowl, [curve(3, 1)]))
    assert model.at.grad.tolist() == pytest.approx([4.8, -3.6], abs=1e-14)


# Identity


def test_at_rho_zero_the_optimizer_is_the_inner_one_as_it_was() -> None:
    model = Point(1.0, 2.0)
    parts: Any = None
    inner = SGD(model.parameters(), lr=0.1)
    made = SAM(rho=0.0).optimizer(inner, Context(parts, Progress(1), 0, "train/sam", (), Shelf(), []))
    assert made is inner
    assert not hasattr(made, "offer")


def test_at_rho_zero_training_is_the_same_bit_for_bit() -> None:
    neutral, plain = tiny("bert"), tiny("bert")
    train(begin(neutral, [SAM(rho=0.0)], learning_rate=1e-2, steps=3), 3)
    train(begin(plain, [], learning_rate=1e-2, steps=3), 3)
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(neutral).items())


# Invariants


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=1, max_size=20),
    st.floats(1e-3, 10),
    st.booleans(),
)
def test_the_way_uphill_is_rho_long_in_its_own_measure(
    pairs: list[tuple[float, float]], rho: float, adaptive: bool
) -> None:
    # |e / T| = rho |T g| / |T g| = rho; only where |T g| is not so small that squaring it loses everything.
    weight = torch.tensor([at for at, _ in pairs], dtype=torch.float64)
    slope = torch.tensor([by for _, by in pairs], dtype=torch.float64)
    scale = weight.abs() if adaptive else torch.ones_like(weight)
    if float((scale * slope).abs().max()) < 1e-100:
        return
    factor = reach([weight], [slope], rho=rho, adaptive=adaptive)
    assert float((factor * scale * slope).norm()) == pytest.approx(rho, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_weights_come_back_bit_for_bit(dtype: torch.dtype, adaptive: bool) -> None:
    model = tiny("bert").to(dtype)
    run = begin(model, [SAM(rho=3.0, adaptive=adaptive)], steps=1)
    before = weights(model)
    run.offer(run.closure(batch(0)))
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_the_weights_come_back_when_the_second_evaluation_fails() -> None:
    model, calls = Point(1.0, -2.0), []

    def breaks(live: nn.Module, rows: Tensor) -> Tensor:
        calls.append(live.at.detach().clone())
        if len(calls) == 2:
            raise KeyboardInterrupt
        return bowl(live, rows)

    with pytest.raises(KeyboardInterrupt):
        attached(SAM(), model).offer(Closure(model, breaks, [curve(1, 1)]))
    assert not torch.equal(calls[1], calls[0])
    assert model.at.tolist() == [1.0, -2.0]


@pytest.mark.parametrize("slope", [0.0, float("inf"), float("nan")])
def test_without_a_direction_nothing_moves(slope: float) -> None:
    weight = torch.tensor([1.0, 2.0])
    climb([weight], [torch.tensor([slope, 0.0])], rho=0.5, adaptive=False)
    assert weight.tolist() == [1.0, 2.0]


def test_micro_batches_are_one_gradient_both_times() -> None:
    # Not the mean of two gradients uphill of their own: the direction is that of the whole step. In double precision.
    one, other = Point(1.0, -2.0), Point(1.0, -2.0)
    attached(SAM(rho=0.5), one).offer(Closure(one, bowl, [curve(1, 2), curve(5, -1)]))
    attached(SAM(rho=0.5), other).offer(Closure(other, bowl, [curve(3, 0.5)]))
    torch.testing.assert_close(one.at.grad, other.at.grad, atol=1e-14, rtol=0)


def test_offered_again_before_a_step_it_starts_anew() -> None:
    model = Point(3.0, 4.0)
    made = attached(SAM(rho=0.5), model)
    for _ in range(3):
        made.offer(Closure(model, bowl, [curve(1, 1)]))
    assert model.at.grad.tolist() == pytest.approx([3.3, 4.4], abs=1e-14)


# Parity


def reference(model: nn.Module, rho: float, rate: float, steps: int) -> None:
    """SAM over SGD as equations 2 and 3 have it, with autograd's own gradients, out of place."""
    held = dict(model.named_parameters())
    for step in range(steps):
        first = torch.autograd.grad(model(**batch(step)).loss, list(held.values()), allow_unused=True)
        norm = torch.cat([slope.flatten() for slope in first if slope is not None]).norm()
        uphill = {
            name: value.detach() + (0 if slope is None else rho * slope / norm)
            for (name, value), slope in zip(held.items(), first, strict=True)
        }
        leaves = {name: value.requires_grad_() for name, value in uphill.items()}
        out = torch.func.functional_call(model, leaves, (), batch(step))
        second = torch.autograd.grad(out.loss, list(leaves.values()), allow_unused=True)
        with torch.no_grad():
            for value, slope in zip(held.values(), second, strict=True):
                if slope is not None:
                    value -= rate * slope


def test_it_is_the_algorithm_of_the_paper_over_sgd() -> None:
    # Double precision; a few roundings a step in another order: 1e-12.
    ours, theirs = tiny("bert").double(), tiny("bert").double()
    train(begin(ours, [PlainSGD(), SAM(rho=0.1)], learning_rate=0.1, steps=4), 4)
    reference(theirs, 0.1, 0.1, 4)
    expected = weights(theirs)
    for name, value in weights(ours).items():
        torch.testing.assert_close(value, expected[name], atol=1e-12, rtol=0)


# Conformance


def test_it_keeps_its_promises() -> None:
    check_ingredient(SAM(rho=0.1))
    check_ingredient(SAM(rho=0.5, adaptive=True))


def test_it_wraps_the_step_and_needs_a_gradient() -> None:
    assert SAM().touches() == (wraps(Place.STEP), needs(Place.GRADIENT))


def test_it_cannot_share_a_stage_with_what_leaves_no_gradient() -> None:
    with pytest.raises(ConflictError, match="sam needs the gradient, which mezo does away with"):
        begin(tiny("bert"), [SAM(), MeZO()], steps=1)


def test_an_optimizer_that_replaced_the_step_already_is_refused() -> None:
    model = Point(1.0, 2.0)
    made = attached(SAM(), model)
    parts: Any = None
    with pytest.raises(ConflictError, match="steps by gradients"):
        SAM().optimizer(made, Context(parts, Progress(1), 0, "train/sam", (), Shelf(), []))


def test_a_negative_rho_is_refused() -> None:
    with pytest.raises(RecipeError, match="sam.rho"):
        SAM(rho=-0.1)


# It matters


@pytest.mark.parametrize("order", [[SAM(rho=0.5)], [SAM(rho=0.5), AdamW()], [AdamW(), SAM(rho=0.5)]])
def test_it_works_wherever_the_optimizer_stands(order: list[Any]) -> None:
    found, expected, plain = tiny("bert"), tiny("bert"), tiny("bert")
    run = begin(found, order, learning_rate=1e-2, steps=2)
    assert isinstance(run.optimizer, torch.optim.AdamW)
    assert run.schedule.optimizer is run.optimizer
    train(run, 2)
    train(begin(expected, [AdamW(), SAM(rho=0.5)], learning_rate=1e-2, steps=2), 2)
    train(begin(plain, [], learning_rate=1e-2, steps=2), 2)
    assert all(torch.equal(value, weights(expected)[name]) for name, value in weights(found).items())
    assert not torch.equal(weights(found)["classifier.weight"], weights(plain)["classifier.weight"])


@pytest.mark.parametrize("order", [[SAM(rho=0.5), Clip(max_norm=0.01)], [Clip(max_norm=0.01), SAM(rho=0.5)]])
def test_clip_clips_the_gradient_uphill_and_only_that(order: list[Any]) -> None:
    model = tiny("bert")
    run = begin(model, order, steps=1)
    seen: list[float] = []
    run.offer(run.closure(batch(0)))
    uphill = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]

    def look(optimizer: Any, args: Any, named: Any) -> None:
        seen.append(float(torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None]).norm()))

    run.optimizer.register_step_pre_hook(look)
    assert float(torch.cat([slope.flatten() for slope in uphill]).norm()) > 0.1
    run.step()
    assert seen == [pytest.approx(0.01, rel=1e-3)]


@pytest.mark.parametrize("first", [True, False])
def test_hooks_after_a_step_are_called_once_a_step_with_the_same_optimizer(first: bool) -> None:
    seen: list[Optimizer] = []

    @ingredient
    class Hooked(Ingredient):
        """Notes which optimizer has stepped, as averages do."""

        def optimizer(self, inner: Optimizer, ctx: Context) -> Optimizer:
            inner.register_step_post_hook(lambda optimizer, args, named: seen.append(optimizer))
            return inner

    order = [Hooked(), SAM(rho=0.5)] if first else [SAM(rho=0.5), Hooked()]
    run = begin(tiny("bert"), order, learning_rate=1e-2, steps=4)
    train(run, 4)
    assert seen == [run.optimizer] * 4


def test_both_evaluations_see_the_same_dropout() -> None:
    # A way of 1e-9 changes the gradient by about as much; another dropout changes it by as much as it is.
    model = tiny("bert", dropout=0.5).double()
    run = begin(model, [SAM(rho=1e-9)], steps=1)

    def same(number: int) -> None:
        reseed(7 + number, torch.device("cpu"))

    with torch.random.fork_rng(devices=[]):
        Closure(model, run.loss, [batch(0)], before=same).backward()
        expected = [None if w.grad is None else w.grad.clone() for w in model.parameters()]
        run.offer(Closure(model, run.loss, [batch(0)], before=same))
    for weight, slope in zip(model.parameters(), expected, strict=True):
        if slope is not None:
            torch.testing.assert_close(weight.grad, slope, atol=1e-6, rtol=0)


def test_in_transformers_trainer_it_trains_in_training_mode_with_one_dropout_a_step(tmp_path: Path) -> None:
    # A way of 1e-9 changes no digit of the loss that is compared; another dropout of .5 would, as it does from step to step.
    model = tiny("bert", dropout=0.5)
    run = begin(model, [SAM(rho=1e-9), NEFTune()], learning_rate=1e-6, steps=4)
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=4, max_grad_norm=0, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, eval_strategy="steps", eval_steps=1, logging_strategy="no",
    )  # fmt: skip
    rows = [{"input_ids": torch.arange(3, 9), "labels": 1}] * 4
    parts, seen, states = hf.parts(run, args), [], []
    model.register_forward_hook(
        lambda module, given, out: seen.append((module.training, round(float(out.loss.detach()), 4)))
    )
    trainer = parts.Trainer(
        model, args, train_dataset=rows, eval_dataset=rows, optimizers=parts.optimizers, callbacks=parts.callbacks
    )
    taken = trainer.training_step

    def step(*given: Any, **named: Any) -> Tensor:
        states.append(torch.get_rng_state())
        loss = taken(*given, **named)
        states.append(torch.get_rng_state())
        return loss

    trainer.training_step = step
    trainer.train()
    training = [loss for mode, loss in seen if mode]
    assert len(seen) == 12 and len(training) == 8  # two a step, and an evaluation after each
    assert training[::2] == training[1::2]
    assert len(set(training)) == 4
    assert all(torch.equal(one, other) for one, other in zip(states[::2], states[1::2], strict=True))


def test_frozen_weights_stay_and_do_not_count_in_the_norm() -> None:
    model = tiny("bert").double()
    run = begin(model, [Freeze(keep=("head",)), PlainSGD(), SAM(rho=0.5)], learning_rate=0.1, steps=1)
    seen: list[dict[str, Tensor]] = []
    handle = model.register_forward_pre_hook(lambda module, args: seen.append(weights(module)))
    run.offer(run.closure(batch(0)))
    handle.remove()
    moved = {name: seen[1][name] - value for name, value in seen[0].items()}
    head = torch.cat([moved["classifier.weight"].flatten(), moved["classifier.bias"]])
    assert float(head.norm()) == pytest.approx(0.5, rel=1e-12)
    assert all(not way.any() for name, way in moved.items() if not name.startswith("classifier"))


def test_running_statistics_are_those_of_the_first_evaluation() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    rows = torch.tensor([[1.0, 2.0], [3.0, 5.0], [0.0, 1.0]])

    with torch.no_grad():
        mean = model[0](rows).mean(0)
    attached(SAM(rho=5.0), model).offer(Closure(model, lambda live, given: (live(given) - given).abs().mean(), [rows]))
    # Momentum 0.1 from zero: a tenth of the first evaluation's mean, and one batch counted.
    torch.testing.assert_close(model[1].running_mean, 0.1 * mean)
    assert int(model[1].num_batches_tracked) == 1


def falls(at: float) -> Callable[[nn.Module, Tensor], Tensor]:
    """A bowl whose loss is no number beyond ``at``."""
    return lambda model, rows: bowl(model, rows) * (float("nan") if float(model.at.detach().max()) > at else 1.0)


def test_a_loss_uphill_that_is_not_a_number_is_told() -> None:
    model = Point(3.0, 4.0)
    assert torch.isnan(attached(SAM(rho=0.5), model).offer(Closure(model, falls(4.2), [curve(1, 1)])))
    assert model.at.tolist() == [3.0, 4.0]


def test_sharded_weights_climb_alike() -> None:
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    with mesh() as only:
        weight = distribute_tensor(torch.tensor([3.0, 4.0]), only, [Shard(0)])
        climb([weight], [distribute_tensor(torch.tensor([3.0, 4.0]), only, [Shard(0)])], rho=0.5, adaptive=False)
        assert isinstance(weight, DTensor)
        assert weight.to_local().tolist() == pytest.approx([3.3, 4.4])
