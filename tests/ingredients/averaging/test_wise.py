"""WiSE-FT: the line from the stage's start to its end by hand, its two ends to the bit, and the choice on the validation rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from luthier.core.claims import Claim, Place, needs, owns, voids, wraps
from luthier.core.context import Context
from luthier.core.groups import groups_of
from luthier.core.ingredient import Ingredient, ingredient
from luthier.errors import ConflictError, RecipeError
from luthier.ingredients.averaging.best import Best
from luthier.ingredients.averaging.swa import SWA
from luthier.ingredients.averaging.wise import WiSE, between, grid
from luthier.ingredients.modules.lora import LoRA
from luthier.ingredients.settings.freeze import Freeze
from luthier.ingredients.surgery.mixout import Mixout
from luthier.ingredients.surgery.reinit import Reinit
from luthier.planning.compose import compose, skeleton
from luthier.recipe.recipe import Recipe, Stage
from luthier.run import Run, begin
from luthier.testing import check_ingredient
from tests.tiny import tiny

Values = dict[str, Tensor]


@ingredient
class PlainSGD(Ingredient):
    """Owns the optimizer; its steps are the gradient times the rate."""

    def touches(self) -> tuple[Claim, ...]:
        return (owns(Place.OPTIMIZER), owns(Place.STEP))

    def optimizer(self, inner: Optimizer, ctx: Context) -> Optimizer:
        return SGD(groups_of(inner), lr=1.0)


class Script:
    """A score that says what it is told, one after the other, and remembers the weights that it was asked about."""

    def __init__(self, *told: float | None, metric: str = "accuracy") -> None:
        self.told, self.metric = told, metric
        self.seen: list[Values] = []

    def __call__(self, model: nn.Module) -> Mapping[str, Any]:
        self.seen.append(weights(model))
        return {self.metric: self.told[len(self.seen) - 1]}


def batch(step: int) -> Values:
    draw = torch.Generator().manual_seed(step)
    return {
        "input_ids": torch.randint(3, 64, (4, 6), generator=draw),
        "labels": torch.randint(0, 3, (4,), generator=draw),
    }


def weights(model: nn.Module) -> Values:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def train(run: Run, steps: int = 3) -> Values:
    """Takes the stage's steps; returns the weights after the last."""
    for step in range(steps):
        run.loss(run.model, batch(step)).backward()
        run.step()
    return weights(run.model)


def staged(wise: WiSE, *others: Ingredient, score: Any = None) -> tuple[Values, Values, Values, Run]:
    """A stage of three steps: the weights at its start, after its last step, and when it is finished."""
    model = tiny("bert")
    start = weights(model)
    run = begin(model, [wise, PlainSGD(), *others], learning_rate=0.3, steps=3, score=score)
    end = train(run)
    run.finish()
    return start, end, weights(model), run


def same(one: Values, other: Values) -> bool:
    return list(one) == list(other) and all(torch.equal(value, other[name]) for name, value in one.items())


def on_the_line(start: Values, end: Values, alpha: float) -> Values:
    """The reference's formula, in double precision."""
    return {name: ((1 - alpha) * start[name].double() + alpha * end[name].double()).float() for name in start}


def close(one: Values, other: Values) -> None:
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=1e-7, rtol=1e-6, msg=name)


# By hand


def test_a_quarter_of_the_way_from_one_to_three_is_one_and_a_half() -> None:
    # 3/4 of 1 and 1/4 of 3; 3/4 of -2 and 1/4 of 2.
    assert between(torch.tensor([1.0, -2.0]), torch.tensor([3.0, 2.0]), 0.25).tolist() == [1.5, -1.0]


def test_eleven_coefficients_are_tenths() -> None:
    assert grid(11) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert (grid(11)[0], grid(11)[-1], grid(2)) == (0.0, 1.0, (0.0, 1.0))


def test_the_model_stands_a_quarter_of_its_way_from_the_start() -> None:
    start, end, after, _ = staged(WiSE(alpha=0.25))
    close(after, on_the_line(start, end, 0.25))
    assert not torch.equal(start["classifier.weight"], end["classifier.weight"])


# Identity


def test_at_one_nothing_changes_bit_for_bit() -> None:
    _, end, after, run = staged(WiSE(alpha=1.0))
    assert same(after, end)
    assert run.notes == []


def test_at_zero_it_is_the_start_of_the_stage_bit_for_bit() -> None:
    start, end, after, _ = staged(WiSE(alpha=0.0))
    assert same(after, start)
    assert not same(after, end)


def test_a_side_that_is_no_number_does_not_reach_the_other() -> None:
    start, end = torch.ones(2), torch.tensor([float("inf"), float("nan")])
    assert between(start, end, 0.0).tolist() == [1.0, 1.0]
    assert between(end, start, 1.0).tolist() == [1.0, 1.0]


# Invariants


