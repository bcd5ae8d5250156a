"""rec_adam: steps of the body grow along a sigmoid while the pull to the start gives way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from luthier.core.anatomy import Anatomy
from luthier.core.claims import Claim, Place, needs, owns, wraps
from luthier.core.context import Context, Progress, Shelf
from luthier.core.families import Family
from luthier.core.groups import groups_of
from luthier.core.ingredient import Ingredient, ingredient
from luthier.errors import ConflictError, RecipeError
from luthier.ingredients.averaging.ema import EMA
from luthier.ingredients.gradients.child_tuning import ChildTuning
from luthier.ingredients.modules.lora import LoRA
from luthier.ingredients.optimizers.adamw import AdamW
from luthier.ingredients.optimizers.mezo import MeZO
from luthier.ingredients.optimizers.rec_adam import RecAdam, recalled, shares, steepness
from luthier.ingredients.settings.anneal import Anneal
from luthier.ingredients.settings.freeze import Freeze
from luthier.run import Run, begin
from luthier.testing import check_ingredient
from tests.processes import mesh
from tests.tiny import tiny

TOY = Family(blocks="blocks", head=("head",))


class Toy(nn.Module):
    """One pretrained weight w and one head weight v."""

    def __init__(self, w: float, v: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(1, 1, bias=False, dtype=torch.float64)])
        self.head = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        nn.init.constant_(self.w, w)
        nn.init.constant_(self.head.weight, v)

    @property
    def w(self) -> nn.Parameter:
        return self.blocks[0].weight  # type: ignore[return-value]


def slope(model: nn.Module, batch: Any) -> Tensor:
    """A loss whose gradient is 1 for every weight."""
    return sum(weight.sum() for weight in model.parameters())  # type: ignore[return-value]


@ingredient
class PlainSGD(Ingredient):
    """SGD, which hides no factor of the gradient."""

    def touches(self) -> tuple[Claim, ...]:
        return (owns(Place.OPTIMIZER),)

    def optimizer(self, inner: Optimizer, ctx: Context) -> Optimizer:
        return SGD(groups_of(inner), lr=1.0)


def batch(step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {
        "input_ids": torch.randint(3, 64, (4, 6), generator=draw),
        "labels": torch.randint(0, 3, (4,), generator=draw),
    }


def train(run: Run, first: int, last: int, *, parts: int = 1) -> None:
    for step in range(first, last):
        whole = batch(step)
        run.offer(run.closure(*({name: value[at::parts] for name, value in whole.items()} for at in range(parts))))
        run.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(one: nn.Module, other: nn.Module) -> bool:
    expected = weights(other)
    return all(torch.equal(value, expected[name]) for name, value in weights(one).items())


# By hand


def test_half_of_a_step_and_some_of_the_way_back() -> None:
    # w = 5 from w0 = 2, and the optimizer went to 4.2: half of its -0.8 is -0.4; pull 0.1 of the way of 3 is -0.3.
    found = recalled(torch.tensor([5.0]), torch.tensor([4.2]), torch.tensor([2.0]), task=0.5, pull=0.1)
    assert found.item() == pytest.approx(4.3, abs=1e-6)


def test_two_steps_of_a_stage() -> None:
    # Rate 0.1, gradient 1, gamma 2, k = ln 3, t0 T = 1: lambda is 1/2, then 3/4. From w = 5: 5 - 0.05 = 4.95, no way back
    # yet. Then 4.95 - 0.075 + 0.1 x 1/4 x 2 x 0.05 = 4.8775. The head: 4 - 2 x 0.1.
    model = Toy(5.0, 4.0)
    made = RecAdam(strength=2.0, k=1.0986122886681098, t0=0.5)
    run = begin(model, [PlainSGD(), made], learning_rate=0.1, steps=2, loss=slope, family=TOY)
    for expected in (4.95, 4.8775):
        run.offer(run.closure(None))
        run.step()
        assert model.w.item() == pytest.approx(expected, abs=1e-14)
    assert model.head.weight.item() == pytest.approx(3.8, abs=1e-14)


def test_the_task_takes_over_along_the_sigmoid() -> None:
    # k (t - t0) = 2 and -2: 1 / (1 + e^-2) = 0.880797, and the rest.
    assert shares(14, k=0.5, middle=10.0) == pytest.approx((0.880797, 0.119203), abs=1e-6)
    assert shares(6, k=0.5, middle=10.0) == pytest.approx((0.119203, 0.880797), abs=1e-6)


def test_in_a_short_stage_lambda_begins_at_a_hundredth() -> None:
    # Middle 12 (a tenth of 120 steps): k = ln 99 / 12 = 0.3829. From a middle of 46 on 0.1 is enough: 1/(1 + e^4.6) = 0.00995.
    assert steepness(None, middle=12.0) == pytest.approx(0.382927, abs=1e-6)
    assert shares(0, k=steepness(None, middle=12.0), middle=12.0)[0] == pytest.approx(0.01, abs=1e-12)
    assert steepness(None, middle=46.0) == steepness(None, middle=0.0) == 0.1
    assert steepness(0.02, middle=12.0) == 0.02


def test_the_default_follows_the_length_of_the_stage() -> None:
    # t0 T = 2: k = ln 99 / 2, so that lambda at the first step is 1 / (1 + e^(k)) = 1 / (1 + 99^1/2) = 0.0913.
    model = Toy(5.0, 4.0)
    run = begin(model, [PlainSGD(), RecAdam(strength=1.0)], learning_rate=1.0, steps=20, loss=slope, family=TOY)
    run.offer(run.closure(None))
    run.step()
    assert model.w.item() == pytest.approx(5 - 1 / (1 + 99**0.5), abs=1e-12)


# Identity


def test_without_strength_training_is_the_same_bit_for_bit() -> None:
    neutral, plain = tiny("bert"), tiny("bert")
    train(begin(neutral, [RecAdam(strength=0.0)], learning_rate=1e-2, steps=3), 0, 3)
    train(begin(plain, [], learning_rate=1e-2, steps=3), 0, 3)
    assert same(neutral, plain)


def test_when_the_task_has_taken_over_the_steps_are_the_optimizers_bit_for_bit() -> None:
    recalled, free = tiny("bert"), tiny("bert")
    train(begin(recalled, [RecAdam(k=50.0, t0=0.0)], learning_rate=1e-2, steps=3), 0, 3)  # e^-50 is lost beside 1
    train(begin(free, [], learning_rate=1e-2, steps=3), 0, 3)
    assert same(recalled, free)


# Invariants


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 10**6), st.floats(1e-6, 1e3), st.floats(0, 1e6))
def test_the_shares_make_one_and_the_task_never_goes_back(step: int, k: float, middle: float) -> None:
    task, recall = shares(step, k=k, middle=middle)
    assert 0 <= task <= 1
    assert task + recall == pytest.approx(1.0, abs=1e-15)
    assert shares(step + 1, k=k, middle=middle)[0] >= task


@settings(max_examples=60, deadline=None)
@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.floats(0, 1), st.floats(0, 1))
def test_what_is_added_is_a_share_of_each_way(w: float, to: float, start: float, task: float, pull: float) -> None:
    before, after, first = (torch.tensor([value], dtype=torch.float64) for value in (w, to, start))
    found = recalled(before, after, first, task=task, pull=pull).item()
    # A few roundings of numbers below 4e3: 1e-11.
    assert found - w == pytest.approx(task * (to - w) + pull * (start - w), abs=1e-11)


def test_half_precision_weights_are_measured_in_single_precision() -> None:
    # From 1 + 1/128 a pull of 1/4 is 1/512 and half a step of 1/64 is 1/128: single precision holds both, bf16 does not.
    one = torch.tensor([1 + 1 / 128], dtype=torch.bfloat16)
    found = recalled(one, one + 1 / 64, torch.ones(1, dtype=torch.bfloat16), task=0.5, pull=0.25)
    assert found.dtype == torch.float32
    assert found.item() == 1 + 1 / 128 + 1 / 128 - 1 / 512


# Parity


def reference(model: nn.Module, steps: int, *, rate: float, gamma: float, k: float, middle: float) -> None:
    """The paper's algorithm: Adam by hand, its step times lambda, and the pull times 1 - lambda; the head without either."""
    start, first, second = weights(model), dict[str, Tensor](), dict[str, Tensor]()
    for step in range(1, steps + 1):
        model.zero_grad()
        model(**batch(step - 1)).loss.backward()
        share = 1.0 / (1.0 + torch.exp(torch.tensor(-k * (step - middle), dtype=torch.float64)))
        with torch.no_grad():
            for name, value in model.named_parameters():
                if value.grad is None:
                    continue
                first[name] = 0.9 * first.get(name, torch.zeros_like(value)) + 0.1 * value.grad
                second[name] = 0.999 * second.get(name, torch.zeros_like(value)) + 0.001 * value.grad**2
                adam = (first[name] / (1 - 0.9**step)) / ((second[name] / (1 - 0.999**step)).sqrt() + 1e-8)
                head = name.startswith("classifier")
                value -= rate * (adam if head else share * adam + (1 - share) * gamma * (value - start[name]))


