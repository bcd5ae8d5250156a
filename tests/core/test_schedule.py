"""Schedules are pure functions of the fraction of the stage."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.schedule import Constant, Cosine, Linear, Product, Switch, WarmUp


def test_by_hand():
    assert Linear()(0.25) == 0.75
    assert Linear(0.5)(1.0) == 0.5
    assert Cosine()(0.5) == pytest.approx(0.5)
    assert WarmUp(0.2, Linear())(0.1) == pytest.approx(0.5)
    assert WarmUp(0.2, Linear())(0.6) == pytest.approx(0.5)
    assert Switch(0.75, Linear(), Constant(0.3))(0.75) == 0.3
    assert Switch(0.75, Linear(), Constant(0.3))(0.5) == 0.5
    assert Product(Constant(0.5), Linear())(0.5) == 0.25


@given(st.floats(0, 1), st.floats(0.01, 0.99))
def test_warm_up_is_continuous_where_it_ends(end, share):
    schedule = WarmUp(share, Linear(end))
    assert schedule(share) == pytest.approx(1.0)
    assert schedule(share - 1e-9) == pytest.approx(1.0, abs=1e-6)


@given(st.floats(0, 1), st.floats(0, 1))
def test_cosine_is_symmetric_about_its_middle(end, fraction):
    schedule = Cosine(end)
    assert schedule(fraction) + schedule(1 - fraction) == pytest.approx(1 + end)


def test_equal_schedules_are_equal_and_can_be_hashed():
    one = WarmUp(0.1, Switch(0.5, Linear(), Constant(0.2)))
    assert one == WarmUp(0.1, Switch(0.5, Linear(), Constant(0.2)))
    assert len({one, WarmUp(0.1, Switch(0.5, Linear(), Constant(0.2)))}) == 1
    assert not math.isnan(one(1.0))
