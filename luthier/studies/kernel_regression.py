"""Kernel regression: how well a logistic regression on the kernel's rows tells the classes.

Each pair (row n, class c) is one case with one answer, whether c is the label of n; its inputs are row (n, c) of the kernel's matrix
against all pairs of the training rows.

Source: Tomihari and Sato, NeurIPS 2024 (arXiv:2405.16747); their code utils/kernel_solvers.py.
Differs: nothing in the fit. They score the answers, of which a share of 1 - 1/C is right when every answer is no; that score is named
``answers`` here, and stands beside it as ``all_no``. ``classes`` is the share of rows whose most likely class is their label.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from luthier.core.scores import Array
from luthier.errors import DataError, Fault
from luthier.studies.ntk import NTK, PARTS, PartOf

_FOLDS = 5


@dataclass(frozen=True)
class Shares:
    """Shares that are right, on one set of rows.

    Args:
        answers: of the rows x C yes-or-no decisions, as the paper counts.
        classes: of the rows, by their most likely class.
        all_no: what ``answers`` is when every decision is no: 1 - 1/C.
        most_frequent: what ``classes`` is when every row is given the most frequent label of the training rows.
    """

    answers: float
    classes: float
    all_no: float
    most_frequent: float


@dataclass(frozen=True)
class KernelRegression:
    """A fit on one part of the kernel.

    Args:
        part: P, F or P+F.
        train, held: how often it is right; held is None without held-out rows.
        strength: the C (inverse penalty) that five-fold cross-validation chose.
        converged: whether every fit ended at its tolerance.
    """

    part: str
    train: Shares
    held: Shares | None
    strength: float
    converged: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The shares as text, 80 columns."""
        made = [f"Kernel regression on {self.part}" + ("" if self.converged else " (not converged)")]
        for name, one in (("training", self.train), ("held-out", self.held)):
            if one is not None:
                made += [
                    f"  {name} rows: classes {one.classes:.1%} (most frequent {one.most_frequent:.1%})",
                    f"  {' ' * len(name)} yes or no {one.answers:.1%} (all no {one.all_no:.1%})",
                ]
        return made


def kernel_regression(kernel: NTK, part: PartOf = "P+F") -> KernelRegression:
    """Fits on the kernel among the training rows; scores there and, if there are any, on the held-out rows.

    Raises:
        DataError: fewer than five training rows, the folds of the cross-validation.
    """
    if kernel.train < _FOLDS:
        fault = Fault("batches", f"must hold at least {_FOLDS} rows", str(kernel.train))
        raise DataError.of([fault], "kernel regression")
    train = slice(kernel.train)
    model, converged = _fit(_cases(kernel.block(part, train, train)), _answers(kernel, train))
    usual = int(np.bincount(kernel.labels[train]).argmax())
    sets = [train, *([slice(kernel.train, None)] if len(kernel.labels) > kernel.train else [])]
    shares = []
    for rows in sets:
        decided = model.decision_function(_cases(kernel.block(part, rows, train)))
        classes = kernel.logits.shape[1]
        likely = decided.reshape(-1, classes).argmax(axis=1)
        labels = kernel.labels[rows]
        shares.append(
            Shares(
                float(((decided > 0) == _answers(kernel, rows)).mean()),
                float((likely == labels).mean()),
                (classes - 1) / classes,
                float((labels == usual).mean()),
            )
        )
    return KernelRegression(part, shares[0], shares[1] if shares[1:] else None, float(model.C_[0]), converged)


def kernel_regressions(kernel: NTK, parts: Iterable[PartOf] = PARTS) -> dict[str, KernelRegression]:
    """One fit for each part; none with fewer than five training rows."""
    return {part: kernel_regression(kernel, part) for part in parts if kernel.train >= _FOLDS}


def _cases(block: Array) -> Array:
    """(rows, C, columns, C) as a matrix of rows x C cases."""
    return np.asarray(block.reshape(block.shape[0] * block.shape[1], -1))


def _answers(kernel: NTK, rows: slice) -> Array:
    """Whether c is the label of n, shape (rows x C,)."""
    return np.asarray(np.eye(kernel.logits.shape[1], dtype=bool)[kernel.labels[rows]].reshape(-1))


def _fit(cases: Array, answers: Array) -> tuple[Any, bool]:
    """Logistic regression with an L2 penalty, C among ten values from 1e-4 to 1e4 by five-fold cross-validation."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegressionCV

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = LogisticRegressionCV(Cs=10, cv=_FOLDS, max_iter=10_000, random_state=0).fit(cases, answers)
    return model, not any(issubclass(one.category, ConvergenceWarning) for one in caught)