@pytest.mark.parametrize("parts", [1, 2])
def test_it_is_the_papers_algorithm_with_adam(parts: int) -> None:
    # Double precision; a few roundings a step in another order, which Adam's quotient keeps small: 1e-10.
    ours, theirs = tiny("bert").double(), tiny("bert").double()
    order = [AdamW(weight_decay=0.0), RecAdam(strength=30.0, k=0.7, t0=0.5)]
    train(begin(ours, order, learning_rate=1e-2, steps=6), 0, 6, parts=parts)
    reference(theirs, 6, rate=1e-2, gamma=30.0, k=0.7, middle=3.0)
    expected = weights(theirs)
    for name, value in weights(ours).items():
        torch.testing.assert_close(value, expected[name], atol=1e-10, rtol=0)


def test_the_pull_follows_the_schedule() -> None:
    # lambda is 1/2 at step 2 of 2 and the rate 0.4 and then 0.2: at step 2 the way of 1 shrinks by 0.2 x 1/2 x 4 = 0.4.
    model = Toy(1.0, 1.0)
    order = [PlainSGD(), Anneal(shape="linear"), RecAdam(strength=4.0, k=1.0, t0=1.0)]
    flat = lambda model, batch: 0.0 * slope(model, batch)  # noqa: E731
    run = begin(model, order, learning_rate=0.4, steps=2, loss=flat, family=TOY)
    run.offer(run.closure(None))
    run.step()
    with torch.no_grad():
        model.w.add_(1.0)
    run.offer(run.closure(None))
    run.step()
    assert model.w.item() == pytest.approx(1.6, abs=1e-14)


