"""SWA: the average by hand, over half precision and sharded weights, behind other optimizers, and after a stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.swa_utils import AveragedModel, update_bn

from luthier.core.claims import Claim, Place, needs, owns, scales
from luthier.core.context import Around, Context, Progress, Shelf, Tensors
from luthier.core.families import Family
from luthier.core.groups import groups_of
from luthier.core.ingredient import Ingredient, ingredient
from luthier.errors import ModelError, RecipeError
from luthier.ingredients.averaging.swa import SWA, averaged, opening
from luthier.ingredients.settings.anneal import Anneal
from luthier.ingredients.settings.freeze import Freeze
from luthier.run import Run, begin
from tests.processes import mesh
from tests.tiny import tiny


@ingredient
class PlainSGD(Ingredient):
    """Owns the optimizer, as MeZO and its like do: what was hooked on the one before it is gone."""

    def touches(self) -> tuple[Claim, ...]:
        return (owns(Place.OPTIMIZER), owns(Place.STEP))

    def optimizer(self, inner: Optimizer, ctx: Context) -> Optimizer:
        return SGD(groups_of(inner), lr=1.0)


class Weight(nn.Module):
    """One weight with the name of a head's, and a count that is not trained."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)


def attached(swa: SWA, model: Weight, *, steps: int, around: Around | None = None) -> tuple[Context, Optimizer]:
    """SWA on a plain optimizer over ``model.weight`` alone; the test moves the weight and the progress by hand."""
    parts: Any = None  # SWA does not read the model's parts
    claims = swa.touches()
    ctx = Context(parts, Progress(steps), 0, "train/swa", claims, Shelf(), [], around=around or Around())
    optimizer = SGD([{"params": [model.weight], "names": ("weight",), "lr": 0.0}], lr=0.0)
    return ctx, swa.optimizer(optimizer, ctx)


def walk(swa: SWA, values: list[float], *, dtype: torch.dtype = torch.float32) -> tuple[Weight, Context]:
    """A stage whose weight has ``values`` after its steps, and is then finished."""
    model = Weight(torch.zeros(1, dtype=dtype))
    ctx, optimizer = attached(swa, model, steps=len(values))
    for value in values:
        model.weight.data.fill_(value)
        optimizer.step()
        ctx.progress.step += 1
    swa.finish(model, ctx)
    return model, ctx


class Normed(nn.Module):
    """Batch norm behind a linear layer, dropout, and a head that reads both."""

    def __init__(self, *, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Linear(3, 4)
            self.drop = nn.Dropout(dropout)
            self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=0.3), nn.BatchNorm1d(4)])
            self.head = nn.Linear(4, 2)

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.drop(self.first(rows))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


NORMED = Family(blocks="blocks", embeddings=("first",), head=("head",))


def rows(number: int, count: int = 5) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(100 + number)
    return {
        "rows": torch.randn(count, 3, generator=draw) * 2 + 1,
        "labels": torch.randint(0, 2, (count,), generator=draw),
    }


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch["rows"]), batch["labels"])


def averaging(model: nn.Module, swa: SWA, sample: Any = (), score: Any = None) -> Run:
    """A stage of four steps over rows that are not those of the sample."""
    return begin(
        model,
        [swa, PlainSGD()],
        learning_rate=0.3,
        steps=4,
        loss=cross_entropy,
        sample=sample,
        score=score,
        family=NORMED,
    )


def four(run: Run, after: Callable[[], None] = lambda: None) -> None:
    for step in range(4):
        run.loss(run.model, rows(step)).backward()
        run.step()
        after()


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_buffers()}


