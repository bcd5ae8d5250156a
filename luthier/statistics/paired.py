"""One recipe minus another over the same seeds and the same test rows, and an interval that other seeds and other rows are in.

The model of the differences d_si of seed s and row i: d_si = mu + seed_s + row_i + rest_si, all three random. Seeds and rows are
crossed: all seeds are scored on the same rows, so that more seeds do not make the rows' part of the error any smaller.

Source: Obuchowski, Rockette, Communications in Statistics - Simulation and Computation 24, 1995; Hillis, Statistics in Medicine
26, 2007 (readers of x-ray cases; here a seed is a reader and a test row a case).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from luthier.core.scores import Array
from luthier.statistics.arrays import finite, refuse, share, table
from luthier.statistics.resample import row_resamples

# Row numbers, with repeats -> the scores of all seeds on these rows, shape (seeds,). For macro F1 and the like.
Scorer = Callable[[Array], Any]


@dataclass(frozen=True)
class Difference:
    """One recipe minus another, larger is better.

    Args:
        by_seed: the difference of the scores on all rows, for each seed.
        rows: test rows behind each.
        shared: the variance of ``mean`` that all seeds have in common because their rows are the same; no seed lessens it.
        noise: the variance of one seed's difference that is its own on each row; 0 where it is not known.
    """

    by_seed: tuple[float, ...]
    rows: int
    shared: float
    noise: float = 0.0

    @property
    def seeds(self) -> int:
        return len(self.by_seed)

    @property
    def mean(self) -> float:
        return math.fsum(self.by_seed) / self.seeds

    @property
    def sd(self) -> float:
        """Of the difference from seed to seed (divisor n - 1)."""
        return float(np.std(np.subtract(self.by_seed, self.by_seed[0]), ddof=1))  # equal differences have exactly none

    @property
    def spread(self) -> float:
        """``sd``, and at least what noise makes of it: a few seeds may agree by chance, all the more in a metric of few steps."""
        return max(self.sd, math.sqrt(self.noise))


def row_variances(differences: Array) -> tuple[float, float]:
    """What rows do to the mean over them: ``shared`` and ``noise`` of a ``Difference``.

    shared = max(0, sum_{s != t} cov_i(d_si, d_ti) / (S (S - 1))) / N is (MS_rows - MS_rest) / (S N) of the two-way analysis of variance
    and estimates var(row_i) / N; noise = sum_s var_i(d_si) / (S N) - shared is MS_rest / N and estimates var(rest_si) / N.

    Args:
        differences: shape (seeds, rows), at least (2, 2).
    Source: Hillis 2007, Cov2 - Cov3 of the difference, never below zero.
    """
    seeds, rows = differences.shape
    centred = differences - differences.mean(axis=1, keepdims=True)
    everything = np.square(centred.sum(axis=0)).sum()  # sum over all pairs of seeds, s = t too
    own = float(np.square(centred).sum())
    shared = max(0.0, float(everything - own) / ((rows - 1) * seeds * (seeds - 1))) / rows
    return shared, max(0.0, own / ((rows - 1) * seeds * rows) - shared)


def difference(one: Any, other: Any) -> Difference:
    """The difference of two recipes whose metric is a mean over rows: accuracy, minus the squared error, log-likelihood.

    Args:
        one: shape (seeds, rows), bool (right or wrong) or float, larger is better.
        other: the same shape: row k is the run of the same seed, column i the same test row.
    Raises:
        DataError: the shapes differ, fewer than 2 seeds or 2 rows, or a score that is not finite.
    """
    mine, theirs = table(one, "one"), table(other, "other")
    if mine.shape != theirs.shape:
        raise refuse("other", f"must be paired with one, shape {mine.shape}", f"shape {theirs.shape}")
    _enough(*mine.shape)
    apart = mine - theirs
    return Difference(tuple(apart.mean(axis=1).tolist()), apart.shape[1], *row_variances(apart))


def difference_by(one: Scorer, other: Scorer, rows: int, *, resamples: int = 1000, seed: int = 0) -> Difference:
    """The difference of two recipes by a metric that is no mean over rows: macro F1, RMSE, a correlation.

    ``shared`` is then the mean covariance between two seeds' differences over ``resamples`` bootstraps of the rows, the same rows for
    both recipes and all seeds, and ``noise`` the rest of their variance.

    Args:
        one, other: numbers of rows, with repeats -> scores of all seeds, larger is better (minus the RMSE).
        rows: how many there are.
        seed: of the bootstrap.
    Raises:
        DataError: scores that cannot be paired, or that are not finite on some resample.
    """
    whole = np.arange(rows)
    mine, theirs = (finite(np.asarray(score(whole), dtype=np.float64), "scores") for score in (one, other))
    if mine.ndim != 1 or mine.shape != theirs.shape:
        raise refuse("other", f"must be paired with one, shape {mine.shape}", f"shape {theirs.shape}")
    _enough(len(mine), rows)
    drawn = row_resamples(lambda at: np.asarray(one(at)) - np.asarray(other(at)), rows, resamples=resamples, seed=seed)
    moves = np.cov(drawn, rowvar=False)  # shape (seeds, seeds)
    seeds = len(mine)
    shared = max(0.0, float(moves.sum() - np.trace(moves)) / (seeds * (seeds - 1)))
    noise = max(0.0, float(np.trace(moves)) / seeds - shared)
    return Difference(tuple((mine - theirs).tolist()), rows, shared, noise)


@dataclass(frozen=True)
class Interval:
    """Where the difference lies for other seeds and other test rows.

    Args:
        value: the difference seen; low, high: of the interval.
        error: the standard error, of seeds and rows together.
        freedom: the degrees of freedom of its t distribution.
        p: two-sided, of no difference; it and ``low``, ``high`` tell the same.
    """

    value: float
    low: float
    high: float
    error: float
    freedom: float
    p: float


def freedom(of_seeds: float, shared: float, seeds: int, rows: float = math.inf) -> float:
    """(v + c)^2 / (v^2 / (S - 1) + c^2 / (N - 1)); infinite where nothing varies.

    Args:
        of_seeds: v, the variance of the mean as the spread of the seeds has it: var(d_s) / S.
        shared: c, see ``Difference``.
    Source: Hillis 2007, ddf_H: (v + c)^2 / (v^2 / (S - 1)).
    Differs: the second term; it keeps a t distribution where the test rows are few and the seeds agree.
    """
    loss = of_seeds**2 / (seeds - 1) + shared**2 / (rows - 1)
    return (of_seeds + shared) ** 2 / loss if loss > 0 else math.inf


def interval(found: Difference, *, level: float = 0.95) -> Interval:
    """mean +- t sqrt(v + shared), v = var(d_s) / S with Hillis' degrees of freedom, or v = noise / S with (S - 1)(N - 1): the wider one.

    With differences that vary by seed only it is the paired t interval; with differences that vary by row only, the t interval over
    rows. It is the interval of the house: a bootstrap that resamples 3 or 5 seeds is too narrow (see ``resample``). In simulations the 95 %
    interval covers .93 to .97 with 2 seeds and more, for scores and for accuracies, and .97 to .99 where there is noise only.

    Args:
        level: in (0, 1).
    Source: Hillis 2007; the confidence interval of the difference of two treatments.
    Differs: see ``freedom``. The noise is ours: two recipes that part on a few rows have, in a metric of few steps, the same difference
        with each of a few seeds too often; var(d_s) is then 0, and p with it, which no correction for many comparisons lessens.
    """
    share(level, "level")
    seeds, rows, mean = found.seeds, found.rows, found.mean
    ways = [_error(found.sd**2 / seeds, seeds - 1, found)]
    if found.noise:
        ways.append(_error(found.noise / seeds, (seeds - 1) * (rows - 1), found))
    half, error, free = max((float(stats.t.ppf((1 + level) / 2, free)) * error, error, free) for error, free in ways)
    p = max(2 * float(stats.t.sf(abs(mean) / error, free)) if error else float(mean == 0) for error, free in ways)
    return Interval(mean, mean - half, mean + half, error, free, p)


def _error(of_seeds: float, many: int, found: Difference) -> tuple[float, float]:
    """The standard error and its degrees of freedom, where those of ``of_seeds`` are ``many``."""
    return math.sqrt(of_seeds + found.shared), freedom(of_seeds, found.shared, many + 1, found.rows)


def _enough(seeds: int, rows: int) -> None:
    if seeds < 2:
        raise refuse("seeds", "must be 2 or more", seeds, "Run more seeds; mcnemar compares two single runs.")
    if rows < 2:
        raise refuse("rows", "must be 2 or more", rows)
