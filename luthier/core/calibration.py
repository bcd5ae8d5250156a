"""Calibration beyond one temperature: what reads logits otherwise than they are, and what it gains on rows it has not seen.

Pure functions of arrays in double precision. n is the number of rows (at least one), k the number of classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from luthier.core.scores import Array, log_softmax, nll, softmax

if TYPE_CHECKING:
    from luthier.core.ingredient import Outputs

Table = tuple[tuple[float, ...], tuple[float, ...]]
Repair = Callable[[Array], Array]  # logits -> logits, both of shape (n, k)
SETTLED = 1e-6  # largest slope, in nats, at which a fit counts as converged
ROUNDING = 1e-9  # nats; a gain below this is none


def unfit(split: Outputs | None) -> str:
    """Why a split cannot be calibrated on, as the rest of a sentence; empty when it can."""
    if split is None or not len(split.targets):
        return "needs validation rows; there are none"
    if split.logits.ndim != 2 or split.logits.shape[1] < 2 or not np.issubdtype(split.targets.dtype, np.integer):
        return "is for classification; these predictions are numbers"
    if not np.isfinite(split.logits).all():
        return "needs logits that are finite numbers; some are not"
    return ""


def held_out_nll(
    fit: Callable[[Array, Array], Repair], logits: Array, labels: Array, *, folds: int = 2, seed: int = 0
) -> float:
    """Mean NLL, nats, of every row under a repair fitted on the folds of the rows that it is not in.

    Each class is dealt to all folds alike. Compared with the NLL of the same rows without a repair it says which of the two to use.
    As a choice that is sound: it is unbiased for a repair fitted on n (1 - 1 / folds) rows, and when it errs because both are nearly
    alike, little is lost. It is no test of significance. It leans to doing nothing, the more the fewer the folds, since the repair
    that is used is fitted on all n rows and is better than those of the folds. The lower of the two values is, once chosen, too low
    by luck: what a repair is worth is told by other rows. It shares the faults of the rows: if they chose the checkpoint, or are
    near copies of each other, a fold is not independent of what is fitted on the others.

    Args:
        fit: (logits, labels) -> a function of logits; called once a fold.
        logits: shape (n, k).
        labels: shape (n,), class numbers.
        folds: at least 2.
        seed: of the deal.
    Returns:
        infinity when there are fewer rows than folds.
    Source: Stone, J. R. Stat. Soc. B 36, 1974: cross-validatory choice.
    Differs: he leaves out single rows.
    """
    n = len(labels)
    if n < folds:
        return float("inf")
    shuffled = np.random.default_rng(seed).permutation(n)
    fold = np.empty(n, dtype=int)
    fold[shuffled[np.argsort(np.asarray(labels)[shuffled], kind="stable")]] = np.arange(n) % folds
    total = 0.0
    for number in range(folds):
        out = fold == number
        repair = fit(logits[~out], labels[~out])
        total += nll(repair(logits[out]), labels[out]) * int(out.sum())
    return total / n


@dataclass(frozen=True)
class Vector:
    """A fitted vector scaling.

    Args:
        scale: w, one number a class.
        shift: b, one number a class; predictions are softmax(z * w + b).
        nll_before, nll_after: on the rows it was fitted on, nats, without the penalty.
        converged: whether the slope of what is minimised is at most 1e-6 everywhere.
    """

    scale: tuple[float, ...]
    shift: tuple[float, ...]
    nll_before: float
    nll_after: float
    converged: bool


def fit_vector(logits: Array, labels: Array, *, strength: float = 1.0, most: int = 1000) -> Vector:
    """w, b = argmin mean NLL(z * w + b) + strength / (2 n) * (|w - 1|^2 + |b|^2), by L-BFGS from w = 1, b = 0.

    The problem is convex, and with a strength above 0 has one minimum. The penalty is a normal prior around no change with variance
    1 / strength for each number; it fades as n grows. Without it there is no minimum when some w, b gets every row right.

    Args:
        logits: shape (n, k).
        labels: shape (n,), class numbers.
        strength: at least 0.
        most: iterations.
    Source: Guo, Pleiss, Sun, Weinberger, ICML 2017, section 4.2 (arXiv:1706.04599): matrix scaling with a diagonal matrix.
    Differs: they have no penalty.
    """
    from scipy.optimize import minimize

    wide = np.asarray(logits, dtype=np.float64)
    (n, k), rows = wide.shape, np.arange(len(wide))
    identity = np.concatenate([np.ones(k), np.zeros(k)])

    def value_and_slope(at: Array) -> tuple[float, Array]:
        log_likely = log_softmax(wide * at[:k] + at[k:])
        pull = np.exp(log_likely)
        pull[rows, labels] -= 1.0
        slope = np.concatenate([(pull * wide).sum(axis=0), pull.sum(axis=0)]) + strength * (at - identity)
        value = -log_likely[rows, labels].sum() + strength / 2 * np.square(at - identity).sum()
        return float(value / n), slope / n

    options = {"maxiter": most, "maxfun": 4 * most, "ftol": 0.0, "gtol": SETTLED / 100}
    at = minimize(value_and_slope, identity, jac=True, method="L-BFGS-B", options=options).x
    settled = bool(np.abs(value_and_slope(at)[1]).max() <= SETTLED)
    after = nll(wide * at[:k] + at[k:], labels)
    return Vector(tuple(at[:k].tolist()), tuple(at[k:].tolist()), nll(wide, labels), after, settled)


def fit_isotonic(likely: Array, labels: Array, *, floor: float = 0.0) -> tuple[Table, ...]:
    """For each class the non-decreasing f_k that minimises sum_i (f_k(p_ik) - [y_i = k])^2, as a table of points.

    Rows with the same p_ik (to 1e-15) are one point that counts as many times. Between two points f_k is a straight line, outside
    them constant.

    Args:
        likely: shape (n, k), probabilities.
        labels: shape (n,), class numbers.
        floor: values are kept in [floor, 1 - floor], at most 1/2. At 0 a chance may be 0, and the NLL of a new row infinite.
    Returns:
        for each class (x, y), equally long: x increasing, y non-decreasing.
    Source: Zadrozny, Elkan, KDD 2002 (one against the rest, normalised); doi:10.1145/775047.775151.
    Differs: they read f_k as a step function; ours is linear between points, as in scikit-learn, whose fit it is. The floor is ours.
    """
    from sklearn.isotonic import IsotonicRegression

    tables = []
    for number in range(likely.shape[1]):
        column = np.asarray(likely[:, number], dtype=np.float64)
        fit = IsotonicRegression(y_min=0.0, y_max=1.0).fit(column, (np.asarray(labels) == number).astype(np.float64))
        y = np.clip(fit.y_thresholds_, floor, 1 - floor)
        tables.append((tuple(fit.X_thresholds_.tolist()), tuple(y.tolist())))
    return tuple(tables)


def through(tables: Sequence[Table], likely: Array) -> Array:
    """q_ik = f_k(p_ik) / sum_j f_j(p_ij), shape (n, k); rows sum to one. A row whose f are all 0 gets 1 / k everywhere.

    Args:
        tables: one a class, as ``fit_isotonic`` gives them.
        likely: shape (n, k), probabilities.
    Source: Zadrozny, Elkan, KDD 2002 (doi:10.1145/775047.775151).
    Differs: they do not say what becomes of a row of zeros; 1 / k is scikit-learn's answer (CalibratedClassifierCV).
    """
    read = np.stack([np.interp(likely[:, at], x, y) for at, (x, y) in enumerate(tables)], axis=1)
    total = read.sum(axis=1, keepdims=True)
    return np.asarray(np.where(total > 0, read / np.where(total > 0, total, 1.0), 1.0 / len(tables)))


def through_logits(tables: Sequence[Table], logits: Array) -> Array:
    """log q with q = ``through(tables, softmax(z))``, shape (n, k); a q of 0 counts as the smallest normal number, 2.2e-308."""
    return np.asarray(np.log(np.maximum(through(tables, softmax(logits)), np.finfo(np.float64).tiny)))
