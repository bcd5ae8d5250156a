"""Clusters: hulls and merges by hand, the bounds' proof, the same clusters from a slow rule, and a study that only looks."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import OptimizeResult, linprog, minimize

from luthier.errors import DataError
from luthier.studies import hulls
from luthier.studies.clusters import Clusters, LabelPair, Space, clusters, pearson, similarity, space, study
from luthier.studies.hulls import hull2hull, hull_distance, separable
from luthier.studies.linkage import reduced
from tests.tiny import tiny

Array = np.ndarray[Any, Any]
WIDE = np.array([[1.0, 6], [1, 3], [15, 3], [15, 6]])  # a box, and another 4 below it
SMALL = np.array([[1.0, -3], [1, -1], [2, -3], [2, -1]])
GRAIN = np.array([[0.0, 0], [0, 0.5], [0.5, 0], [0.5, 0.5], [0.2, 0.3], [0.1, 0.4]])


def xor() -> tuple[Array, Array]:
    """Six rows in each corner of a rectangle; the corners of label 1 are the nearer pair by a little, so they merge first."""
    corners = [(0.0, 0.0), (10.0, 10.0), (0.3, 9.7), (9.7, 0.3)]
    return np.vstack([GRAIN + corner for corner in corners]), np.repeat([0, 0, 1, 1], 6)


def cloud(seed: int, n: int, h: int) -> Array:
    return np.random.default_rng(seed).normal(size=(n, h))


def rotation(seed: int, h: int) -> Array:
    return np.asarray(np.linalg.qr(cloud(seed, h, h))[0])


def sizes(members: tuple[tuple[int, ...], ...], labels: Array) -> list[tuple[int, int]]:
    return sorted((int(labels[rows[0]]), len(rows)) for rows in members)


# By hand: hulls


def test_two_boxes_are_four_apart():
    # the lower edge of the one is y = 3, the upper edge of the other y = -1, and both have x from 1 to 2
    found = hull_distance(WIDE, SMALL)
    assert found.upper == pytest.approx(4, abs=1e-12) and found.lower == pytest.approx(4, abs=1e-12)
    assert found.normal == pytest.approx([0, 1], abs=1e-12)


def test_a_point_below_a_box_and_one_inside():
    assert hull2hull(np.array([[10.0, 0.0]]), WIDE) == pytest.approx(3, abs=1e-12)
    assert hull2hull(np.array([[10.0, 4.0]]), WIDE) == 0.0
    assert hull2hull(np.array([[18.0, 10.0]]), WIDE) == pytest.approx(5, abs=1e-12)  # a corner: 3, 4, 5


def test_a_point_over_a_triangle_lands_inside_it():
    # (1/3, 1/3, 1/3) is the foot of the origin: 1 / sqrt 3 away
    assert hull2hull(np.zeros((1, 3)), np.eye(3)) == pytest.approx(1 / math.sqrt(3), abs=1e-12)


def test_hulls_that_cross_or_touch_are_not_apart():
    cross = np.array([[-1.0, 0], [1, 0]]), np.array([[0.0, -1], [0, 1]])
    touch = np.array([[0.0, 0], [2, 0]]), np.array([[1.0, 0], [1, 5]])
    for one, other in (cross, touch):
        assert hull2hull(one, other) == 0.0 and not separable(one, other)
    assert hull2hull(touch[0], touch[1] + [0, 1e-3]) == pytest.approx(1e-3, abs=1e-9)
    assert separable(touch[0], touch[1] + [0, 1e-3])


def test_a_point_is_zero_from_itself():
    assert hull2hull(np.ones((2, 3)), np.ones((1, 3))) == 0.0 and not separable(np.ones((2, 3)), np.ones((1, 3)))


# By hand: clusters


def test_two_labels_on_two_sides_are_two_clusters():
    x, y = np.vstack([GRAIN, GRAIN + np.array([5, 0])]), np.repeat([3, 7], 6)
    assert clusters(x, y) == (tuple(range(6)), tuple(range(6, 12)))


def test_crossed_labels_are_three_clusters():
    # the diagonals cross: label 1 merges its nearer corners, and then the hull of label 0 would run through that
    x, y = xor()
    assert sizes(clusters(x, y), y) == [(0, 6), (0, 6), (1, 12)]


def test_labels_on_a_line_are_as_many_clusters_as_runs():
    x = np.arange(6.0)[:, None]
    assert len(clusters(x, np.array([0, 1, 0, 1, 0, 1]))) == 6
    assert clusters(x, np.array([0, 0, 1, 1, 0, 0])) == ((0, 1), (2, 3), (4, 5))
    assert clusters(x, np.array([0, 1, 1, 2, 2, 2])) == ((0,), (1, 2), (3, 4, 5))


def test_the_nearest_means_merge_first():
    # label 0 at 0, 3 and 4 (x), label 1 at (1.5, 0): 3 and 4 merge; 0 is left alone, for a hull from 0 to 3 or 4 would hold 1.5
    x = np.array([[0.0, 0], [3, 0], [4, 0], [1.5, 0]])
    assert clusters(x, np.array([0, 0, 0, 1])) == ((0,), (1, 2), (3,))


def test_one_vector_with_two_labels_is_refused_with_its_rows():
    x = np.array([[0.0, 1], [2, 3], [0, 1], [-0.0, 1], [5, 5]])
    with pytest.raises(DataError, match="labels 0 and 1 on the vector of rows 0 and 3"):
        clusters(x, np.array([0, 0, 0, 1, 1]))
    assert clusters(x, np.array([0, 1, 0, 0, 1])) == ((0, 2, 3), (1, 4))  # twice one row of one label is no fault


def test_rows_without_classes_or_numbers_are_refused():
    for labels in (np.zeros(2), np.zeros(3, dtype=int), np.zeros((2, 1), dtype=int)):
        with pytest.raises(DataError, match="one class number for each"):
            clusters(np.eye(2), labels)
    with pytest.raises(DataError, match="at least one row"):
        clusters(np.zeros((0, 2)), np.zeros(0, dtype=int))
    with pytest.raises(DataError, match="finite"):
        clusters(np.array([[0.0], [math.nan]]), np.array([0, 1]))


# By hand: spaces


def test_distances_and_widths_of_a_space():
    # label 0: rows 0 and 3 (mean and largest distance 3), label 1: rows 5, 6 and 8 (1, 2, 3: mean 2, largest 3): 2 apart
    found = space(np.array([[0.0], [3], [5], [6], [8]]), np.array([0, 0, 1, 1, 1]), least=2)
    zero, one = found.labels
    assert (zero.inside_mean, zero.inside_max, zero.outside_min) == pytest.approx((3, 3, 2))
    assert (one.inside_mean, one.inside_max, one.outside_min) == pytest.approx((2, 3, 2))
    assert (one.ratio_mean, one.ratio_max) == pytest.approx((1, 1.5))
    assert found.pairs == (LabelPair(0, 1, True, pytest.approx(2)),)
    assert found.separable and found.distance == pytest.approx(2)


def test_a_pair_s_distance_is_the_mean_over_its_clusters():
    # label 0 on both sides of label 1: 0, 1 | 3, 4 | 9, 10: hulls 2 and 5 apart
    found = space(np.array([[0.0], [1], [3], [4], [9], [10]]), np.array([0, 0, 1, 1, 0, 0]), least=2)
    assert found.pairs == (LabelPair(0, 1, False, pytest.approx(3.5)),)
    assert (found.labels[0].clusters, found.labels[1].clusters) == (2, 1)
    assert not found.separable


def test_small_clusters_count_for_no_distance():
    x, y = np.array([[0.0], [1], [3], [4], [9]]), np.array([0, 0, 1, 1, 0])
    assert space(x, y, least=2).distance == pytest.approx(2)  # 9 is alone: 1 to 3 is what is left
    assert space(x, y, least=1).distance == pytest.approx(3.5)
    nothing = space(x, y)
    assert nothing.distance is None and nothing.labels[0].inside_mean is None and nothing.labels[0].clusters == 2


def test_clusters_from_elsewhere_that_meet_here_are_zero_apart():
    x, y = np.arange(4.0)[:, None], np.array([0, 1, 0, 1])
    assert space(x, y, least=2, members=((0, 2), (1, 3))).distance == 0.0
    with pytest.raises(DataError, match="one label each"):
        space(x, y, least=2, members=((0, 1), (2, 3)))


def at_distances(*distances: float | None) -> Space:
    """Three labels, (0, 1), (0, 2) and (1, 2) apart."""
    made = space(np.array([[0.0, 0], [1, 0], [0, 1]]), np.array([0, 1, 2]), least=1)
    return replace(made, pairs=tuple(replace(pair, distance=d) for pair, d in zip(made.pairs, distances, strict=True)))


def test_spatial_similarity_by_hand():
    # (1, 2, 6) and (2, 1, 6) less their mean 3: (-2, -1, 3).(-1, -2, 3) = 13, both squares 14
    one = at_distances(1, 2, 6)
    assert pearson(one, at_distances(2, 1, 6)) == pytest.approx(13 / 14, abs=1e-14)
    assert pearson(one, one) == pytest.approx(1, abs=1e-14)
    assert pearson(one, at_distances(12, 22, 62)) == pytest.approx(1, abs=1e-14)
    assert pearson(one, at_distances(-1, -2, -6)) == pytest.approx(-1, abs=1e-14)


def test_spatial_similarity_needs_three_pairs_that_differ():
    assert pearson(at_distances(1, 2, 6), at_distances(1, 2, None)) is None
    assert pearson(at_distances(1, 2, 6), at_distances(3, 3, 3)) is None
    two = space(np.array([[0.0], [1]]), np.array([0, 1]), least=1)
    assert pearson(two, two) is None


# Invariants


@given(
    seed=st.integers(0, 9999), n=st.integers(1, 9), m=st.integers(1, 9), h=st.integers(1, 12),
    shift=st.sampled_from([0.0, 0.5, 2.0, 6.0]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_both_bounds_of_a_distance_hold_and_meet(seed: int, n: int, m: int, h: int, shift: float):
    a, b = cloud(seed, n, h), cloud(seed + 1, m, h)
    b[:, 0] += shift
    found = hull_distance(a, b)
    size = np.linalg.norm(np.vstack([a, b]) - np.vstack([a, b]).mean(axis=0), axis=1).max()
    assert 0 <= found.lower <= found.upper <= found.lower + 2e-9 * size
    assert separable(a, b) == (found.upper > 0)
    if found.upper:  # the normal proves the lower bound: all of a lies that far above all of b
        assert np.linalg.norm(found.normal) == pytest.approx(1)
        assert (a @ found.normal).min() - (b @ found.normal).max() == pytest.approx(found.lower, abs=1e-9 * size)
    assert hull2hull(b, a) == pytest.approx(found.upper, abs=2e-9 * size)


@given(seed=st.integers(0, 999), h=st.integers(2, 6), scale=st.sampled_from([1e-4, 3.0, 1e5]))
@settings(max_examples=15, deadline=None)
def test_turned_moved_and_scaled_rows_have_the_same_clusters_and_scaled_distances(seed: int, h: int, scale: float):
    x, y = cloud(seed, 16, h), np.arange(16) % 3
    one, other = space(x, y, least=2), space(scale * (x @ rotation(seed, h) + 2), y, least=2)
    assert one.members == other.members
    for pair, scaled in zip(one.pairs, other.pairs, strict=True):
        assert (pair.distance is None) == (scaled.distance is None)
        if pair.distance is not None:
            assert scaled.distance == pytest.approx(scale * pair.distance, rel=1e-6, abs=1e-7 * scale)
    for label, scaled in zip(one.labels, other.labels, strict=True):
        if label.inside_mean is not None:
            assert scaled.inside_mean == pytest.approx(scale * label.inside_mean, rel=1e-9)
    assert pearson(one, other) in (None, pytest.approx(1, abs=1e-6))


@given(seed=st.integers(0, 999), n=st.integers(4, 14), kinds=st.integers(2, 4), h=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_clusters_part_the_rows_keep_labels_apart_and_cannot_be_merged(seed: int, n: int, kinds: int, h: int):
    x, y = cloud(seed, n, h), np.arange(n) % kinds
    members = clusters(x, y)
    assert sorted(row for rows in members for row in rows) == list(range(n))
    assert all(len(set(y[list(rows)])) == 1 for rows in members)
    for one, other in combinations(members, 2):
        if y[one[0]] != y[other[0]]:
            assert separable(x[list(one)], x[list(other)])
        else:
            both = x[[*one, *other]]
            assert not all(separable(both, x[list(rows)]) for rows in members if y[rows[0]] != y[one[0]])
    whole = all(separable(x[y == a], x[y == b]) for a, b in combinations(range(kinds), 2))
    assert (len(members) == kinds) == whole


def slowly(x: Array, y: Array) -> tuple[tuple[int, ...], ...]:
    """The rule of ``clusters`` as it is told, each question asked of one linear programme and nothing remembered."""
    members, left = [(row,) for row in range(len(x))], set()

    def apart(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
        rows = np.vstack([-np.c_[x[list(one)], np.ones(len(one))], np.c_[x[list(other)], np.ones(len(other))]])
        found = linprog(np.zeros(x.shape[1] + 1), A_ub=rows, b_ub=-np.ones(len(rows)), bounds=(None, None))
        return bool(found.status == 0)

    def away(pair: tuple[tuple[int, ...], tuple[int, ...]]) -> float:
        return float(np.linalg.norm(x[list(pair[0])].mean(axis=0) - x[list(pair[1])].mean(axis=0)))

    while pairs := [two for two in combinations(members, 2) if y[two[0][0]] == y[two[1][0]] and two not in left]:
        one, other = min(pairs, key=away)
        both = tuple(sorted(one + other))
        if all(apart(both, rows) for rows in members if y[rows[0]] != y[one[0]]):
            members = sorted([rows for rows in members if rows not in (one, other)] + [both])
        else:
            left.add((one, other))
    return tuple(sorted(members))


@pytest.mark.parametrize("seed", range(5))
def test_clusters_are_those_of_the_slow_rule(seed: int):
    x, y = cloud(seed, 14, 2), np.arange(14) % 2
    assert clusters(x, y) == slowly(x, y)


# Parity


@pytest.mark.parametrize("seed", range(3))
def test_distance_is_that_of_a_general_solver(seed: int):
    # SLSQP on the weights of both hulls ends within 1e-6 of the least square
    a, b = cloud(seed, 6, 4), cloud(seed + 10, 5, 4) + 1.5

    def square(z: Array) -> float:
        return float(np.square(z[:6] @ a - z[6:] @ b).sum())

    sums = [{"type": "eq", "fun": lambda z: z[:6].sum() - 1}, {"type": "eq", "fun": lambda z: z[6:].sum() - 1}]
    start = np.r_[np.full(6, 1 / 6), np.full(5, 1 / 5)]
    best = minimize(
        square, start, bounds=[(0, 1)] * 11, constraints=sums, method="SLSQP", options={"ftol": 1e-14, "maxiter": 500}
    )
    assert hull2hull(a, b) == pytest.approx(math.sqrt(best.fun), abs=1e-5)


def test_distance_is_the_margin_of_a_support_vector_machine():
    from sklearn.svm import SVC

    a, b = cloud(0, 20, 3), cloud(1, 15, 3) + np.array([7, 0, 0])
    machine = SVC(kernel="linear", C=1e6, tol=1e-9).fit(np.vstack([a, b]), np.repeat([0, 1], [20, 15]))
    assert hull2hull(a, b) == pytest.approx(2 / np.linalg.norm(machine.coef_), rel=1e-6)


def test_where_highs_gives_up_a_hyperplane_decides(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hulls, "linprog", lambda *args, **named: OptimizeResult(status=4))
    monkeypatch.setattr(hulls, "_TRIES", 0)
    assert separable(WIDE, SMALL) and not separable(WIDE, WIDE + 1)


def test_rows_in_fewer_coordinates_are_as_far_apart():
    x = cloud(0, 9, 40)
    low = reduced(x)
    assert low.shape == (9, 8)
    between = np.linalg.norm(x[:, None] - x[None], axis=2)
    assert np.linalg.norm(low[:, None] - low[None], axis=2) == pytest.approx(between, abs=1e-12)


def test_two_hundred_wide_rows_are_quick():
    # thirty seconds for a space are allowed; it takes a tenth of a second
    begun = time.perf_counter()
    assert space(cloud(0, 200, 384), np.arange(200) % 2).separable
    assert time.perf_counter() - begun < 30


# The study


def batches(seed: int = 0, *, labels: int = 3) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(2):
        ids = torch.randint(3, 60, (9, 6), generator=draw)
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(9) % labels})
    return made


@pytest.fixture(scope="module")
def found() -> Clusters:
    return study(tiny("bert"), batches(), least=2)


@pytest.fixture(scope="module")
def later() -> Clusters:
    return study(tiny("bert", seed=1), batches(), least=2)


def test_each_layer_is_a_space_of_its_features(found: Clusters):
    from luthier.studies.features import features

    assert [one.name for one in found.spaces] == ["block 0", "block 1", "block 2", "head"]
    rows = features(tiny("bert"), batches())["block 1"]
    assert found.spaces[1] == space(rows, np.tile(np.arange(9) % 3, 2), name="block 1", least=2)
    assert (found.spaces[1].rows, found.spaces[1].width) == (18, 16)


def test_only_the_first_rows_are_looked_at():
    assert study(tiny("bert"), batches(), least=2, most=7).spaces[0].rows == 7


def test_a_study_changes_nothing():
    model = tiny("gpt2", dropout=0.3).train()
    before, drawn = {name: value.clone() for name, value in model.state_dict().items()}, torch.random.get_rng_state()
    study(model, batches(), least=2)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules()) and all(one.grad is None for one in model.parameters())
    assert all(one.requires_grad for one in model.parameters())
    assert torch.equal(drawn, torch.random.get_rng_state())


def test_rows_that_a_model_cannot_tell_apart_are_refused_with_the_layer():
    twice = [{name: value[:1].repeat(2, *[1] * (value.ndim - 1)) for name, value in batches()[0].items()}]
    twice[0]["labels"] = torch.tensor([0, 1])
    with pytest.raises(DataError, match="block 0  must not give one vector two labels.*rows 0 and 1"):
        study(tiny("bert"), twice)


def test_labels_must_be_there_and_be_classes():
    without = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches()]
    with pytest.raises(DataError, match="must have labels"):
        study(tiny("bert"), without)
    with pytest.raises(DataError, match="one class number"):
        study(tiny("bert"), [{**batch, "labels": batch["labels"].float()} for batch in batches()])


def test_similarity_is_told_by_layer(found: Clusters, later: Clusters):
    alike = similarity(found, later)
    assert alike["block 1"] == pearson(found.spaces[1], later.spaces[1])
    assert similarity(found, found) == {one.name: pytest.approx(1) for one in found.spaces}


def test_the_study_is_json_and_eighty_columns(found: Clusters, later: Clusters):
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["spaces"][0]["clusters"] == len(found.spaces[0].members)
    assert told["spaces"][0]["pairs"][0]["distance"] == found.spaces[0].pairs[0].distance
    for lines in (found.lines(), later.lines(before=found)):
        assert max(map(len, lines)) <= 80
        assert lines[4].startswith("block 1")
    assert "similar" in later.lines(before=found)[2] and "similar" not in found.lines()[2]


def test_a_study_of_few_rows_says_that_it_tells_little():
    few, many = study(tiny("bert"), batches()[:1], least=2), study(tiny("bert"), batches(), least=2)
    assert few.lines()[-1].startswith("Up to one row more than a layer is wide") and max(map(len, few.lines())) <= 80
    assert not many.lines()[-1].startswith("Up to one row")


def test_the_plot_is_the_same_bytes_twice_and_says_its_units(found: Clusters, later: Clusters):
    drawn = later.plot(before=found)
    assert drawn == later.plot(before=found)
    assert drawn.startswith("<svg ") and drawn.rstrip().endswith("</svg>")
    for word in ("clusters (number)", "hulls apart (L2)", "before", "after", "labels", "what the head reads"):
        assert word in drawn
    assert "before" not in found.plot() and "nearest pair" in found.plot()
