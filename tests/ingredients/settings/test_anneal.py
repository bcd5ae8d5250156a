"""anneal: the shape of the learning rate over a stage."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import LuthierError
from luthier.ingredients.settings.anneal import Anneal, shape
from luthier.ingredients.settings.llrd import LLRD
from luthier.run import begin
from luthier.testing import check_ingredient
from tests.tiny import tiny


def trace(ingredient, steps: int, *others) -> list[list[float]]:
    """The rates of all groups before each step, at a peak of 1."""
    run = begin(tiny("bert"), [ingredient, *others], learning_rate=1.0, steps=steps)
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in run.optimizer.param_groups])
        run.optimizer.step()
        run.schedule.step()
        run.advance()
    return rates


def test_by_hand_linear_with_warm_up():
    # 10 steps, 2 of warm-up: 0, 1/2, 1, then down by 1/8 a step
    expected = [0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert [rates[0] for rates in trace(Anneal(shape="linear", warmup=0.2), 10)] == pytest.approx(expected, abs=1e-15)


def test_by_hand_cosine_is_half_way_down_in_the_middle():
    factor = shape("cosine", warmup=0.0, end=0.0)
    assert factor(0.0) == 1.0
    assert factor(0.5) == pytest.approx(0.5, abs=1e-15)
    assert factor(1 / 3) == pytest.approx((1 + math.cos(math.pi / 3)) / 2, abs=1e-15)
    assert factor(1.0) == pytest.approx(0.0, abs=1e-15)
    assert shape("linear", warmup=0.0, end=0.2)(0.5) == pytest.approx(0.6, abs=1e-15)


def test_constant_without_warm_up_changes_nothing():
    assert trace(Anneal(shape="constant"), 5) == trace(LLRD(decay=1.0), 5)


@given(
    st.sampled_from(["constant", "linear", "cosine"]),
    st.floats(0, 0.9),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_the_factor_stays_between_nothing_and_the_peak(kind, warmup, end, fraction):
    factor = shape(kind, warmup=warmup, end=end)
    assert -1e-12 <= factor(fraction) <= 1 + 1e-12
    if fraction >= warmup:
        assert factor(fraction) >= min(end, 1.0) - 1e-9 or kind == "constant"


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_parity_with_transformers(kind):
    """Equal but for the rounding of step/steps: 1e-12."""
    steps, warm = 50, 5
    make = {
        "linear": transformers.get_linear_schedule_with_warmup,
        "cosine": transformers.get_cosine_schedule_with_warmup,
    }[kind]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = make(optimizer, num_warmup_steps=warm, num_training_steps=steps)
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert [rates[0] for rates in trace(Anneal(shape=kind, warmup_steps=warm), steps)] == pytest.approx(
        expected, abs=1e-12
    )


def test_ratios_between_groups_hold_at_every_step():
    rates = trace(Anneal(shape="cosine", warmup=0.3), 12, LLRD(decay=0.5))
    first = rates[4]
    for row in rates[1:]:
        assert [one / row[0] for one in row] == pytest.approx([one / first[0] for one in first], rel=1e-12)


def test_warm_up_steps_beyond_the_stage_are_refused():
    with pytest.raises(LuthierError, match="must be below the stage's 5 steps; got 5"):
        begin(tiny("bert"), [Anneal(warmup_steps=5)], steps=5)


def test_values_out_of_bounds_are_told_together():
    with pytest.raises(LuthierError) as caught:
        Anneal(shape="steep", warmup=1.0, end=-1)  # type: ignore[arg-type]
    assert [fault.where for fault in caught.value.faults] == ["anneal.shape", "anneal.warmup", "anneal.end"]


def test_it_keeps_its_promises():
    check_ingredient(Anneal(warmup=0.3))


def test_it_matters():
    assert trace(Anneal(), 5) != trace(LLRD(decay=1.0), 5)