def batch(step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {
        "input_ids": torch.randint(3, 64, (4, 6), generator=draw),
        "labels": torch.randint(0, 3, (4,), generator=draw),
    }


def train(run: Run, first: int, last: int, after: Callable[[], None] = lambda: None) -> None:
    for step in range(first, last):
        run.loss(run.model, batch(step)).backward()
        run.step()
        after()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


# By hand


def test_the_average_of_one_two_and_three_is_two() -> None:
    # From step 0 on: 1, then 1 + (2 - 1) / 2 = 1.5, then 1.5 + (3 - 1.5) / 3 = 2.
    model, _ = walk(SWA(start=0.01), [9.0, 1.0, 2.0, 3.0])
    assert model.weight.item() == 2.0


def test_averages_only_the_last_quarter() -> None:
    # Eight steps; the last quarter is steps 7 and 8, after which the weight is 70 and 80.
    model, _ = walk(SWA(start=0.75), [10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0])
    assert model.weight.item() == 75.0


def test_every_second_step_is_a_snapshot() -> None:
    # Half of eight steps is left; every second of steps 5 to 8 is 6 and 8.
    model, _ = walk(SWA(start=0.5, every=2), [10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0])
    assert model.weight.item() == 70.0


@pytest.mark.parametrize(("start", "steps", "first"), [(0.75, 100, 75), (0.07, 100, 7), (0.34, 3, 2), (1.0, 10, 10)])
def test_the_average_opens_at_the_first_step_that_begins_at_or_after_the_start(
    start: float, steps: int, first: int
) -> None:
    # 0.07 x 100 is 7.000000000000001 in floats, while step 7 begins at 7 / 100 = 0.07 exactly as written.
    assert opening(start, steps) == first


def test_refreshed_statistics_are_the_means_over_the_batches() -> None:
    # Batches (1, 3) and (5, 9): means 2 and 7, so 4.5; variances with n - 1 are 2 and 8, so 5.
    model = Weight(torch.zeros(1))
    model.norm = nn.BatchNorm1d(1)
    batches = [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [9.0]])]
    swa = SWA(start=0.1, refresh=True)
    around = Around(lambda live, one: live.norm(one).sum(), batches)
    ctx, optimizer = attached(swa, model, steps=2, around=around)
    for _ in range(2):
        optimizer.step()
        ctx.progress.step += 1
    swa.finish(model, ctx)
    assert model.norm.running_mean.tolist() == [4.5]
    assert model.norm.running_var.tolist() == [5.0]
    assert ctx.notes == []


# Identity


def test_refreshing_a_model_without_batch_norm_changes_nothing_and_reads_no_row() -> None:
    def unread() -> Iterator[Any]:
        raise AssertionError("a row was read")
        yield

    one, other = tiny("bert"), tiny("bert")
    for model, refresh in ((one, True), (other, False)):
        run = begin(model, [SWA(start=0.5, refresh=refresh)], steps=4, sample=unread())
        train(run, 0, 4)
        run.finish()
        assert run.notes == []
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("neutral", [SWA(start=1.0), SWA(every=9)])
def test_without_a_snapshot_nothing_changes_bit_for_bit_and_it_is_told(neutral: SWA) -> None:
    with_swa, without = tiny("bert"), tiny("bert")
    run, plain = begin(with_swa, [neutral], steps=8), begin(without, [], steps=8)
    train(run, 0, 8)
    train(plain, 0, 8)
    run.finish()
    plain.finish()
    assert all(torch.equal(value, weights(without)[name]) for name, value in weights(with_swa).items())
    assert any(note.startswith("swa took no snapshot") for note in run.notes)


# Invariants


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=50))
def test_the_running_average_is_the_mean(values: list[float]) -> None:
    average = torch.zeros(1, dtype=torch.float64)
    for count, value in enumerate(values):
        averaged(average, torch.tensor([value], dtype=torch.float64), count)
    # Fifty additions of numbers below 1e3, each rounded to one part in 2**53.
    assert average.item() == pytest.approx(sum(values) / len(values), abs=1e-10)


def test_bf16_weights_are_averaged_in_single_precision() -> None:
    # The neighbour of 1 in bf16 is 1 + 1/128. 750 of 1000 snapshots stand there: the mean is 1 + 3/512, which bf16
    # rounds to 1 + 1/128. Averaged in bf16 the first 1 would stay: each move is at most 1/256, which rounds back to 1.
    values = [1.0 + (step % 4 != 0) / 128 for step in range(1000)]
    model = Weight(torch.zeros(1, dtype=torch.bfloat16))
    swa = SWA(start=1e-6)
    ctx, optimizer = attached(swa, model, steps=1001)
    for value in [0.0, *values]:
        model.weight.data.fill_(value)
        optimizer.step()
        ctx.progress.step += 1
    average = ctx.keep("average", Tensors)["weight"]
    assert average.dtype == torch.float32
    # A thousand roundings to single precision near 1 (6e-8 each) stay below 1e-6 when they do not all point one way.
    assert average.item() == pytest.approx(1 + 3 / 512, abs=1e-6)
    swa.finish(model, ctx)
    assert model.weight.dtype == torch.bfloat16
    assert model.weight.item() == 1 + 1 / 128


