"""Runs of one recipe: summary, majority share and failed runs."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.errors import DataError
from luthier.statistics.runs import Summary, failed, majority_share, summary

# By hand


def test_mean_spread_worst_and_best_of_three_runs():
    # mean 2; squares of 1, 0 and 1 by n - 1 = 2: sd 1
    assert summary([1.0, 2.0, 3.0]) == Summary(seeds=3, mean=2.0, sd=1.0, worst=1.0, best=3.0)


def test_where_less_is_better_the_largest_is_the_worst():
    found = summary([0.5, 0.3], higher_is_better=False)
    assert (found.worst, found.best) == (0.5, 0.3)


def test_one_run_has_no_spread():
    assert summary([0.7]) == Summary(1, 0.7, None, 0.7, 0.7)


def test_the_majority_share_counts_the_most_frequent_label():
    assert majority_share([0, 1, 1, 2]) == 0.5
    assert majority_share(["yes", "yes", "no"]) == pytest.approx(2 / 3)


def test_runs_at_or_under_the_majority_share_failed_and_are_named_by_their_seed():
    share = majority_share(np.array([1, 1, 0]))
    at = np.mean([True, True, False])
    assert failed([0.9, at, 0.1, 0.67], share, seeds=(11, 12, 13, 14)) == (12, 13)
    assert failed([0.9, at], share) == (1,)


def test_of_errors_those_at_or_over_the_constants_failed():
    assert failed([0.9, 1.2, 1.5], 1.2, higher_is_better=False) == (1, 2)


# Refused


@pytest.mark.parametrize("scores", [[], [[0.1]], [0.1, float("nan")]])
def test_scores_that_are_no_row_of_numbers_are_refused(scores):
    with pytest.raises(DataError, match="scores"):
        summary(scores)


def test_seeds_that_do_not_fit_the_runs_are_refused():
    with pytest.raises(DataError, match="must name each of the 2 runs; got 1"):
        failed([0.1, 0.2], 0.5, seeds=(1,))
    with pytest.raises(DataError, match="labels"):
        majority_share([])
