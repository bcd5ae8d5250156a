"""EMA: the moving average by hand, with and without its warm-up, over half precision and sharded weights, and after a stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from luthier.core.claims import Claim, Place, owns
from luthier.core.context import Context, Progress, Shelf, Tensors
from luthier.core.groups import groups_of
from luthier.core.ingredient import Ingredient, ingredient
from luthier.errors import ConflictError, RecipeError
from luthier.ingredients.averaging.ema import EMA, moved, share
from luthier.ingredients.averaging.swa import SWA
from luthier.ingredients.settings.freeze import Freeze
from luthier.run import Run, begin
from luthier.testing import check_ingredient
from tests.processes import mesh
from tests.tiny import tiny


@ingredient
class PlainSGD(Ingredient):
    """Owns the optimizer: what was hooked on the one before it is gone."""

    def touches(self) -> tuple[Claim, ...]:
        return (owns(Place.OPTIMIZER), owns(Place.STEP))

    def optimizer(self, inner: Optimizer, ctx: Context) -> Optimizer:
        return SGD(groups_of(inner), lr=1.0)


def walk(ema: EMA, values: list[float], *, weight: Any = None) -> tuple[Tensor, Context]:
    """A stage whose weight has ``values`` after its steps, and is then finished. Returns its weight."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(1) if weight is None else weight)
    parts: Any = None  # EMA does not read the model's parts
    ctx = Context(parts, Progress(len(values)), 0, "train/ema", ema.touches(), Shelf(), [])
    optimizer = ema.optimizer(SGD([{"params": [model.weight], "names": ("weight",), "lr": 0.0}], lr=0.0), ctx)
    for value in values:
        with torch.no_grad():
            model.weight.fill_(value)
        optimizer.step()
        ctx.progress.step += 1
    ema.finish(model, ctx)
    return model.weight.detach(), ctx


def batch(step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {
        "input_ids": torch.randint(3, 64, (4, 6), generator=draw),
        "labels": torch.randint(0, 3, (4,), generator=draw),
    }


def train(run: Run, steps: int, after: Callable[[], None] = lambda: None) -> None:
    for step in range(steps):
        run.loss(run.model, batch(step)).backward()
        run.step()
        after()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


# By hand


def test_each_update_keeps_its_share_of_the_average() -> None:
    # 1 is copied; 1/2 of 1 and 1/2 of 2 is 1.5; 1/2 of 1.5 and 1/2 of 4 is 2.75.
    assert walk(EMA(decay=0.5, warmup=False), [1.0, 2.0, 4.0])[0].item() == 2.75


def test_with_a_warm_up_the_first_shares_are_one_tenth_and_two_elevenths() -> None:
    # 1 is copied; 1/10 of 1 and 9/10 of 2 is 1.9; 2/11 of 1.9 and 9/11 of 4 is (3.8 + 36) / 11 = 3.6181818.
    assert walk(EMA(decay=0.99), [1.0, 2.0])[0].item() == pytest.approx(1.9)
    assert walk(EMA(decay=0.99), [1.0, 2.0, 4.0])[0].item() == pytest.approx(3.6181818)


@pytest.mark.parametrize(
    ("count", "kept"), [(0, 0.1), (1, 2 / 11), (8, 0.5), (889, 890 / 899), (890, 0.99), (10**6, 0.99)]
)
def test_the_warm_up_ends_where_it_reaches_the_decay(count: int, kept: float) -> None:
    # (1 + n) / (10 + n) reaches 0.99 at n = 890, where it is 891 / 900.
    assert share(0.99, count, warmup=True) == kept
    assert share(0.99, count, warmup=False) == 0.99


def test_every_second_step_is_an_update() -> None:
    # The steps 2, 4 and 6 count: 20 is copied; then 30, then 45. What comes after the last update does not count.
    values = [10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0]
    assert walk(EMA(decay=0.5, every=2, warmup=False), values)[0].item() == 45.0


# Identity


@pytest.mark.parametrize("neutral", [EMA(decay=0.0), EMA(decay=0.0, warmup=False), EMA(every=9)])
def test_without_memory_or_without_an_update_nothing_changes_bit_for_bit(neutral: EMA) -> None:
    one, other = tiny("bert"), tiny("bert")
    for model, ingredients in ((one, [neutral]), (other, [])):
        run = begin(model, ingredients, learning_rate=1e-2, steps=8)
        train(run, 8)
        run.finish()
        assert any(note.startswith("ema made no update") for note in run.notes) is (ingredients == [EMA(every=9)])
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())


def test_without_memory_what_was_once_infinite_is_forgotten() -> None:
    assert walk(EMA(decay=0.0), [float("inf"), 3.0])[0].item() == 3.0