# Parity


def test_the_average_is_that_of_torch() -> None:
    # torch moves by lerp, we by a quotient: in double precision they differ by roundings, 1e-16 a snapshot.
    model = tiny("bert").double()
    run = begin(model, [SWA(start=0.5), PlainSGD()], learning_rate=0.1, steps=8)
    theirs = AveragedModel(model)

    def update() -> None:
        if run.progress.step > 4:
            theirs.update_parameters(model)

    train(run, 0, 8, update)
    run.finish()
    expected = dict(theirs.module.named_parameters())
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, expected[name], atol=1e-14, rtol=0)


def test_refreshed_statistics_are_those_of_numpy() -> None:
    """Double precision: the mean over three batches of their means, and of their variances with n - 1; a few roundings."""
    model, sample = Normed(dropout=0.5).double(), [rows(10), rows(11, 7), rows(12, 2)]
    for one in sample:
        one["rows"] = one["rows"].double()
    run = begin(
        model, [SWA(start=0.5, refresh=True), PlainSGD()], learning_rate=0.3, steps=4, sample=sample, family=NORMED,
        loss=lambda live, one: cross_entropy(live, {**one, "rows": one["rows"].double()}),
    )  # fmt: skip
    four(run)
    run.finish()
    value = {name: weight.detach().numpy() for name, weight in model.state_dict().items()}
    means, variances = [], []
    for one in sample:
        hidden = one["rows"].numpy() @ value["first.weight"].T + value["first.bias"]  # dropout is off
        hidden = hidden @ value["blocks.0.weight"].T + value["blocks.0.bias"]
        means.append(hidden.mean(axis=0))
        variances.append(hidden.var(axis=0, ddof=1))
    np.testing.assert_allclose(value["blocks.1.running_mean"], np.mean(means, axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(value["blocks.1.running_var"], np.mean(variances, axis=0), rtol=1e-12)
    assert value["blocks.1.num_batches_tracked"] == 3


def test_refreshed_statistics_are_those_of_torch() -> None:
    """The same calls on the same weights: equal to the bit, also for the second norm, which reads the first."""
    model, sample = Normed(), [rows(10), rows(11, 7), rows(12, 2)]
    run = averaging(model, SWA(start=0.5, refresh=True), sample)
    four(run)
    run.finish()
    theirs = Normed(seed=1)
    theirs.load_state_dict(model.state_dict())
    for norm in theirs.blocks[1:]:
        norm.running_mean.fill_(7.0)
    update_bn([one["rows"] for one in sample], theirs)
    assert all(torch.equal(value, buffers(theirs)[name]) for name, value in buffers(model).items())


# Conformance


def test_it_keeps_the_contract() -> None:
    from luthier.testing import check_ingredient

    check_ingredient(SWA(start=0.5))
    check_ingredient(SWA(start=0.5, every=2, lr_factor=0.5))
    check_ingredient(SWA(start=0.5, refresh=True))


def test_it_goes_on_after_a_stop_bit_for_bit() -> None:
    whole, first, second = tiny("bert"), tiny("bert"), tiny("bert", seed=1)
    unbroken = begin(whole, [SWA(start=0.25)], learning_rate=1e-2, steps=8)
    train(unbroken, 0, 8)
    unbroken.finish()

    stopped = begin(first, [SWA(start=0.25)], learning_rate=1e-2, steps=8)
    train(stopped, 0, 5)
    state, held = stopped.state_dict(), {name: value.clone() for name, value in first.state_dict().items()}
    resumed = begin(second, [SWA(start=0.25)], learning_rate=1e-2, steps=8)
    second.load_state_dict(held)
    resumed.load_state_dict(state)
    train(resumed, 5, 8)
    resumed.finish()
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(whole).items())


def test_it_claims_the_end_weights_and_the_rate_only_where_it_sets_one() -> None:
    assert SWA().touches() == (owns(Place.END_WEIGHTS),)
    assert SWA(lr_factor=0.5).touches() == (owns(Place.END_WEIGHTS), scales(Place.LR))
    assert SWA(refresh=True).touches() == (owns(Place.END_WEIGHTS), needs(Place.SAMPLE))


# It matters


def test_validation_during_the_stage_scores_the_average_as_soon_as_there_is_one() -> None:
    seen: list[float] = []
    live: list[float] = []

    def scored(model: nn.Module) -> dict[str, float]:
        seen.append(model.classifier.bias[0].item())
        return {"accuracy": 0.5}

    model = tiny("bert")
    run = begin(model, [SWA(start=0.5), PlainSGD()], learning_rate=0.1, steps=4, score=scored)

    def after() -> None:
        live.append(model.classifier.bias[0].item())
        run.validate()
        assert model.classifier.bias[0].item() == live[-1]

    train(run, 0, 4, after)
    # No snapshot after the first two steps; then the third alone, then the mean of the third and the fourth.
    assert seen == pytest.approx([live[0], live[1], live[2], (live[2] + live[3]) / 2], abs=1e-7)
    assert seen[3] != live[3]
    assert run.notes == []
    run.finish()
    assert model.classifier.bias[0].item() == seen[3]


def test_validating_with_refreshed_statistics_changes_no_bit_of_the_training() -> None:
    sample, seen = [rows(10), rows(11)], []

    def scored(model: nn.Module) -> dict[str, float]:
        seen.append(buffers(model))
        return {"accuracy": 0.5}

    one, other = Normed(), Normed()
    often, never = (averaging(model, SWA(start=0.5, refresh=True), sample, scored) for model in (one, other))
    trail: list[dict[str, Tensor]] = []

    def look() -> None:
        trail.append(buffers(one))
        often.validate()
        assert all(torch.equal(value, trail[-1][name]) for name, value in buffers(one).items())
        assert all(module.training for module in one.modules())

    four(often, look)
    four(never)
    ours, theirs = one.state_dict(), other.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    # before the first snapshot the statistics are the training's own, afterwards those that were made
    assert torch.equal(seen[1]["blocks.1.running_mean"], trail[1]["blocks.1.running_mean"])
    assert not torch.equal(seen[3]["blocks.1.running_mean"], trail[3]["blocks.1.running_mean"])
    often.finish()
    assert all(torch.equal(value, buffers(one)[name]) for name, value in seen[3].items())


@pytest.mark.parametrize("broken", [False, True])
def test_after_a_refresh_momentum_and_modes_are_as_before(broken: bool) -> None:
    def sample() -> Iterator[Any]:
        yield rows(10)
        if broken:
            raise RuntimeError("the rows ended early")

    model = Normed(dropout=0.5)
    run = averaging(model, SWA(start=0.5, refresh=True), sample())
    four(run)
    modes = {name: number % 3 != 1 for number, (name, _) in enumerate(model.named_modules())}
    modes["blocks.1"] = modes[""] = True
    for name, module in model.named_modules():
        module.training = modes[name]
    entry = next(entry for entry in run.plan.entries if entry.name == "swa")
    with pytest.raises(RuntimeError, match="ended early") if broken else nullcontext():
        entry.ingredient.finish(model, run._context(entry))
    assert [norm.momentum for norm in model.blocks[1:]] == [0.3, 0.1]
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_a_norm_that_was_kept_quiet_keeps_its_statistics() -> None:
    """Below the lowest trainable weight nothing moved, so its statistics still fit."""
    model = Normed()
    before = buffers(model)
    run = begin(
        model, [Freeze(keep=("head", "top:1")), SWA(start=0.5, refresh=True), PlainSGD()], learning_rate=0.3, steps=4,
        loss=cross_entropy, sample=[rows(10), rows(11)], family=NORMED,
    )  # fmt: skip
    assert [norm.training for norm in model.blocks[1:]] == [False, True]
    four(run)
    run.finish()
    after = buffers(model)
    assert all(torch.equal(value, before[name]) for name, value in after.items() if name.startswith("blocks.1."))
    assert after["blocks.2.num_batches_tracked"] == 2


def test_without_training_rows_the_statistics_stay_and_it_is_told() -> None:
    model = Normed()
    run = averaging(model, SWA(start=0.5, refresh=True))
    four(run)
    before = buffers(model)
    run.finish()
    assert all(torch.equal(value, before[name]) for name, value in buffers(model).items())
    assert any(note.startswith("swa had no training rows") for note in run.notes)


def test_it_averages_behind_an_optimizer_that_comes_after_it_in_the_recipe() -> None:
    model = tiny("bert")
    run = begin(model, [SWA(start=0.5), PlainSGD()], learning_rate=0.1, steps=4)
    seen: list[dict[str, Tensor]] = []
    train(run, 0, 4, lambda: seen.append(weights(model)))
    run.finish()
    ends = weights(model)
    for name, value in ends.items():
        torch.testing.assert_close(value, (seen[2][name] + seen[3][name]) / 2)
    assert not torch.equal(ends["classifier.weight"], seen[3]["classifier.weight"])


def test_frozen_weights_are_neither_kept_nor_touched() -> None:
    model = tiny("bert")
    before = weights(model)
    run = begin(model, [Freeze(keep=("head",)), SWA(start=0.5)], learning_rate=1e-2, steps=4)
    train(run, 0, 4)
    kept = run.state_dict()["shelf"]["train/swa/average"]
    run.finish()
    assert set(kept) == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items() if name not in kept)


