"""The runs of one recipe over seeds: mean, spread, worst and best, and which of them failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.statistics.arrays import refuse, vector

_EXACT = 1e-12  # two ways to divide the same counts differ by less; two counts of fewer than 1e11 rows by more


@dataclass(frozen=True)
class Summary:
    """Scores of one recipe over seeds.

    Args:
        seeds: how many.
        sd: of one run (divisor n - 1), not of the mean; None with one seed.
        worst, best: of the runs, by the metric's own direction.
    """

    seeds: int
    mean: float
    sd: float | None
    worst: float
    best: float


def summary(scores: Any, *, higher_is_better: bool = True) -> Summary:
    """Mean, standard deviation, worst and best of ``scores``, shape (seeds,).

    Failed runs count like any other: leaving them out would praise the recipe that fails most. ``failed`` names them.
    """
    values = vector(scores, "scores")
    low, high = float(values.min()), float(values.max())
    worst, best = (low, high) if higher_is_better else (high, low)
    sd = float(values.std(ddof=1)) if len(values) > 1 else None
    return Summary(len(values), float(values.mean()), sd, worst, best)


def majority_share(labels: Any) -> float:
    """The share of the most frequent label: the accuracy of who always says it.

    Args:
        labels: shape (rows,), class numbers or names.
    """
    if not len(labels):
        raise refuse("labels", "must have a row", "none")
    _, counts = np.unique(np.asarray(labels), return_counts=True)
    return float(counts.max() / counts.sum())


def failed(
    scores: Any, baseline: float, *, seeds: Sequence[int] | None = None, higher_is_better: bool = True
) -> tuple[int, ...]:
    """The seeds whose run failed: accuracy at or under the share of the majority class, or an error at or over a constant's.

    Args:
        scores: shape (seeds,), of the same rows as ``baseline``.
        baseline: see ``majority_share``; of a regression, the RMSE of always answering the mean of the training labels.
        seeds: their numbers; 0, 1, 2, ... without.
    Source: Mosbach, Andriushchenko, Klakow, ICLR 2021 (arXiv:2006.04884): a run that ends at or below the
        majority class' accuracy has failed.
    Differs: of regressions the article says nothing.
    """
    values = vector(scores, "scores")
    numbers = tuple(range(len(values))) if seeds is None else tuple(seeds)
    if len(numbers) != len(values):
        raise refuse("seeds", f"must name each of the {len(values)} runs", len(numbers))
    sign = 1 if higher_is_better else -1
    return tuple(number for number, value in zip(numbers, values, strict=True) if sign * (value - baseline) <= _EXACT)
