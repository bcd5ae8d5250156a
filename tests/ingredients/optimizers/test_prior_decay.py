"""prior_decay: weight decay that pulls to the start of the stage instead of to zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from luthier.core.claims import Claim, Place, needs, owns, scales
from luthier.core.context import Context
from luthier.core.families import Family
from luthier.core.groups import groups_of
from luthier.core.ingredient import Ingredient, ingredient
from luthier.core.wrappers import placed
from luthier.errors import ConflictError, RecipeError
from luthier.ingredients.gradients.clip import Clip
from luthier.ingredients.modules.lora import LoRA
from luthier.ingredients.optimizers.adamw import AdamW
from luthier.ingredients.optimizers.mezo import MeZO
from luthier.ingredients.optimizers.prior_decay import PriorDecay, pull
from luthier.ingredients.settings.anneal import Anneal
from luthier.ingredients.settings.freeze import Freeze
from luthier.run import Run, begin
from luthier.testing import check_ingredient
from tests.processes import mesh
from tests.tiny import tiny

TOY = Family(blocks="blocks", head=("head",))


class Toy(nn.Module):
    """One pretrained weight and one head weight."""

    def __init__(self, w: float, v: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(1, 1, bias=False, dtype=torch.float64)])
        self.head = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        nn.init.constant_(self.blocks[0].weight, w)
        nn.init.constant_(self.head.weight, v)


def flat(model: nn.Module, batch: Any) -> Tensor:
    """A loss without a slope: gradients are there, and zero."""
    return sum((weight * 0).sum() for weight in model.parameters())  # type: ignore[return-value]


def slope(model: nn.Module, batch: Any) -> Tensor:
    """A loss whose gradient is 1 for every weight."""
    return sum(weight.sum() for weight in model.parameters())  # type: ignore[return-value]


@ingredient
class PlainSGD(Ingredient):
    """SGD without any decay of its own."""

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


def train(run: Run, first: int, last: int) -> None:
    for step in range(first, last):
        run.offer(run.closure(batch(step)))
        run.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


# By hand


def test_two_steps_of_the_pull() -> None:
    # Gradient 1, rate 0.5, decay 0.2, start 4: the first step has no way back to go: 4 - 0.5 = 3.5. The second goes
    # 0.5 x 0.2 = a tenth of the way from 3.5 to 4, which is 0.05: 3.55 - 0.5 = 3.05. The head is not pulled: 2 - 2 x 0.5.
    model = Toy(4.0, 2.0)
    run = begin(model, [PlainSGD(), PriorDecay(weight_decay=0.2)], learning_rate=0.5, steps=2, loss=slope, family=TOY)
    for _ in range(2):
        run.offer(run.closure(None))
        run.step()
    assert model.blocks[0].weight.item() == pytest.approx(3.05, abs=1e-14)
    assert model.head.weight.item() == 1.0


def test_a_share_of_the_way() -> None:
    weight = torch.tensor([3.0, -1.0])
    pull(weight, torch.tensor([1.0, 1.0]), 0.25)  # 3 - 0.25 x 2 and -1 + 0.25 x 2
    assert weight.tolist() == [2.5, -0.5]
    pull(weight, None, 0.5)
    assert weight.tolist() == [1.25, -0.25]


# Identity


def test_without_decay_training_is_the_same_bit_for_bit() -> None:
    neutral, plain = tiny("bert"), tiny("bert")
    train(begin(neutral, [AdamW(), PriorDecay(weight_decay=0.0)], learning_rate=1e-2, steps=3), 0, 3)
    train(begin(plain, [AdamW()], learning_rate=1e-2, steps=3), 0, 3)
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(neutral).items())


@pytest.mark.parametrize("order", [[PriorDecay(weight_decay=0.3)], [AdamW(0.1), PriorDecay(weight_decay=0.3)]])
def test_at_the_start_the_pull_moves_nothing_bit_for_bit(order: list[Any]) -> None:
    model = tiny("bert")
    before = weights(model)
    run = begin(model, order, learning_rate=0.5, steps=3, loss=flat)
    for _ in range(3):
        run.offer(run.closure(None))
        run.step()
    after = weights(model)
    assert all(torch.equal(after[name], value) for name, value in before.items() if not name.startswith("classifier"))
    assert not torch.equal(after["classifier.weight"], before["classifier.weight"])  # decays to zero as it would


# Invariants


@settings(max_examples=60, deadline=None)
@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.floats(0, 1))
def test_the_distance_shrinks_by_the_share(at: float, start: float, share: float) -> None:
    weight, target = torch.tensor([at], dtype=torch.float64), torch.tensor([start], dtype=torch.float64)
    pull(weight, target, share)
    # Three roundings of numbers below 2e3: 1e-12.
    assert weight.item() - start == pytest.approx((1 - share) * (at - start), abs=1e-12)


def test_the_pull_follows_the_schedule() -> None:
    # The rate is 0.4 and then 0.2: of a way of 1 there are 1 - 0.4 x 0.5 = 0.8 left, then 0.8 x (1 - 0.2 x 0.5) = 0.72.
    model = Toy(1.0, 1.0)
    order = [PlainSGD(), Anneal(shape="linear"), PriorDecay(weight_decay=0.5)]
    run = begin(model, order, learning_rate=0.4, steps=2, loss=flat, family=TOY)
    with torch.no_grad():
        model.blocks[0].weight += 1.0
    for expected in (1.8, 1.72):
        run.offer(run.closure(None))
        run.step()
        assert model.blocks[0].weight.item() == pytest.approx(expected, abs=1e-14)


# Parity


def reference(model: nn.Module, steps: int, *, rate: float, decay: float, pulled: Any) -> None:
    """The step of Zhang et al.'s code: the pull, then torch's AdamW without decay. ``pulled`` chooses by name."""
    start = weights(model)
    inner = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for step in range(steps):
        inner.zero_grad()
        model(**batch(step)).loss.backward()
        with torch.no_grad():
            for name, value in model.named_parameters():
                if pulled(name) and value.grad is not None:
                    value -= rate * decay * (value - start[name])
        inner.step()


def test_it_is_the_reference_over_adamw() -> None:
    # Double precision; a few roundings a step in another order, which Adam's quotient keeps small: 1e-10.
    ours, theirs = tiny("bert").double(), tiny("bert").double()
    order = [AdamW(weight_decay=0.0), PriorDecay(weight_decay=5.0, exclude=())]
    train(begin(ours, order, learning_rate=1e-2, steps=6), 0, 6)
    reference(theirs, 6, rate=1e-2, decay=5.0, pulled=lambda name: not name.startswith("classifier"))
    expected = weights(theirs)
    for name, value in weights(ours).items():
        torch.testing.assert_close(value, expected[name], atol=1e-10, rtol=0)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_wherever_the_optimizer_stands_the_step_is_the_same(order: int) -> None:
    # After AdamW the plan has no decay for what is pulled. Before it, or with the default, AdamW writes its own decay of
    # 0.01 over that: then it is taken out at each step, and the head's decay is made by hand. In double precision.
    prior = PriorDecay(weight_decay=5.0)
    orders: list[list[Any]] = [[AdamW(), prior], [prior, AdamW()], [prior]]
    model, expected = tiny("bert").double(), tiny("bert").double()
    run = begin(model, orders[order], learning_rate=1e-2, steps=4)
    train(run, 0, 4)
    train(begin(expected, orders[0], learning_rate=1e-2, steps=4), 0, 4)
    theirs = weights(expected)
    for name, value in weights(model).items():
        torch.testing.assert_close(value, theirs[name], atol=1e-12, rtol=0)
    planned = {row.name: row.weight_decay for row in run.plan.table.rows}
    assert all(
        group["weight_decay"] == planned[name] for group in run.optimizer.param_groups for name in group["names"]
    )


# Conformance


def test_it_keeps_its_promises() -> None:
    # The table that the check starts from has no decay that could be taken out.
    check_ingredient(PriorDecay(weight_decay=5.0), unobservable={Place.DECAY})
    check_ingredient(PriorDecay(weight_decay=5.0, where=("top:1", "head"), exclude=()), unobservable={Place.DECAY})


def test_it_goes_on_after_a_stop_bit_for_bit() -> None:
    whole, first, second = tiny("bert"), tiny("bert"), tiny("bert")

    def attach(model: nn.Module) -> Run:
        return begin(model, [PriorDecay(weight_decay=5.0), Clip()], learning_rate=1e-2, steps=6)

    train(attach(whole), 0, 6)
    stopped = attach(first)
    train(stopped, 0, 3)
    resumed = attach(second)  # from the same start weights, as the engine does
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(stopped.state_dict())
    train(resumed, 3, 6)
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(second).items())


def test_it_claims_the_decay_the_reference_and_a_gradient() -> None:
    assert PriorDecay(where=("top:2",)).touches() == (
        scales(Place.DECAY, "top:2"),
        needs(Place.REFERENCE, "top:2"),
        needs(Place.GRADIENT),
    )


def test_it_cannot_share_a_stage_with_what_leaves_no_gradient() -> None:
    with pytest.raises(ConflictError, match="prior_decay needs the gradient, which mezo does away with"):
        begin(tiny("bert"), [PriorDecay(), MeZO()], steps=1)


def test_bad_values_are_refused_together() -> None:
    with pytest.raises(RecipeError) as told:
        PriorDecay(weight_decay=-1.0, where=())
    assert {fault.where for fault in told.value.faults} == {"prior_decay.weight_decay", "prior_decay.where"}


# It matters


def test_the_table_says_that_what_is_pulled_does_not_decay() -> None:
    run = begin(tiny("bert"), [AdamW(weight_decay=0.1), PriorDecay()], steps=1)
    rows = {row.part.canonical: row for row in run.plan.table.rows}
    assert rows["bert.pooler.dense.weight"].weight_decay == 0.0
    assert ("weight_decay", "prior_decay") in rows["bert.pooler.dense.weight"].set_by
    assert rows["classifier.weight"].weight_decay == 0.1


def test_every_matrix_of_the_body_stays_nearer_to_its_start() -> None:
    held, free = tiny("bert"), tiny("bert")
    start = weights(held)
    for model, order in ((held, [PlainSGD(), PriorDecay(weight_decay=4.0)]), (free, [PlainSGD()])):
        train(begin(model, order, learning_rate=0.1, steps=20), 0, 20)
    far = {name: (value - start[name]).norm() for name, value in weights(free).items()}
    near = {name: (value - start[name]).norm() for name, value in weights(held).items()}
    body = [n for n in far if n.startswith("bert") and n.endswith("weight") and "LayerNorm" not in n and far[n] > 1e-5]
    assert len(body) > 10
    assert all(near[name] < 0.7 * far[name] for name in body)


def test_frozen_weights_stay_where_they_are() -> None:
    model = tiny("bert")
    run = begin(model, [Freeze(keep=("head", "top:1")), PriorDecay(weight_decay=5.0)], learning_rate=1e-2, steps=3)
    before = weights(model)
    train(run, 0, 3)
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith(("classifier", "bert.encoder.layer.2.")) for name in moved)


def test_a_step_that_a_gradient_scaler_leaves_out_moves_nothing() -> None:
    # The fused AdamW is asked for its step all the same, hooks and all, and told that there was an infinity.
    model = tiny("bert")
    run = begin(model, [PriorDecay(weight_decay=5.0)], learning_rate=1e-2, steps=4)
    train(run, 0, 2)
    before = weights(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    scaler.scale(run.loss(model, batch(2)) * 1e3).backward()
    run.step(scaler.step)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    planned = {row.name: row.weight_decay for row in run.plan.table.rows}
    groups = run.optimizer.param_groups
    assert all(group["weight_decay"] == planned[name] for group in groups for name in group["names"])


def test_weights_that_were_not_there_at_the_start_are_pulled_to_zero() -> None:
    model = tiny("bert")
    order = [LoRA(r=1, target=("query",)), PlainSGD(), PriorDecay(weight_decay=0.5)]
    run = begin(model, order, learning_rate=0.5, steps=1, loss=flat)
    name = "bert.encoder.layer.0.attention.self.query.lora_A.default.weight"
    before = weights(model)
    run.offer(run.closure(None))
    run.step()
    # 1 - 0.5 x 0.5 of it is left, exactly.
    assert torch.equal(weights(model)[name], 0.75 * before[name])


def test_the_start_is_sharded_like_the_weight() -> None:
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    with mesh() as only:
        weight = distribute_tensor(torch.tensor([3.0, -1.0]), only, [Shard(0)])
        pull(weight, placed(torch.ones(2), weight), 0.25)
        assert isinstance(weight, DTensor)
        assert weight.to_local().tolist() == [2.5, -0.5]
