"""What is learned: classes or a quantity. A task is a small value: names, targets, a loss, a decoder, metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from torch import Tensor

from luthier.core.scores import softmax
from luthier.errors import DataError, Fault, did_you_mean
from luthier.sources.data import Data, Split, named_rows
from luthier.sources.labels import IN_DOMAIN, Label, are_classes, as_number

Array = npt.NDArray[Any]
KINDS = ("auto", "classification", "regression")


class Task(Protocol):
    """What every task has; n is the number of rows, k of the model's outputs."""

    @property
    def kind(self) -> str: ...

    @property
    def num_labels(self) -> int: ...

    @property
    def label_names(self) -> tuple[str, ...]: ...

    @property
    def problem_type(self) -> str: ...

    @property
    def metric(self) -> str: ...

    @property
    def metric_names(self) -> tuple[str, ...]: ...

    def targets(self, labels: Sequence[Label]) -> Array: ...

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor: ...

    def probabilities(self, logits: Array) -> Array: ...

    def decode(self, logits: Array) -> list[str] | list[float]: ...


@dataclass(frozen=True)
class Classification:
    """One class a row.

    Args:
        labels: the classes' names; class i is ``labels[i]``, and so is output i of the model.
    """

    labels: tuple[str, ...]
    kind = "classification"
    problem_type = "single_label_classification"
    metric = "accuracy"
    metric_names = ("accuracy", "f1_macro", "mcc", "auroc", "nll", "brier", "ece")

    @property
    def num_labels(self) -> int:
        return len(self.labels)

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.labels

    def targets(self, labels: Sequence[Label]) -> Array:
        """Class numbers, shape (n,), int64.

        Raises:
            DataError: a label that is none of the classes; every such label is named.
        """
        number = {name: i for i, name in enumerate(self.labels)}
        names = [label_name(label) for label in labels]
        unknown = sorted(set(names) - set(number))
        if unknown:
            do = did_you_mean(unknown[0], self.labels)
            must = f"must be one of {', '.join(self.labels[:10])}"
            raise DataError.of([Fault("label", must, ", ".join(map(repr, unknown[:5])), do)], "the labels")
        return np.array([number[name] for name in names], dtype=np.int64)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, shape (), nats; logits (n, k), targets (n,) int64."""
        return F.cross_entropy(logits.float(), targets)

    def probabilities(self, logits: Array) -> Array:
        """Softmax in float64, shape (n, k); each row sums to one."""
        return softmax(logits)

    def decode(self, logits: Array) -> list[str]:
        """The name of each row's largest logit; logits (n, k)."""
        return [self.labels[i] for i in np.asarray(logits).argmax(axis=1)]


@dataclass(frozen=True)
class Regression:
    """One number a row, in the data's own unit: the model's single output is the prediction."""

    kind = "regression"
    problem_type = "regression"
    num_labels = 1
    label_names = ("value",)
    metric = "rmse"
    metric_names = ("rmse", "mae", "pearson", "spearman")

    def targets(self, labels: Sequence[Label]) -> Array:
        """Numbers, shape (n,), float32.

        Raises:
            DataError: a label that is not a number; its rows are named.
        """
        faults = _not_numbers("label", Split(("",) * len(labels), labels=tuple(labels)))
        if faults:
            raise DataError.of(faults, "the labels")
        return np.array([float(label) for label in labels], dtype=np.float32)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error, shape (), in the label's unit squared; logits (n, 1), targets (n,)."""
        return F.mse_loss(logits.float().squeeze(-1), targets.float())

    def probabilities(self, logits: Array) -> Array:
        """Raises TypeError: a quantity has no probabilities."""
        raise TypeError("regression has no probabilities; decode() gives the predicted numbers")

    def decode(self, logits: Array) -> list[float]:
        """The prediction of each row; logits (n, 1)."""
        return [float(value) for value in np.asarray(logits).reshape(len(logits))]