# Conformance


def test_it_keeps_its_promises() -> None:
    check_ingredient(RecAdam(strength=5.0, k=0.5, t0=0.5), unobservable={Place.STEP})  # hooks of a step are not seen
    check_ingredient(RecAdam(), unobservable={Place.STEP})


def test_it_goes_on_after_a_stop_bit_for_bit() -> None:
    whole, first, second = tiny("bert"), tiny("bert"), tiny("bert")

    def attach(model: nn.Module) -> Run:
        return begin(model, [RecAdam(strength=5.0, k=0.5, t0=0.5)], learning_rate=1e-2, steps=6)

    train(attach(whole), 0, 6)
    stopped = attach(first)
    train(stopped, 0, 3)
    resumed = attach(second)  # from the same start weights, as the engine does
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(stopped.state_dict())
    train(resumed, 3, 6)
    assert same(whole, second)


def test_it_claims_the_step_the_reference_and_a_gradient() -> None:
    assert RecAdam().touches() == (wraps(Place.STEP), needs(Place.REFERENCE, "backbone"), needs(Place.GRADIENT))


def test_it_cannot_share_a_stage_with_what_leaves_no_gradient() -> None:
    with pytest.raises(ConflictError, match="rec_adam needs the gradient, which mezo does away with"):
        begin(tiny("bert"), [RecAdam(), MeZO()], steps=1)


@pytest.mark.parametrize("order", [[Freeze(keep=("head",))], [LoRA(r=1, target=("query",))]])
def test_where_nothing_is_pulled_it_is_refused(order: list[Any]) -> None:
    with pytest.raises(RecipeError, match="rec_adam.*must work on some weight that learns in this stage"):
        begin(tiny("bert"), [*order, RecAdam()], steps=4)
    begin(tiny("bert"), [*order, RecAdam(strength=0.0)], steps=4)  # told to do nothing


def test_bad_values_are_refused_together() -> None:
    with pytest.raises(RecipeError) as told:
        RecAdam(strength=-1.0, k=0.0, t0=1.5)
    assert {fault.where for fault in told.value.faults} == {"rec_adam.strength", "rec_adam.k", "rec_adam.t0"}


# It matters


def test_the_optimizer_hears_of_the_task_alone() -> None:
    # Adam's moments after a step are those of the same gradient without it: the pull of 5000 is in none of them.
    moments = []
    for order in ([RecAdam(k=0.1, t0=0.5)], []):
        model = tiny("bert")
        run = begin(model, order, learning_rate=1e-4, steps=4)
        train(run, 0, 1)
        moments.append([value["exp_avg_sq"] for value in run.optimizer.state.values()])
    assert all(torch.equal(one, other) for one, other in zip(*moments, strict=True))