@settings(max_examples=60, deadline=None)
@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.floats(0, 1))
def test_it_lies_on_the_line_and_backwards_is_the_same_line(first: float, last: float, alpha: float) -> None:
    """In double precision: a few roundings of numbers up to 2e3, each of one part in 2**53."""
    start, end = (torch.tensor([value], dtype=torch.float64) for value in (first, last))
    made = between(start, end, alpha)
    assert made.item() == pytest.approx((1 - alpha) * first + alpha * last, abs=1e-11)
    assert made.item() == pytest.approx(between(end, start, 1 - alpha).item(), abs=1e-11)
    assert min(first, last) - 1e-11 <= made.item() <= max(first, last) + 1e-11


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.7])
def test_weights_that_did_not_move_stay_bit_for_bit(alpha: float) -> None:
    start, _, after, _ = staged(WiSE(alpha=alpha), Freeze(keep=("head",)))
    assert {name for name in start if not torch.equal(start[name], after[name])} == {
        "classifier.weight",
        "classifier.bias",
    }


def test_half_precision_is_mixed_in_single_precision() -> None:
    """Numbers below 5 and three roundings to one part in 2**24: 1e-6. In bf16 each rounding would be one part in 256."""
    draw = torch.Generator().manual_seed(0)
    start, end = (torch.randn(4096, generator=draw).bfloat16() for _ in range(2))
    made = between(start, end, 0.3)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.double(), 0.7 * start.double() + 0.3 * end.double(), atol=1e-6, rtol=0)


# Parity


def test_it_is_the_authors_sum_of_the_two_state_dicts() -> None:
    """(1 - alpha) theta_0 + alpha theta_1 in double precision, over all weights; ours has one product less: 1e-14."""
    model = tiny("bert").double()
    theta_0 = weights(model)
    run = begin(model, [WiSE(alpha=0.4), PlainSGD()], learning_rate=0.3, steps=3)
    theta_1 = train(run)
    run.finish()
    for name, value in weights(model).items():
        torch.testing.assert_close(value, 0.6 * theta_0[name] + 0.4 * theta_1[name], atol=1e-14, rtol=0)
        torch.testing.assert_close(value, torch.lerp(theta_0[name], theta_1[name], 0.4), atol=1e-14, rtol=0)


# The choice


def test_the_best_of_the_grid_is_taken_and_it_is_told() -> None:
    script = Script(0.5, 0.6, 0.9, 0.7, 0.8)
    start, end, after, run = staged(WiSE(points=5), score=script)
    assert len(script.seen) == 5
    for alpha, seen in zip((0.0, 0.25, 0.5, 0.75, 1.0), script.seen, strict=True):
        close(seen, on_the_line(start, end, alpha))
    assert same(script.seen[0], start)
    assert same(script.seen[-1], end)
    assert same(after, script.seen[2])
    told = "wise: alpha 0.5 of 5 tried has the best accuracy on the validation rows (0.9); chosen by it, that score is optimistic"
    assert [note for note in run.notes if note.startswith(told)]


@pytest.mark.parametrize(("scores", "at"), [
    ((0.7, 0.9, 0.9, 0.9), 1),  # of equal ones the nearest to the start
    ((0.5, 0.5, 0.5, 0.5), 0),
    ((0.1, 0.2, 0.3, 0.4), 3),
    ((float("nan"), 0.2, float("nan"), 0.1), 1),  # what is not a number is never best, first or last
    ((0.2, float("inf"), 0.3, float("nan")), 2),
    ((None, None, 0.0, None), 2),  # a metric that is not defined there
])  # fmt: skip
def test_ties_go_to_the_start_and_what_is_no_number_is_never_taken(scores: Sequence[float | None], at: int) -> None:
    script = Script(*scores)
    _, _, after, _ = staged(WiSE(points=4), score=script)
    assert same(after, script.seen[at])


@pytest.mark.parametrize(("metric", "at"), [("rmse", 2), ("mae", 2), ("nll", 2), ("spearman", 0), ("f1_macro", 0)])
def test_less_error_is_better_and_more_agreement(metric: Any, at: int) -> None:
    script = Script(0.9, 0.4, 0.2, 0.6, metric=metric)
    _, _, after, _ = staged(WiSE(points=4, metric=metric), score=script)
    assert same(after, script.seen[at])


def test_where_no_score_is_a_number_the_end_stays_and_it_is_told() -> None:
    _, end, after, run = staged(WiSE(points=3), score=Script(float("nan"), None, float("nan")))
    assert same(after, end)
    assert run.notes == ["wise changed nothing: accuracy was never a number."]