def label_name(label: Label) -> str:
    """A label as the name of a class: whole numbers without a point.

    >>> label_name("spam"), label_name(3), label_name(3.0), label_name(2.5)
    ('spam', '3', '3', '2.5')
    """
    if isinstance(label, str):
        return label
    return str(int(label)) if float(label).is_integer() else repr(float(label))


def decide(data: Data, task: str = "auto") -> tuple[Task, str]:
    """The task, and the sentence that says what was decided and from what.

    Strings are classes. Whole numbers are classes when few values occur: at most 20, each twice on average; or ids
    without gaps from 0 or 1, at most 1000 and at most a twentieth of the rows. Numbers with decimals, and all other
    whole numbers, are quantities. Counted over train, validation and test; the other splits must then fit. Classes are
    sorted, as numbers where all are numbers.

    Raises:
        DataError: an unknown ``task``; regression with labels that are not numbers; or strings that cannot be classes,
            because hardly two rows share one.
    """
    if task not in KINDS:
        fault = Fault("task", f"must be one of {', '.join(KINDS)}", repr(task), did_you_mean(task, KINDS))
        raise DataError.of([fault], "the options")
    inside = [data.splits[name] for name in IN_DOMAIN if name in data.splits]
    labels = [label for split in inside for label in split.labels or ()]
    if task == "auto":
        task = "classification" if are_classes(labels) else "regression"
        if task == "classification":
            _refuse_free_text(data, data.splits["train"].labels or ())
    column = f"column {data.columns.label!r}"
    if task == "regression":
        faults = [each for name, split in data.splits.items() for each in _not_numbers(name, split)]
        if faults:
            raise DataError.of(faults, data.source)
        return Regression(), _say_regression(labels, column)
    counts = Counter(label_name(label) for label in data.splits["train"].labels or ())
    numeric = all(as_number(name) is not None for name in counts)
    names = sorted(counts, key=lambda name: (float(name), name)) if numeric else sorted(counts)
    more = f", and {len(names) - 8} more" if names[8:] else ""
    told = ", ".join(f"{name} {counts[name]}" for name in names[:8]) + more
    return Classification(tuple(names)), f"classification: {len(names)} labels ({column}: {told})"


def _say_regression(labels: Sequence[Label], column: str) -> str:
    numbers = np.array([float(label) for label in labels])
    told = f"{column}: {numbers.min():g} to {numbers.max():g}, mean {numbers.mean():.3g}"
    few = len(set(labels))
    hint = f"; only {few} distinct: if they are classes, --task classification" if few <= 10 else ""
    return f"regression: one number a row ({told}{hint})"


def _not_numbers(where: str, split: Split) -> list[Fault]:
    bad = [(i, label) for i, label in enumerate(split.labels or ()) if as_number(label) is None]
    if not bad:
        return []
    rows = named_rows([split.rows[i] if split.rows else i + 1 for i, _ in bad])
    told = ", ".join(dict.fromkeys(repr(label) for _, label in bad[:3]))
    shifted = where.startswith("ood_") or where == "out_domain"
    do = f"Mend them, or leave {where} out." if shifted else "Mend them, or use --task classification."
    return [Fault(f"{where}, {rows}", "must have a number as label", told, do)]


def _refuse_free_text(data: Data, labels: Sequence[Label]) -> None:
    """Refuses string labels of train that are a column of numbers with slips in it, or that hardly repeat."""
    distinct = len(set(labels))
    if distinct <= max(20, len(labels) / 2):
        return
    numbers = sum(as_number(label) is not None for label in labels)
    if numbers >= 0.9 * len(labels):
        raise DataError.of([f for name, split in data.splits.items() for f in _not_numbers(name, split)], data.source)
    do = "Name the column of classes: --label COLUMN; or say --task classification."
    told = f"{distinct} different values in {len(labels)} rows"
    raise DataError.of([Fault(f"column {data.columns.label!r}", "must repeat, to be classes", told, do)], data.source)