# Invariants


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40), st.floats(0.0, 0.999), st.booleans())
def test_it_is_the_sum_over_all_updates_with_weights_that_sum_to_one(
    values: list[float], decay: float, warmup: bool
) -> None:
    """In double precision; each of forty steps rounds to one part in 2**53 of numbers up to 1e3."""
    average = torch.zeros(1, dtype=torch.float64)
    each: list[float] = []
    for count, value in enumerate(values):
        kept = share(decay, count - 1, warmup=warmup) if count else 0.0
        moved(average, torch.tensor([value], dtype=torch.float64), kept)
        each = [one * kept for one in each] + [1.0 - kept]
    assert sum(each) == pytest.approx(1.0, abs=1e-12)
    assert average.item() == pytest.approx(sum(a * b for a, b in zip(each, values, strict=True)), abs=1e-10)


def test_half_precision_weights_are_averaged_in_single_precision() -> None:
    # The neighbour of 1 in bf16 is 1 + 1/128. After a first 1 the weight stays there: after n updates at 0.99 the average is
    # 1 + (1 - 0.99**n) / 128, which is nearer to 1 + 1/128 from n = 69 on. In bf16 each move would round away.
    ema = EMA(decay=0.99, warmup=False)
    weight, ctx = walk(ema, [1.0] + [1 + 1 / 128] * 100, weight=torch.zeros(1, dtype=torch.bfloat16))
    average = ctx.keep("average", Tensors)["weight"]
    assert average.dtype == torch.float32
    assert average.item() == pytest.approx(1 + (1 - 0.99**100) / 128, abs=1e-5)  # a hundred roundings of at most 1e-7
    assert weight.dtype == torch.bfloat16
    assert weight.item() == 1 + 1 / 128


# Parity


@pytest.mark.parametrize("decay", [0.9, 0.5, 0.25])
def test_the_average_is_that_of_torch(decay: float) -> None:
    """Both move by lerp, ours one weight at a time: equal to the bit in double precision."""
    model = tiny("bert").double()
    run = begin(model, [EMA(decay=decay, warmup=False), PlainSGD()], learning_rate=0.1, steps=8)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    train(run, 8, lambda: theirs.update_parameters(model))
    last = weights(model)
    run.finish()
    expected = dict(theirs.module.named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in model.named_parameters())
    assert not torch.equal(model.classifier.weight, last["classifier.weight"])


# Conformance


@pytest.mark.parametrize("one", [EMA(decay=0.9), EMA(decay=0.9, every=2, warmup=False)])
def test_it_keeps_the_contract(one: EMA) -> None:
    check_ingredient(one)


def test_two_averages_cannot_share_a_stage() -> None:
    with pytest.raises(ConflictError, match="swa sets the end weights, which ema sets too"):
        begin(tiny("bert"), [SWA(), EMA()], steps=4)


@pytest.mark.parametrize("values", [{"decay": 1.0}, {"decay": -0.1}, {"decay": float("nan")}, {"every": 0}])
def test_values_that_make_no_average_are_refused(values: Any) -> None:
    with pytest.raises(RecipeError, match=next(iter(values))):
        EMA(**values)


# It matters


def test_validation_during_the_stage_scores_the_average_and_leaves_the_training_as_it_was() -> None:
    seen: list[float] = []
    live: list[float] = []

    def scored(model: nn.Module) -> dict[str, float]:
        seen.append(model.classifier.bias[0].item())
        return {"accuracy": 0.5}

    model = tiny("bert")
    run = begin(model, [EMA(decay=0.5, warmup=False), PlainSGD()], learning_rate=0.1, steps=3, score=scored)

    def after() -> None:
        live.append(model.classifier.bias[0].item())
        run.validate()
        run.validate()  # asked twice, made once
        assert model.classifier.bias[0].item() == live[-1]

    train(run, 3, after)
    first, second, third = live
    assert seen == pytest.approx([first, (first + second) / 2, first / 4 + second / 4 + third / 2], abs=1e-7)
    run.finish()
    assert model.classifier.bias[0].item() == seen[-1]


def test_frozen_weights_are_neither_kept_nor_touched() -> None:
    model = tiny("bert")
    before = weights(model)
    run = begin(model, [Freeze(keep=("head",)), EMA(decay=0.5)], learning_rate=1e-2, steps=4)
    train(run, 4)
    kept = run.state_dict()["shelf"]["train/ema/average"]
    # (3, 16) and (3,) in the head: 51 weights of four bytes
    assert EMA().state_bytes(run.plan.table) == 4 * 51
    run.finish()
    assert set(kept) == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items() if name not in kept)


def test_sharded_weights_are_averaged_shard_by_shard() -> None:
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    with mesh() as only:
        sharded = distribute_tensor(torch.zeros(4), only, [Shard(0)])
        weight, _ = walk(EMA(decay=0.5, warmup=False), [1.0, 2.0, 4.0], weight=sharded)
        assert isinstance(weight, DTensor)
        assert weight.to_local().tolist() == [2.75] * 4