def test_the_body_is_held_back_first_and_let_go_later() -> None:
    model = tiny("bert")
    start = weights(model)
    order = [RecAdam(strength=10.0, k=1.0, t0=0.5), PlainSGD()]
    run = begin(model, order, learning_rate=0.05, steps=40)
    way = []
    for step in range(40):
        train(run, step, step + 1)
        now = weights(model)
        way.append(sum(float((now[name] - start[name]).norm()) for name in now if name.startswith("bert")))
    # Half of the stage each; while it is held it goes less than a tenth as far as after it was let go.
    assert way[17] < 0.1 * way[39]


def test_a_step_that_a_gradient_scaler_leaves_out_moves_nothing() -> None:
    # The fused AdamW is asked for its step all the same, hooks and all, and told that there was an infinity.
    model = tiny("bert")
    run = begin(model, [RecAdam(strength=100.0, t0=1.0)], learning_rate=1e-2, steps=4)
    train(run, 0, 2)
    before = weights(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38, growth_interval=1000)
    scaler.scale(run.loss(model, batch(2)) * 1e3).backward()
    run.step(scaler.step)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    train(run, 3, 4)
    assert not torch.equal(model.bert.pooler.dense.weight, before["bert.pooler.dense.weight"])


def test_weights_that_were_not_there_or_are_frozen_are_left_to_the_optimizer() -> None:
    model, plain = tiny("bert"), tiny("bert")
    keep = Freeze(keep=("head", "top:1"))
    train(begin(model, [keep, RecAdam(t0=1.0)], learning_rate=1e-4, steps=2), 0, 2)
    train(begin(plain, [keep], learning_rate=1e-4, steps=2), 0, 2)
    differs = {name for name, value in weights(model).items() if not torch.equal(value, weights(plain)[name])}
    assert differs
    assert all(name.startswith("bert.encoder.layer.2.") for name in differs - {"classifier.weight", "classifier.bias"})


def test_what_a_mask_holds_still_stands_still_in_any_order() -> None:
    mask, rec = ChildTuning(mode="free", p=0.5, strict=True), RecAdam(strength=50.0, k=0.1, t0=1.0)
    for order in ([mask, rec], [rec, mask]):
        model = tiny("bert")
        run = begin(model, order, learning_rate=1e-2, steps=4)
        train(run, 0, 2)
        before = weights(model)
        train(run, 2, 3)
        stood = [
            float((value == before[name]).float().mean())
            for name, value in weights(model).items()
            if ".query.w" in name
        ]
        assert all(0.3 < share < 0.7 for share in stood)


def test_an_average_takes_the_weights_as_the_step_leaves_them() -> None:
    model = tiny("bert")
    run = begin(model, [EMA(decay=0.0), RecAdam(strength=50.0, k=0.1, t0=1.0)], learning_rate=1e-2, steps=4)
    train(run, 0, 3)
    before = weights(model)
    with run.ended():
        assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_a_pull_that_would_swing_past_the_start_is_told() -> None:
    assert any(
        "must be below 2" in note for note in begin(tiny("bert"), [RecAdam()], learning_rate=1e-3, steps=4).notes
    )
    assert not any("rec_adam" in note for note in begin(tiny("bert"), [RecAdam()], learning_rate=2e-5, steps=4).notes)


def test_the_plan_counts_the_body_and_what_learns_of_it_while_a_step_is_taken() -> None:
    run = begin(tiny("bert"), [Freeze(keep=("head", "top:1")), RecAdam()], steps=1)
    body = [row for row in run.plan.table.rows if row.part.role != "head"]
    expected = sum(row.part.bytes for row in body) + sum(row.part.bytes for row in body if row.trainable)
    assert RecAdam().state_bytes(run.plan.table) == expected
    assert RecAdam(strength=0.0).state_bytes(run.plan.table) == 0


def test_sharded_weights_are_pulled_alike() -> None:
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    with mesh() as only:
        model, made = Toy(5.0, 4.0), RecAdam(strength=0.5, k=0.3, t0=0.5)
        start = {"blocks.0.weight": torch.full((1, 1), 2.0, dtype=torch.float64)}
        model.blocks[0].weight = nn.Parameter(distribute_tensor(model.w.detach(), only, [Shard(0)]))
        progress = Progress(10, step=4)  # step 5 of 10: lambda is 1/2
        ctx = Context(Anatomy.of(model, TOY), progress, 0, "train/rec_adam", made.touches(), Shelf(), [], start)
        inner = SGD([{"params": [model.w], "names": ("blocks.0.weight",)}], lr=0.2)
        made.optimizer(inner, ctx)
        model.w.grad = torch.ones_like(model.w)
        inner.step()
        assert isinstance(model.w, DTensor)
        assert model.w.to_local().item() == pytest.approx(5 - 0.1 - 0.2 * 0.5 * 0.5 * 3, abs=1e-14)
