"""Run: a loop written by hand, the order of its parts, waking, stopping and going on, and the traps that were met."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from luthier.core.claims import Claim, Place, needs, owns, wraps
from luthier.core.closure import Closure
from luthier.core.context import Context
from luthier.core.groups import groups_of
from luthier.core.ingredient import Ingredient, ingredient
from luthier.core.table import ParamTable
from luthier.errors import CheckpointError, ModelError, RunError
from luthier.ingredients.averaging.swa import SWA
from luthier.ingredients.gradients.clip import Clip
from luthier.ingredients.optimizers.adamw import AdamW
from luthier.ingredients.optimizers.mezo import MeZO
from luthier.ingredients.optimizers.sam import SAM
from luthier.ingredients.settings.anneal import Anneal
from luthier.ingredients.settings.freeze import Freeze
from luthier.planning.compose import compose, skeleton
from luthier.recipe.recipe import Recipe, Stage
from luthier.run import Run, begin
from tests.tiny import tiny


@ingredient
class PlainSGD(Ingredient):
    """Owns the optimizer; hides no factor of the gradient."""

    @classmethod
    def name(cls) -> str:
        return "plain_sgd"

    def touches(self) -> tuple[Claim, ...]:
        return (owns(Place.OPTIMIZER), owns(Place.STEP))

    def optimizer(self, inner: Optimizer, ctx: Context) -> Optimizer:
        return SGD(groups_of(inner), lr=1.0)


@ingredient
class Thaw(Ingredient):
    """The embeddings learn from a share of the stage on."""

    at: Annotated[float, Field(ge=0, le=1)] = 0.5

    @classmethod
    def name(cls) -> str:
        return "thaw_embeddings"

    def touches(self) -> tuple[Claim, ...]:
        return (owns(Place.TRAINABLE, "embeddings"),)

    def settings(self, table: ParamTable) -> ParamTable:
        return table.sleep(lambda row: ((0.0, self.at),) if row.part.role == "embeddings" else ())


def listener(called: str, heard: list[str], *claims: Claim, **hooks: Callable[..., Any]) -> Ingredient:
    """An ingredient that writes down which of its hooks are called, and then does what ``hooks`` say."""

    class Listener(Ingredient):
        @classmethod
        def name(cls) -> str:
            return called

        def touches(self) -> tuple[Claim, ...]:
            return claims

        def surgery(self, model: nn.Module, ctx: Context) -> None:
            heard.append(f"{called} surgery")
            hooks.get("surgery", lambda model, ctx: None)(model, ctx)

        def optimizer(self, inner: Optimizer, ctx: Context) -> Optimizer:
            heard.append(f"{called} optimizer")
            made: Optimizer = hooks.get("optimizer", lambda inner, ctx: inner)(inner, ctx)
            return made

        def finish(self, model: nn.Module, ctx: Context) -> None:
            heard.append(f"{called} finish")

    return ingredient(Listener)()


def batch(step: int, rows: int = 4) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {
        "input_ids": torch.randint(3, 64, (rows, 6), generator=draw),
        "labels": torch.randint(0, 3, (rows,), generator=draw),
    }


def train(run: Run, first: int, last: int) -> None:
    for step in range(first, last):
        run.loss(run.forward, batch(step)).backward()
        run.step()


def equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models hold the same weights and buffers, to the bit."""
    expected = other.state_dict()
    return all(torch.equal(value, expected[name]) for name, value in one.state_dict().items())


# Equal to a loop written by hand


