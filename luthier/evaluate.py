"""Metrics of a split: what report.json holds, and what the page draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from luthier.core.scores import HIGHER_IS_BETTER, Array, Bin, brier, ece, log_softmax, mce, nll, reliability, softmax
from luthier.core.trust import accuracy_at, aurc, bootstrap, ece_equal_mass, risk_coverage
from luthier.errors import DataError, Fault

__all__ = ["HIGHER_IS_BETTER", "Bin", "classification", "confusion", "mistakes", "regression", "reliability"]


def classification(logits: Array, labels: Array) -> dict[str, Any]:
    """accuracy, f1_macro, mcc, auroc, nll (nats), brier, ece (15 equal-width bins) and n.

    Args:
        logits: shape (n, k), unnormalised.
        labels: shape (n,), class numbers below k.
    Returns:
        auroc is None where all rows are of one class: it is not defined there.
    Raises:
        DataError: no rows, or the shapes disagree.
    Differs: f1_macro is the mean over the classes that occur in labels or predictions, a class without true positives counting 0,
        as in sklearn.metrics.f1_score(average="macro").
    """
    _agree(logits, labels)
    found = np.asarray(logits).argmax(axis=1)
    return {
        "accuracy": float((found == labels).mean()),
        "f1_macro": f1_macro(found, labels),
        "mcc": mcc(found, labels),
        "auroc": auroc(logits, labels),
        "nll": nll(logits, labels),
        "brier": brier(logits, labels),
        "ece": ece(logits, labels),
        "n": len(labels),
    }


def f1_macro(found: Array, labels: Array) -> float:
    """Mean over the classes that occur of 2 TP / (2 TP + FP + FN) = 2 TP / (found + there).

    Differs: the numbers are sklearn's f1_score(average="macro"); it takes a millisecond a call, and a bootstrap calls thousands of times.
    """
    classes = int(max(found.max(), labels.max())) + 1
    there, said = np.bincount(labels, minlength=classes), np.bincount(found, minlength=classes)
    right = np.bincount(labels[found == labels], minlength=classes)
    occurs = there + said > 0
    return float(np.mean(2 * right[occurs] / (there + said)[occurs]))


def mcc(found: Array, labels: Array) -> float:
    """Matthews' correlation of classes: (c n - sum_k p_k t_k) / sqrt((n^2 - sum_k p_k^2) (n^2 - sum_k t_k^2)), in [-1, 1].

    c rows of n are right, p_k were said to be of class k, t_k are. It is 0 where one class is always said, or there is one class only.

    Source: Gorodkin, Computational Biology and Chemistry 28 (2004), R_K; with two classes, Matthews (1975).
    Differs: the numbers are sklearn's matthews_corrcoef; it is slow as its f1_score is.
    """
    classes, n = int(max(found.max(), labels.max())) + 1, len(labels)
    there, said = (np.bincount(one, minlength=classes).astype(np.float64) for one in (labels, found))
    spread = math.sqrt((n * n - said @ said) * (n * n - there @ there))
    return float((found == labels).sum() * n - said @ there) / spread if spread else 0.0


def auroc(logits: Array, labels: Array) -> float | None:
    """The area under the ROC curve, in [0, 1], one class against the rest, mean over the classes that occur; None where one only does.

    It is the chance that a row of the class is given more of it than a row of another class, equal shares counting half: for r_i the rank
    of row i by its share (equal ones have their mean rank), (sum of r_i over the n_1 rows of the class - n_1 (n_1 + 1) / 2) / (n_1 n_0).

    Args:
        logits: shape (n, k), unnormalised.
        labels: shape (n,), class numbers below k.
    Source: Hanley, McNeil, Radiology 143 (1982); the mean over classes, sklearn's roc_auc_score(multi_class="ovr", average="macro").
    Differs: a class without rows is left out, where sklearn refuses; its speed is that of f1_score, see f1_macro.
    """
    from scipy.stats import rankdata

    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2:
        return None
    ranks = rankdata(log_softmax(logits)[:, classes], axis=0)
    own = (ranks * (np.asarray(labels)[:, None] == classes)).sum(axis=0)
    return float(np.mean((own - counts * (counts + 1) / 2) / (counts * (len(labels) - counts))))


def regression(predictions: Array, targets: Array) -> dict[str, Any]:
    """rmse and mae (in the target's unit), pearson, spearman, n.

    Args:
        predictions, targets: shape (n,).
    Returns:
        a correlation is None where one side is constant: it is not defined there.
    Raises:
        DataError: no rows, or the shapes disagree.
    """
    _agree(predictions, targets)
    return {
        "rmse": rmse(predictions, targets),
        "mae": float(np.abs(_gap(predictions, targets)).mean()),
        "pearson": pearson(predictions, targets),
        "spearman": spearman(predictions, targets),
        "n": len(targets),
    }


def rmse(predictions: Array, targets: Array) -> float:
    """Root of the mean squared error, in the target's unit."""
    return math.sqrt(float(np.square(_gap(predictions, targets)).mean()))


def pearson(predictions: Array, targets: Array) -> float | None:
    """Pearson's correlation; None where one side is constant.

    Differs: scipy's pearsonr also tests it, which takes ten times as long, and a bootstrap calls thousands of times.
    """
    if len(targets) < 2 or np.ptp(predictions) == 0 or np.ptp(targets) == 0:
        return None
    return float(np.corrcoef(predictions, targets, dtype=np.float64)[0, 1])


def spearman(predictions: Array, targets: Array) -> float | None:
    """Pearson's correlation of the ranks, equal values sharing their mean rank; None where one side is constant."""
    from scipy.stats import rankdata

    return pearson(rankdata(predictions), rankdata(targets))


def _gap(predictions: Array, targets: Array) -> Array:
    return np.asarray(predictions, dtype=np.float64) - np.asarray(targets, dtype=np.float64)


def confusion(logits: Array, labels: Array) -> Array:
    """Counts, shape (k, k): rows are the true classes, columns the predicted."""
    classes = np.asarray(logits).shape[1]
    pairs = np.asarray(labels) * classes + np.asarray(logits).argmax(axis=1)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def trust(logits: Array, labels: Array) -> dict[str, float]:
    """How far the confidence of a split can be trusted: ECE with its interval and by equal mass, MCE, and what abstaining gains.

    Args:
        logits: shape (n, k), unnormalised.
        labels: shape (n,), class numbers below k.
    """
    likely = softmax(logits)
    sure, right = likely.max(axis=1), likely.argmax(axis=1) == labels
    spread = bootstrap(logits, labels)["ece"]
    at_80, at_50 = accuracy_at(sure, right, (0.8, 0.5))
    return {
        "ece": spread.value,
        "ece_low": spread.low,
        "ece_high": spread.high,
        "ece_mass": ece_equal_mass(logits, labels),
        "mce": mce(logits, labels),
        "aurc": aurc(sure, 1.0 - right),
        "accuracy_at_80": at_80,
        "accuracy_at_50": at_50,
    }


def selective(logits: Array, labels: Array, *, most: int = 50) -> list[list[float]]:
    """The risk-coverage curve, thinned: how often the surest rows are wrong, if only these are answered.

    Args:
        logits: shape (n, k), unnormalised.
        labels: shape (n,), class numbers below k.
        most: points; with as many rows or fewer, every row is one.
    Returns:
        [coverage, risk] for the surest ceil(n i / most) rows, i = 1 ... most: points of the curve itself, no means of several.
        Coverage rises to 1; both are shares.
    Source: Geifman, El-Yaniv, NeurIPS 2017 (arXiv:1705.08500).
    """
    likely = softmax(logits)
    coverage, risk = risk_coverage(likely.max(axis=1), np.asarray(likely.argmax(axis=1) != labels, dtype=np.float64))
    n = len(risk)
    ends = sorted({-(-n * at // most) for at in range(1, most + 1)})
    return [[float(coverage[end - 1]), float(risk[end - 1])] for end in ends]


def mistakes(logits: Array, labels: Array, *, most: int = 20) -> list[int]:
    """Rows that are wrong, the most confident first; among equals the earlier."""
    likely = softmax(logits)
    wrong = np.flatnonzero(likely.argmax(axis=1) != labels)
    order = np.argsort(-likely[wrong].max(axis=1), kind="stable")
    return [int(row) for row in wrong[order][:most]]


def _agree(outputs: Array, targets: Array) -> None:
    if not len(targets) or len(outputs) != len(targets):
        must = "must have one output for each of at least one target"
        raise DataError.of([Fault("a split", must, f"{len(outputs)} outputs and {len(targets)} targets")], "evaluation")