def test_the_rate_is_constant_from_the_start_on_and_ratios_between_weights_stay() -> None:
    model = tiny("bert")
    run = begin(model, [Anneal(shape="linear"), SWA(start=0.5, lr_factor=0.25)], learning_rate=0.8, steps=4)
    rates = [next(iter(run.rates.values()))]
    train(run, 0, 4, lambda: rates.append(next(iter(run.rates.values()))))
    # Linear: 1, 3/4 of 0.8; from step 2 of 4 on a quarter of 0.8 (the last is the rate of the step that does not come).
    assert rates == pytest.approx([0.8, 0.6, 0.2, 0.2, 0.2])


def test_each_weight_gets_the_factor_of_its_own_peak() -> None:
    @ingredient
    class Slow(Ingredient):
        """The head at a tenth of the rate."""

        def touches(self) -> tuple[Claim, ...]:
            return (scales(Place.LR),)

        def settings(self, table: Any) -> Any:
            return table.scale_lr(lambda row: 0.1 if row.part.role == "head" else 1.0)

    run = begin(tiny("bert"), [Slow(), SWA(start=0.5, lr_factor=0.5)], learning_rate=1.0, steps=2)
    train(run, 0, 1)
    assert sorted(set(run.rates.values())) == pytest.approx([0.05, 0.5])