def test_a_run_is_the_loop_one_would_write_by_hand_bit_for_bit() -> None:
    ours, theirs = tiny("bert"), tiny("bert")
    run = begin(ours, [Anneal(shape="linear", warmup=0.2), AdamW(), Clip(max_norm=0.5)], learning_rate=1e-2, steps=10)
    train(run, 0, 10)
    run.finish()

    still = ("bias", "LayerNorm.weight")
    named = list(theirs.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [weight for name, weight in named if not name.endswith(still)], "weight_decay": 0.01},
        {"params": [weight for name, weight in named if name.endswith(still)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    # Up from 0 over 2 steps of 10, then straight down to 0.
    schedule = LambdaLR(optimizer, lambda step: step / 10 / 0.2 if step < 2 else 1 - (step / 10 - 0.2) / (1 - 0.2))
    theirs.train()
    for step in range(10):
        theirs(**batch(step)).loss.backward()
        torch.nn.utils.clip_grad_norm_([weight for group in groups for weight in group["params"]], 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert equal(ours, theirs)


def test_gradients_that_were_there_before_the_run_are_not_stepped_with() -> None:
    fresh, used = tiny("bert"), tiny("bert")
    used(**batch(7)).loss.backward()
    for model in (fresh, used):
        train(begin(model, [AdamW()], learning_rate=1e-2, steps=2), 0, 1)
    assert equal(fresh, used)


@pytest.mark.parametrize(("one", "name"), [(SAM(rho=0.5), "sam"), (MeZO(), "mezo")])
def test_a_step_that_is_replaced_must_be_offered_and_each_offer_is_good_for_one(one: Ingredient, name: str) -> None:
    model = tiny("bert")
    run = begin(model, [one], learning_rate=1e-2, steps=4)
    run.loss(model, batch(0)).backward()
    with pytest.raises(RunError, match=rf"as {name} replaces the step.  Say run.offer\(run.closure\(batch\)\)"):
        run.step()
    assert run.progress.step == 0
    assert equal(model, tiny("bert"))
    run.offer(run.closure(batch(0)))
    run.step()
    assert not equal(model, tiny("bert"))
    with pytest.raises(RunError, match="must come after run.offer"):
        run.step()


def test_a_step_that_was_offered_is_the_step_of_the_loss() -> None:
    offered, plain = tiny("bert"), tiny("bert")
    first, second = begin(offered, [], learning_rate=1e-2, steps=4), begin(plain, [], learning_rate=1e-2, steps=4)
    train(second, 0, 4)
    for step in range(4):
        first.offer(first.closure(batch(step)))
        first.step()
    assert equal(offered, plain)


def test_the_stage_ends_in_eval_mode_and_trains_with_what_is_frozen_below_quiet() -> None:
    model = tiny("bert", dropout=0.5)
    run = begin(model, [Freeze(keep=("head", "bridge"))], steps=2)
    dropouts = {name: module.training for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    assert not any(training for name, training in dropouts.items() if name.startswith("bert."))
    assert dropouts["dropout"]  # it stands between the pooler, which learns, and the classifier
    train(run, 0, 2)
    run.finish()
    assert not any(module.training for module in model.modules())


# Order


def test_owners_come_first_and_the_rest_as_written() -> None:
    heard: list[str] = []
    begin(
        tiny("bert"),
        [
            listener("clip", heard, wraps(Place.GRADIENT)),
            listener("average", heard, owns(Place.END_WEIGHTS)),
            listener("start", heard, owns(Place.START_WEIGHTS)),
            listener("inject", heard, wraps(Place.MODULES)),
            listener("galore", heard, owns(Place.OPTIMIZER)),
        ],
        steps=1,
    )
    heard = heard[2:]  # the skeleton's: what claims modules operates and finishes on it when the plan is made
    assert next(told for told in heard if "surgery" in told) == "start surgery"
    assert [told for told in heard if "optimizer" in told] == [
        "galore optimizer",
        "clip optimizer",
        "start optimizer",
        "inject optimizer",
        "average optimizer",
    ]


def test_finish_runs_backwards_and_what_was_injected_comes_out_last() -> None:
    heard: list[str] = []
    names = ("inject", wraps(Place.MODULES)), ("one", wraps(Place.LOSS)), ("other", wraps(Place.GRADIENT))
    run = begin(tiny("bert"), [listener(name, heard, claim) for name, claim in names], steps=1)
    heard.clear()
    run.finish()
    assert heard == ["other finish", "one finish", "inject finish"]


def test_the_reference_is_taken_after_the_start_weights_are_set_and_is_not_the_live_weight() -> None:
    seen: list[tuple[float, float]] = []

    def reset(model: nn.Module, ctx: Context) -> None:
        with torch.no_grad():
            model.classifier.weight.fill_(7.0)  # type: ignore[union-attr, operator]

    def look(model: nn.Module, ctx: Context) -> None:
        with torch.no_grad():
            model.classifier.weight.fill_(8.0)  # type: ignore[union-attr, operator]
        kept = ctx.reference["classifier.weight"]
        seen.append((kept.mean().item(), model.classifier.weight.mean().item()))  # type: ignore[union-attr, operator]

    begin(
        tiny("bert"),
        [
            listener("reader", [], needs(Place.REFERENCE), surgery=look),
            listener("reinit", [], owns(Place.START_WEIGHTS), surgery=reset),
        ],
        steps=1,
    )
    assert seen == [(7.0, 8.0)]


# Waking


def test_weights_wake_at_the_step_that_was_said_and_not_before() -> None:
    model = tiny("bert")
    run = begin(model, [Thaw(at=0.5), PlainSGD()], learning_rate=0.1, steps=4)
    sleeper, first = (
        model.get_parameter("bert.embeddings.word_embeddings.weight"),
        model.get_parameter("classifier.bias"),
    )
    moved = []
    for step in range(4):
        before = sleeper.detach().clone(), first.detach().clone()
        train(run, step, step + 1)
        moved.append((not torch.equal(sleeper, before[0]), not torch.equal(first, before[1])))
    # Half of four steps are over after step 2: it is steps 3 and 4 that move the embeddings.
    assert moved == [(False, True), (False, True), (True, True), (True, True)]


def test_what_sleeps_has_no_gradient_and_costs_no_backward_pass() -> None:
    model = tiny("bert")
    run = begin(model, [Thaw(at=1.0)], steps=4)
    run.loss(model, batch(0)).backward()
    asleep = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert asleep
    assert all(name.startswith("bert.embeddings.") for name in asleep)


# Stopping and going on


def stopped_and_resumed(make: Callable[[], list[Ingredient]], *, at: int) -> tuple[nn.Module, nn.Module]:
    """(a run of eight steps in one piece, the same in two)."""
    whole, first, second = tiny("bert"), tiny("bert"), tiny("bert")
    train(unbroken := begin(whole, make(), learning_rate=1e-2, steps=8), 0, 8)
    unbroken.finish()
    train(stopped := begin(first, make(), learning_rate=1e-2, steps=8), 0, at)
    resumed = begin(second, make(), learning_rate=1e-2, steps=8)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(stopped.state_dict())
    train(resumed, at, 8)
    resumed.finish()
    return whole, second


@pytest.mark.parametrize("at", [1, 4, 7])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(at: int) -> None:
    whole, again = stopped_and_resumed(lambda: [Anneal(warmup=0.25), Clip(max_norm=0.1), SWA(start=0.5)], at=at)
    assert equal(whole, again)


def test_a_run_that_was_stopped_after_weights_woke_goes_on_bit_for_bit() -> None:
    whole, again = stopped_and_resumed(lambda: [Thaw(at=0.25)], at=4)
    assert equal(whole, again)


def test_the_state_survives_being_written_to_disk(tmp_path: Any) -> None:
    run = begin(tiny("bert"), [SWA(start=0.25)], steps=4)
    train(run, 0, 3)
    torch.save(run.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = begin(tiny("bert"), [SWA(start=0.25)], steps=4)
    again.load_state_dict(state)
    assert again.progress.step == 3
    assert again.rates == run.rates
    assert int(again.state_dict()["shelf"]["train/swa/count"]["count"]) == 2  # of steps 2 and 3


def test_the_state_of_another_recipe_is_refused() -> None:
    state = begin(tiny("bert"), [Freeze()], steps=4).state_dict()
    with pytest.raises(CheckpointError, match="not of stage 'train'"):
        begin(tiny("bert"), [], steps=4).load_state_dict(state)


def test_a_model_that_was_not_planned_for_is_refused() -> None:
    recipe = Recipe(name="trial", stages=(Stage(steps=1),))
    plan = compose(recipe, skeleton(tiny("bert", layers=3)))
    with pytest.raises(ModelError, match="must be in the plan and in the model alike"):
        Run(plan.stages[0], tiny("bert", layers=2), seed=0)


# Traps that were met


def test_trap_1_an_average_of_bf16_weights_comes_back_in_single_precision() -> None:
    # Optimizer.load_state_dict casts state to the weight's type, which would round the average at every stop.
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = SGD([weight], lr=0.1)
    optimizer.state[weight]["average"] = torch.full((1,), 1 + 2**-12)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[weight]["average"].dtype == torch.bfloat16  # the trap is still there

    model, second = tiny("bert").bfloat16(), tiny("bert").bfloat16()
    run = begin(model, [SWA(start=0.25)], learning_rate=1e-2, steps=8)
    train(run, 0, 6)
    again = begin(second, [SWA(start=0.25)], learning_rate=1e-2, steps=8)
    again.load_state_dict(run.state_dict())
    kept, expected = (one.state_dict()["shelf"]["train/swa/average"] for one in (again, run))
    assert all(value.dtype == torch.float32 for value in kept.values())
    assert all(torch.equal(value, expected[name]) for name, value in kept.items())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in kept.values())  # bf16 would have lost some


def test_trap_2_gradient_edits_see_the_gradient_of_this_step() -> None:
    # step(closure) would run the hooks before the closure, on the last step's gradient, or on none.
    seen: list[Tensor] = []

    def hook(inner: Optimizer, ctx: Context) -> Optimizer:
        def look(optimizer: Optimizer, args: Any, named: Any) -> None:
            weights = {
                name: one
                for group in optimizer.param_groups
                for name, one in zip(group["names"], group["params"], strict=True)
            }
            seen.append(weights["classifier.bias"].grad.clone())

        inner.register_step_pre_hook(look)
        return inner

    model = tiny("bert")
    run = begin(
        model, [listener("edit", [], wraps(Place.GRADIENT), optimizer=hook), PlainSGD()], learning_rate=0.1, steps=3
    )
    for step in range(3):
        (expected,) = torch.autograd.grad(model(**batch(step)).loss, [model.get_parameter("classifier.bias")])
        run.offer(run.closure(batch(step)))
        run.step()
        assert torch.equal(seen[step], expected)
    assert not torch.equal(seen[0], seen[1])


def test_trap_4_a_step_of_uneven_micro_batches_is_the_step_of_the_whole_batch() -> None:
    # Adam divides by the size of the gradient and so hides a wrong factor; SGD does not.
    parts, whole = tiny("bert").double(), tiny("bert").double()
    rows = batch(0, rows=6)
    first, second = {name: value[:2] for name, value in rows.items()}, {name: value[2:] for name, value in rows.items()}
    divided = begin(parts, [PlainSGD()], learning_rate=0.1, steps=1)
    divided.offer(Closure(divided.forward, divided.loss, [first, second], shares=[2 / 6, 4 / 6]))
    divided.step()
    at_once = begin(whole, [PlainSGD()], learning_rate=0.1, steps=1)
    at_once.offer(at_once.closure(rows))
    at_once.step()
    expected = dict(whole.named_parameters())
    for name, weight in parts.named_parameters():
        # Sums in another order, in double precision.
        torch.testing.assert_close(weight, expected[name], atol=1e-14, rtol=0)


def test_trap_5_a_probe_leaves_berts_pooler_alone() -> None:
    model = tiny("bert")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    train(run := begin(model, [Freeze(keep=("head",))], learning_rate=1e-2, steps=2), 0, 2)
    run.finish()
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == {"classifier.weight", "classifier.bias"}


def test_trap_7_an_average_written_before_an_owner_of_the_optimizer_still_averages() -> None:
    model = tiny("bert")
    run = begin(model, [SWA(start=0.5), PlainSGD()], learning_rate=0.1, steps=4)
    seen = []
    for step in range(4):
        train(run, step, step + 1)
        seen.append(model.get_parameter("classifier.weight").detach().clone())
    run.finish()
    torch.testing.assert_close(model.get_parameter("classifier.weight").detach(), (seen[2] + seen[3]) / 2)
    assert not torch.equal(seen[2], seen[3])
