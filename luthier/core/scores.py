"""Scores of probabilities, and the temperature that repairs them. Pure functions of arrays, in double precision."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, Any]
BINS = 15
LOWEST, HIGHEST = 0.05, 20.0  # temperatures beyond these say that validation cannot tell


# The metrics of a split, and whether more of them is better.
HIGHER_IS_BETTER: dict[str, bool] = {
    "accuracy": True,
    "f1_macro": True,
    "mcc": True,
    "auroc": True,
    "nll": False,
    "brier": False,
    "ece": False,
    "rmse": False,
    "mae": False,
    "pearson": True,
    "spearman": True,
}
Metric = Literal["accuracy", "f1_macro", "mcc", "auroc", "nll", "brier", "ece", "rmse", "mae", "pearson", "spearman"]


def better(value: float | None, best: float | None, *, higher: bool) -> bool:
    """Whether ``value`` is strictly better than ``best``; what is not a number is never better.

    Args:
        value: None where the metric is not defined.
        best: None where there is none yet.
    """
    if value is None or not math.isfinite(value):
        return False
    return best is None or (value > best if higher else value < best)


def log_softmax(logits: Array) -> Array:
    """log p_ik = z_ik - log sum_j exp z_ij, shape (n, k), float64."""
    wide = np.asarray(logits, dtype=np.float64)
    shifted = wide - wide.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def softmax(logits: Array) -> Array:
    """p_ik, shape (n, k), float64; rows sum to one."""
    return np.asarray(np.exp(log_softmax(logits)))


def nll(logits: Array, labels: Array) -> float:
    """Mean negative log-likelihood of the labels, nats."""
    return float(-log_softmax(logits)[np.arange(len(labels)), labels].mean())


def brier(logits: Array, labels: Array) -> float:
    """Mean over rows of sum_k (p_ik - [y_i = k])^2, in [0, 2]."""
    likely = softmax(logits)
    likely[np.arange(len(labels)), labels] -= 1.0
    return float(np.square(likely).sum(axis=1).mean())


@dataclass(frozen=True)
class Bin:
    """Predictions whose confidence lies in (low, high]: how many, how confident, how often right."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def reliability(logits: Array, labels: Array, bins: int = BINS) -> tuple[Bin, ...]:
    """Equal-width bins of the confidence max_k p_ik; right-closed, and zero belongs to the first. Empty bins have zeros."""
    likely = softmax(logits)
    confidence = likely.max(axis=1)
    right = likely.argmax(axis=1) == labels
    number = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    made = []
    for at in range(bins):
        inside = number == at
        count = int(inside.sum())
        mean, share = (float(confidence[inside].mean()), float(right[inside].mean())) if count else (0.0, 0.0)
        made.append(Bin(at / bins, (at + 1) / bins, count, mean, share))
    return tuple(made)


def ece(logits: Array, labels: Array, bins: int = BINS) -> float:
    """Expected calibration error: sum_m |B_m| / n * |accuracy(B_m) - confidence(B_m)|.

    Source: Guo, Pleiss, Sun, Weinberger, ICML 2017, section 2; arXiv:1706.04599.
    Differs: nothing; bins are equal in width, right-closed, and confidence 0 is in the first.
    """
    made = reliability(logits, labels, bins)
    return sum(one.count * abs(one.accuracy - one.confidence) for one in made) / len(labels)


def mce(logits: Array, labels: Array, bins: int = BINS) -> float:
    """Maximum calibration error: the largest gap of a bin that is not empty."""
    return max(abs(one.accuracy - one.confidence) for one in reliability(logits, labels, bins) if one.count)


@dataclass(frozen=True)
class Temperature:
    """A fitted temperature.

    Args:
        value: T; predictions are softmax(z / T).
        nll_before, nll_after: on the rows it was fitted on, nats.
        at_bound: whether the best T lies outside what is searched, so that ``value`` is only the bound.
    """

    value: float
    nll_before: float
    nll_after: float
    at_bound: bool


def fit_temperature(logits: Array, labels: Array) -> Temperature:
    """T = argmin_T mean NLL(z / T), to 1e-6 in log T.

    The NLL is convex in b = 1/T with derivative mean_i (E_p[z_i] - z_i,y_i), p = softmax(b z_i); its root is bracketed and found by
    Brent's method.

    Args:
        logits: shape (n, k).
        labels: shape (n,), class numbers.
    Source: Guo et al., ICML 2017, section 4.2; arXiv:1706.04599.
    Differs: they take fifty steps of L-BFGS on T; we find the root of the derivative, which is unique.
    """
    from scipy.optimize import brentq

    wide = np.asarray(logits, dtype=np.float64)
    chosen = wide[np.arange(len(labels)), labels]

    def slope(log_t: float) -> float:
        scaled = wide * np.exp(-log_t)
        return float((chosen - (softmax(scaled) * wide).sum(axis=1)).mean())

    low, high = np.log(LOWEST), np.log(HIGHEST)
    before = nll(wide, labels)
    # In log T the slope of the NLL has the sign of (mean chosen logit) - (mean expected logit): below zero, T is too small.
    at_low, at_high = slope(low), slope(high)
    if at_low == at_high == 0.0:
        return Temperature(1.0, before, before, at_bound=True)  # all logits alike: no T changes anything
    bound = at_low >= 0 or at_high <= 0
    log_t = (low if at_low >= 0 else high) if bound else brentq(slope, low, high, xtol=1e-9)
    value = float(np.exp(log_t))
    return Temperature(value, before, nll(wide / value, labels), bool(bound))