def test_a_stage_that_ran_away_is_taken_back_to_its_start() -> None:
    def scored(model: nn.Module) -> dict[str, float]:
        return {"accuracy": 0.4 if all(bool(one.isfinite().all()) for one in model.parameters()) else float("nan")}

    model = tiny("bert")
    start = weights(model)
    run = begin(model, [WiSE(points=3)], steps=1, score=scored)
    train(run, 1)
    with torch.no_grad():
        model.classifier.weight.fill_(float("nan"))
        model.bert.pooler.dense.weight.fill_(float("inf"))
    run.finish()
    assert same(weights(model), start)


def test_a_choice_needs_validation_rows_and_a_given_coefficient_does_not() -> None:
    with pytest.raises(ConflictError, match="wise needs the validation rows, which the surroundings do not have"):
        begin(tiny("bert"), [WiSE()], steps=1)
    begin(tiny("bert"), [WiSE(alpha=0.5)], steps=1)


# Conformance


@pytest.mark.parametrize("one", [WiSE(alpha=0.5), WiSE(points=3)])
def test_it_keeps_the_contract(one: WiSE) -> None:
    check_ingredient(one)


def test_it_claims_validation_only_where_it_chooses() -> None:
    held = (wraps(Place.END_WEIGHTS), needs(Place.REFERENCE), needs(Place.WHOLE_WEIGHTS))
    assert WiSE(alpha=0.5).touches() == held
    assert WiSE().touches() == (*held, needs(Place.VALIDATION))


@pytest.mark.parametrize(
    "values", [{"alpha": 1.1}, {"alpha": -0.1}, {"alpha": float("nan")}, {"points": 1}, {"metric": "luck"}]
)
def test_values_off_the_line_are_refused(values: Any) -> None:
    with pytest.raises(RecipeError, match=next(iter(values))):
        WiSE(**values)


def test_a_start_that_is_drawn_at_random_is_refused_and_so_are_weights_in_pieces() -> None:
    with pytest.raises(ConflictError, match="wise needs the reference weights, which reinit does away with"):
        begin(tiny("bert"), [WiSE(alpha=0.5), Reinit()], steps=1)
    recipe = Recipe(name="x", stages=(Stage(ingredients=(WiSE(alpha=0.5),), steps=1),))
    with pytest.raises(ConflictError, match="wise needs whole weights on every process"):
        compose(recipe, skeleton(tiny("bert")), voids=[voids(Place.WHOLE_WEIGHTS)])


# It matters


@pytest.mark.parametrize("wise_first", [True, False])
def test_with_swa_the_line_ends_at_the_average(wise_first: bool) -> None:
    model = tiny("bert")
    start, seen = weights(model), []
    pair: list[Any] = [WiSE(alpha=0.5), SWA(start=0.5)]
    run = begin(model, [*(pair if wise_first else pair[::-1]), PlainSGD()], learning_rate=0.3, steps=4)
    for step in range(4):
        run.loss(run.model, batch(step)).backward()
        run.step()
        seen.append(weights(model))
    run.finish()
    average = {name: (seen[2][name].double() + seen[3][name].double()) / 2 for name in start}
    close(weights(model), on_the_line(start, average, 0.5))
    assert not torch.allclose(model.classifier.weight, on_the_line(start, seen[3], 0.5)["classifier.weight"])


def test_with_best_the_line_ends_at_the_step_that_scored_best() -> None:
    script = Script(0.2, 0.9, 0.3)
    start, _, after, _ = staged(WiSE(alpha=0.5), Best(every=1), score=script)
    close(after, on_the_line(start, script.seen[1], 0.5))


@pytest.mark.parametrize("wise_first", [True, False])
def test_with_lora_the_adapter_is_merged_before(wise_first: bool) -> None:
    merged, model = tiny("bert"), tiny("bert")
    start = weights(model)
    pair: list[Any] = [WiSE(alpha=0.5), LoRA(r=2)]
    for one, ingredients in ((merged, [LoRA(r=2)]), (model, pair if wise_first else pair[::-1])):
        run = begin(one, ingredients, learning_rate=0.05, steps=3)
        for step in range(3):
            run.loss(run.model, batch(step)).backward()
            run.step()
        run.finish()
    end, after = weights(merged), weights(model)
    assert list(after) == list(start)
    close(after, on_the_line(start, end, 0.5))
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(end[query], start[query])


def test_with_mixout_the_start_is_what_mixout_pulls_to() -> None:
    start, _, after, run = staged(WiSE(alpha=0.0), Mixout(p=0.5))
    assert same(after, start)
    assert list(run.model.state_dict()) == list(tiny("bert").state_dict())


def test_of_a_later_stage_the_start_is_what_the_stage_before_left() -> None:
    model = tiny("bert")
    first = begin(model, [Freeze(), PlainSGD()], learning_rate=0.3, steps=3)
    train(first)
    first.finish()
    between_stages = weights(model)
    second = begin(model, [WiSE(alpha=0.0), PlainSGD()], learning_rate=0.3, steps=3)
    train(second)
    second.finish()
    assert same(weights(model), between_stages)
