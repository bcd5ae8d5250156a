"""Prediction sets: which classes cannot be ruled out, by a threshold with a promise.

Pure functions of arrays in double precision. n is the number of rows (at least one), k the number of classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from luthier.core.decimals import decimal, whole
from luthier.core.scores import Array


def conformal_scores(likely: Array, how: Literal["lac", "aps"], *, chance: Array | None = None) -> Array:
    """How badly each class fits its row, shape (n, k), in [0, 1].

    ``lac``: 1 - p_ik. ``aps``: the classes from the likeliest down to k, summed: sum of p_ij over j before k, plus u_i p_ik.
    Among equal probabilities the lower class number comes first.

    Args:
        likely: shape (n, k), probabilities.
        chance: u of ``aps``, shape (n,), in [0, 1]: drawn evenly, sets are as small as they may be and can be empty; None is 1.
    Source: ``lac``: Sadinle, Lei, Wasserman, JASA 2019 (arXiv:1609.00451). ``aps``: Romano, Sesia, Candes, NeurIPS 2020
        (arXiv:2006.02544).
    Differs: sets are ``score <= threshold`` for both, so that one threshold rule serves; ``aps`` is not random unless asked.
    """
    if how == "lac":
        return np.asarray(1.0 - likely)
    order = np.argsort(-likely, axis=1, kind="stable")
    ranked = np.take_along_axis(likely, order, axis=1)
    reached = np.cumsum(ranked, axis=1)
    reached[:, -1] = 1.0  # whatever rounding made of it: the last class completes the sum
    if chance is not None:
        before = np.concatenate([np.zeros((len(likely), 1)), reached[:, :-1]], axis=1)
        reached = before + chance[:, None] * (reached - before)
    scores = np.empty_like(reached)
    np.put_along_axis(scores, order, reached, axis=1)
    return scores


def conformal_threshold(scores: Array, alpha: float) -> float:
    """The ceil((n + 1)(1 - alpha))-th smallest score: the quantile at level ceil((n + 1)(1 - alpha)) / n.

    A new row that is exchangeable with these has a score at or below it with a chance of at least 1 - alpha, and of at most
    1 - alpha + 1 / (n + 1) when no two scores are alike: over the draw of these rows and the new one together.

    Args:
        scores: shape (n,), of each row's true class.
        alpha: share of sets that may miss, read as the decimal number it is written as.
    Returns:
        infinity where (n + 1) alpha < 1: so few rows allow no miss, and every set is full.
    Source: Vovk, Gammerman, Shafer, Algorithmic Learning in a Random World, 2005; Lei et al., JASA 2018 (arXiv:1604.04173).
    Differs: nothing.
    """
    n = len(scores)
    rank = n + 1 - whole((n + 1) * decimal(alpha))
    if rank < 1:
        return -float("inf")
    return float(np.partition(scores, rank - 1)[rank - 1]) if rank <= n else float("inf")


def coverage_range(n: int, alpha: float, level: float = 0.9) -> tuple[float, float]:
    """Where the coverage on endless new rows lies for a share ``level`` of all draws of the n rows that gave the threshold.

    For scores without ties the coverage has the distribution Beta(n + 1 - l, l), l = floor((n + 1) alpha).

    Returns:
        (low, high), shares; (1, 1) where every set is full.
    Source: Vovk, Conditional validity of inductive conformal predictors, ACML 2012 (arXiv:1209.2673).
    Differs: nothing.
    """
    from scipy.stats import beta

    missed = whole((n + 1) * decimal(alpha))
    if not missed:
        return 1.0, 1.0
    low, high = beta.ppf([(1 - level) / 2, (1 + level) / 2], n + 1 - missed, missed)
    return float(low), float(high)


@dataclass(frozen=True)
class Sets:
    """Prediction sets by a threshold that was found.

    Args:
        score: see ``conformal_scores``.
        threshold: a set holds every class whose score is not above it.
    """

    score: Literal["lac", "aps"]
    threshold: float

    def of(self, likely: Array) -> Array:
        """Whether each class is in its row's set, shape (n, k).

        Args:
            likely: shape (n, k), the probabilities as the model gives them, before any calibration.
        """
        return np.asarray(conformal_scores(likely, self.score) <= self.threshold)