def test_batch_norm_statistics_are_told_about() -> None:
    model = Weight(torch.zeros(1))
    model.norm = nn.BatchNorm1d(2)
    swa = SWA(start=0.1)
    ctx, optimizer = attached(swa, model, steps=2)
    for _ in range(2):
        optimizer.step()
        ctx.progress.step += 1
    swa.finish(model, ctx)
    assert any("batch norm" in note for note in ctx.notes)


def test_an_optimizer_that_lost_the_names_is_refused() -> None:
    parts: Any = None
    ctx = Context(parts, Progress(4), 0, "train/swa", SWA().touches(), Shelf(), [])
    with pytest.raises(RecipeError, match="must name the weights"):
        SWA().optimizer(SGD([nn.Parameter(torch.zeros(1))], lr=0.1), ctx)


def test_a_weight_that_is_gone_at_the_end_is_told() -> None:
    model = Weight(torch.zeros(1))
    swa = SWA(start=0.01)
    ctx, optimizer = attached(swa, model, steps=2)
    for _ in range(2):
        optimizer.step()
        ctx.progress.step += 1
    del model.weight
    with pytest.raises(ModelError, match="no longer in the model"):
        swa.finish(model, ctx)


def test_sharded_weights_are_averaged_shard_by_shard() -> None:
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    with mesh() as only:
        model = Weight(torch.zeros(4))
        model.weight = nn.Parameter(distribute_tensor(torch.zeros(4), only, [Shard(0)]))
        swa = SWA(start=0.01)
        ctx, optimizer = attached(swa, model, steps=4)
        for value in (9.0, 1.0, 2.0, 6.0):  # the mean of 1, 2 and 6 is 3
            with torch.no_grad():
                model.weight.fill_(value)
            optimizer.step()
            ctx.progress.step += 1
        held = model.weight
        swa.finish(model, ctx)
        assert model.weight is held
        assert isinstance(held, DTensor)
        assert held.to_local().tolist() == [3.0] * 4
