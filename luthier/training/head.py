"""The linear probe, solved: a convex problem on features that do not change.

Source: Kumar, Raghunathan, Jones, Ma, Liang, ICLR 2022 (arXiv:2202.10054): L-BFGS logistic regression on normalised features, the
strength of the penalty chosen on validation.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.core.scores import Array, nll

STRENGTHS = tuple(float(value) for value in np.logspace(-4, 3, 15))
ALPHAS = tuple(float(value) for value in np.logspace(-4, 6, 21))
_FOLDS = 5
_SMALL = 50_000_000  # multiplications a pass below which waking a second thread costs more than it saves: thirty times, on two cores
_NEVER = 30.0  # how far below the least likely class the bias of a class without rows lies: e**-30 of probability


@dataclass(frozen=True)
class Probe:
    """A solved head: logits = features @ weight.T + bias.

    Args:
        weight: shape (k, h), float64.
        bias: shape (k,); zeros when it was solved without intercept.
        strength: the chosen C (classification: inverse penalty) or alpha (regression: penalty).
        path: (strength, validation score) for each strength tried: accuracy, or root mean squared error.
        iterations: of the chosen fit.
        converged: whether that fit ended at its tolerance; those of the search may have stopped at ``max_iter``.
    """

    weight: Array
    bias: Array
    strength: float
    path: tuple[tuple[float, float], ...]
    iterations: int
    converged: bool

    def arrays(self) -> dict[str, Array]:
        """The same as arrays."""
        told = {
            "strength": self.strength,
            "path": self.path,
            "iterations": self.iterations,
            "converged": self.converged,
        }
        return {"weight": self.weight, "bias": self.bias, **{name: np.array(value) for name, value in told.items()}}

    @classmethod
    def of(cls, kept: Mapping[str, Array]) -> Probe:
        """What ``arrays`` told."""
        path = tuple((float(strength), float(score)) for strength, score in kept["path"])
        numbers = float(kept["strength"]), path, int(kept["iterations"]), bool(kept["converged"])
        return cls(kept["weight"], kept["bias"], *numbers)


@dataclass(frozen=True)
class _Scale:
    """Two scalars from the training features: z = (x - mean) / spread."""

    mean: float
    spread: float

    @classmethod
    def of(cls, features: Array, *, centred: bool) -> _Scale:
        spread = float(features.std())
        return cls(float(features.mean()) if centred else 0.0, spread if spread > 0 else 1.0)

    def __call__(self, features: Array) -> Array:
        return np.asarray((features - self.mean) / self.spread)

    def undo(self, weight: Array, bias: Array) -> tuple[Array, Array]:
        """W (x - m) / s + c = V x + b with V = W / s, b = c - (m / s) rowsum(W)."""
        return weight / self.spread, bias - self.mean / self.spread * weight.sum(axis=1)


def solve_classification(
    features: Array,
    labels: Array,
    *,
    classes: int,
    validation: tuple[Array, Array] | None = None,
    strengths: Sequence[float] | None = None,
    max_iter: int = 1000,
    intercept: bool = True,
) -> Probe:
    """Multinomial logistic regression, min_W  C * sum_i CE(W z_i + c, y_i) + |W|^2 / 2, on features z scaled by two scalars.

    Args:
        features: shape (n, h).
        labels: shape (n,), class numbers below ``classes``; not all classes need occur.
        validation: (features, labels) on which C is chosen: highest accuracy, then lowest NLL, then the smallest C. None: by 5-fold
            cross-validation where every class has five rows, else C = 1.
        strengths: the values of C, ascending; each fit starts from the one before.
        intercept: False for heads without a bias.
    Differs: Kumar et al. break ties of accuracy by the smallest C; with few validation rows many C tie, and the NLL tells more. A class
        without training rows gets weight zero and a bias 30 below the lowest, not zero: its probability is nil, as the solver's is.
    """
    wide = np.asarray(features, dtype=np.float64)
    labels = np.asarray(labels)
    tried = tuple(strengths or STRENGTHS)
    scale = _Scale.of(wide, centred=intercept)
    if validation is not None:
        held = [(scale(wide), labels, scale(np.asarray(validation[0], dtype=np.float64)), np.asarray(validation[1]))]
    else:
        held = _folds(scale(wide), labels)
        tried = tried if held else (1.0,)
    scores = _search(held, tried, classes, max_iter, intercept) if held else [(0.0, 0.0)]
    best = max(range(len(tried)), key=lambda at: (scores[at][0], -scores[at][1], -at))
    weight, bias, iterations, converged = _fit(
        scale(wide), labels, classes, tried[best : best + 1], max_iter, intercept
    )[0]
    weight, bias = scale.undo(weight, bias)
    bias = bias if intercept else np.zeros(classes)
    path = tuple((strength, score[0]) for strength, score in zip(tried, scores, strict=True)) if held else ()
    return Probe(weight, bias, tried[best], path, iterations, converged)


def _search(
    held: list[tuple[Array, Array, Array, Array]], tried: Sequence[float], classes: int, max_iter: int, intercept: bool
) -> list[tuple[float, float]]:
    """(accuracy, NLL) of each strength, averaged over the held-out sets by their rows."""
    totals = np.zeros((len(tried), 2))
    rows = 0
    for inside, inside_labels, outside, outside_labels in held:
        fits = _fit(inside, inside_labels, classes, tried, max_iter, intercept)
        for at, (weight, bias, _, _) in enumerate(fits):
            logits = outside @ weight.T + bias
            right = float((logits.argmax(axis=1) == outside_labels).sum())
            totals[at] += right, nll(logits, outside_labels) * len(outside_labels)
        rows += len(outside_labels)
    return [(float(right / rows), float(loss / rows)) for right, loss in totals]


def _fit(
    features: Array, labels: Array, classes: int, strengths: Sequence[float], max_iter: int, intercept: bool
) -> list[tuple[Array, Array, int, bool]]:
    """One (weight, bias, iterations, converged) a strength, over all ``classes``."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    seen = np.unique(labels)
    if len(seen) == 1:
        return [(*_spread(np.zeros((1, features.shape[1])), np.zeros(1), seen, classes), 0, True) for _ in strengths]
    model: Any = LogisticRegression(
        solver="lbfgs", max_iter=max_iter, tol=1e-6, warm_start=True, fit_intercept=intercept
    )
    fits = []
    small = features.size * classes < _SMALL
    for strength in strengths:
        model.C = strength
        with warnings.catch_warnings(record=True) as caught, threadpool_limits(1 if small else None):
            warnings.simplefilter("always")
            model.fit(features, labels)
        weight, bias = np.asarray(model.coef_), np.atleast_1d(np.asarray(model.intercept_, dtype=np.float64))
        if len(seen) == 2:  # one row z with p = sigmoid(z): the softmax of (-z/2, +z/2)
            weight, bias = (
                np.vstack([-weight / 2, weight / 2]),
                np.concatenate([-bias / 2, bias / 2]) if intercept else np.zeros(2),
            )
        elif not intercept:
            bias = np.zeros(len(seen))
        converged = not any(issubclass(one.category, ConvergenceWarning) for one in caught)
        fits.append((*_spread(weight, bias, seen, classes), int(np.max(model.n_iter_)), converged))
    return fits


