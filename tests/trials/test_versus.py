"""Recipes against each other: which runs are paired, and what is told where a metric is not defined. Outputs are written by hand."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from luthier.comparison import Setting
from luthier.core.ingredient import Outputs
from luthier.trials.outcome import outcome
from luthier.trials.pairs import Seen, versus

SETTING = Setting("data", "data", "model", {}, ("test",), "test", {})


def numbers(predictions, targets) -> dict[str, Outputs]:
    return {"test": Outputs(np.asarray(predictions)[:, None], np.asarray(targets))}


def a_grid(rng: np.random.Generator, *, side: int = 5, rows: int = 100) -> list[Seen]:
    """Two equal recipes, told by mae: standard deviations .02 of a recipe's heads and of its orders, .01 of the rest."""
    heads, orders = (0.02 * rng.standard_normal((2, side)) for _ in range(2))
    made = []
    for (at, recipe), head, order in product(enumerate(("a", "b")), range(side), range(side)):
        level = heads[at, head] + orders[at, order] + 0.01 * rng.standard_normal()
        gaps = 1.0 + level + 0.1 * rng.standard_normal(rows)
        made.append(Seen(recipe, (("head", head), ("order", order)), numbers(gaps, np.zeros(rows))))
    return made


def test_where_head_and_order_vary_apart_equal_recipes_are_told_apart_once_in_twenty_times():
    rng = np.random.default_rng(0)
    found = [versus(SETTING, a_grid(rng), ["a", "b"], "mae")[0] for _ in range(200)]
    # 5 % of 200 are 10, with a standard deviation of 3.1; taken for 25 seeds, the grids claim 70 times and cover 0 in 129.
    assert sum(one.claimed for one in found) <= 16
    assert sum(one.low <= 0 <= one.high for one in found) >= 184


def test_of_a_grid_those_runs_are_paired_that_are_there_and_share_nothing():
    runs = a_grid(np.random.default_rng(0), side=3)
    scores = {(run.recipe, run.seeds): -np.abs(run.outputs["test"].logits).mean() for run in runs}
    same = [(("head", number), ("order", number)) for number in range(3)]
    [pair] = versus(SETTING, runs, ["a", "b"], "mae")
    assert pair.by_seed == pytest.approx([scores["b", seeds] - scores["a", seeds] for seeds in same])
    left = [run for run in runs if (run.recipe, run.seeds) != ("a", same[1])]
    [pair] = versus(SETTING, left, ["a", "b"], "mae")
    assert pair.by_seed == pytest.approx([scores["b", seeds] - scores["a", seeds] for seeds in (same[0], same[2])])
    assert not versus(SETTING, [run for run in runs if run.seeds not in same], ["a", "b"], "mae")


@pytest.mark.parametrize("seeds", [1, 4])
@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_a_run_that_predicts_one_number_leaves_its_pairs_unclaimed_and_says_why(metric, seeds):
    rng = np.random.default_rng(0)
    targets = rng.standard_normal(40)

    def run(recipe: str, seed: int) -> Seen:
        predictions = targets + {"a": 0.1, "b": 1.0, "c": 5.0}[recipe] * rng.standard_normal(40)
        return Seen(
            recipe, (("seed", seed),), numbers(0 * targets if (recipe, seed) == ("b", 0) else predictions, targets)
        )

    made = versus(SETTING, [run(recipe, seed) for recipe in "abc" for seed in range(seeds)], ["a", "b", "c"], metric)
    by = {(one.one, one.other): one for one in made}
    assert math.isfinite(by["c", "a"].value) and by["c", "a"].comparisons == (
        1 if seeds == 1 else 3
    )  # all of the family count
    for pair in (by["b", "a"], by["c", "b"]):
        assert math.isnan(pair.value) and math.isnan(pair.low) and not pair.claimed
        assert [math.isnan(apart) for apart in pair.by_seed] == [True] + [False] * (seeds - 1)
        why = f"{metric} is not defined for 1 of {seeds} runs of b, where all predictions or all targets are the same"
        assert pair.sentence == f"nothing is claimed of {pair.one} and {pair.other} on test: {why}"
    assert by["b", "a"].sentence in outcome([*made, *[by["c", "a"]] * 8], metric, several=False)


def test_rows_too_few_for_an_interval_are_told():
    made = [Seen(recipe, (("seed", seed),), numbers([1.0], [0.5])) for recipe in "ab" for seed in range(3)]
    [pair] = versus(SETTING, made, ["a", "b"], "mae")
    assert "its rows give no interval of mae (rows must be 2 or more; got 1)" in pair.sentence