def _spread(weight: Array, bias: Array, seen: Array, classes: int) -> tuple[Array, Array]:
    """The rows of the classes that were seen at their places; the others as good as impossible."""
    wide = np.zeros((classes, weight.shape[1]))
    low = np.full(classes, bias.min() - _NEVER)
    wide[seen], low[seen] = weight, bias
    return wide, low


def folds(labels: Array) -> bool:
    """Whether the strength can be chosen by cross-validation: two classes or more, each with five rows."""
    counts = np.unique(labels, return_counts=True)[1]
    return len(counts) > 1 and int(counts.min()) >= _FOLDS


def _folds(features: Array, labels: Array) -> list[tuple[Array, Array, Array, Array]]:
    """Five stratified folds as (inside, its labels, outside, its labels); none when a class has fewer than five rows."""
    from sklearn.model_selection import StratifiedKFold

    if not folds(labels):
        return []
    cut = StratifiedKFold(_FOLDS, shuffle=True, random_state=0).split(features, labels)
    return [(features[inside], labels[inside], features[outside], labels[outside]) for inside, outside in cut]


def solve_regression(
    features: Array,
    targets: Array,
    *,
    validation: tuple[Array, Array] | None = None,
    strengths: Sequence[float] | None = None,
    intercept: bool = True,
) -> Probe:
    """Ridge regression, min_w  sum_i (w.(x_i - m) + c - y_i)^2 + alpha |w|^2, one factorisation for all alphas.

    Args:
        features: shape (n, h); targets: shape (n,).
        validation: on which alpha is chosen by root mean squared error, ties to the larger; None: by leave-one-out, in closed form.
    Differs: features are centred by column, so that the intercept is not penalised; nothing is scaled.
    """
    wide, wanted = np.asarray(features, dtype=np.float64), np.asarray(targets, dtype=np.float64).reshape(-1)
    tried = tuple(strengths or ALPHAS)
    middle, level = (wide.mean(axis=0), wanted.mean()) if intercept else (np.zeros(wide.shape[1]), 0.0)
    left, singular, right = np.linalg.svd(wide - middle, full_matrices=False)
    turned = left.T @ (wanted - level)
    scores, weights = [], []
    for alpha in tried:
        shrunk = (
            singular / (singular**2 + alpha)
            if alpha
            else np.divide(1.0, singular, where=singular > 0, out=np.zeros_like(singular))
        )
        weight = right.T @ (shrunk * turned)
        weights.append(weight)
        if validation is not None:
            gap = (
                (np.asarray(validation[0], dtype=np.float64) - middle) @ weight
                + level
                - np.asarray(validation[1]).reshape(-1)
            )
        else:
            leverage = np.square(left) @ (singular * shrunk) + (1.0 / len(wanted) if intercept else 0.0)
            gap = (left @ (singular * shrunk * turned) + level - wanted) / np.maximum(1.0 - leverage, 1e-12)
        scores.append(float(np.sqrt(np.square(gap).mean())))
    best = min(range(len(tried)), key=lambda at: (scores[at], -tried[at]))
    bias = np.array([level - float(middle @ weights[best])])
    return Probe(weights[best][None, :], bias, tried[best], tuple(zip(tried, scores, strict=True)), 0, True)


def write(probe: Probe, linear: Any) -> None:
    """Puts the solved head into a linear module, in place.

    Args:
        linear: a module with ``weight`` (k, h) and, or not, ``bias`` (k,).
    """
    import torch

    with torch.no_grad():
        linear.weight.copy_(torch.as_tensor(probe.weight).to(linear.weight))
        if getattr(linear, "bias", None) is not None:
            linear.bias.copy_(torch.as_tensor(probe.bias).to(linear.bias))
