"""The empirical neural tangent kernel of a classifier at its present weights, in two parts: P + F.

For logits f(x) = V phi(x) + b with V the head's last linear module and phi(x) what it reads,

    P(x, x') = (<phi(x), phi(x')> + 1) I      what training the last linear module alone does; + 1 only if it has a bias
    F(x, x') = V Jphi(x) Jphi(x')^T V^T       what training all other weights adds

and one small step of gradient descent on the summed cross-entropy changes f(x) by eta sum_i (P + F)(x, x_i) delta_i, with
delta_i = onehot(y_i) - softmax(f(x_i)).

Source: Tomihari and Sato, NeurIPS 2024 (arXiv:2405.16747); their code tom4649/lp-ft_ntk.
Differs: F is the Gram matrix of d logits / d weights, which is the same matrix for ``classes`` backward passes a row instead of one for
each feature; word embeddings are exact, where theirs are estimated from a tenth of the weights and a tenth of the features; the + 1 is
left out where there is no bias; ranks state their tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from luthier.core.anatomy import Anatomy, select_all
from luthier.core.families import Family
from luthier.core.modes import paused
from luthier.core.scores import Array, softmax
from luthier.errors import DataError, Fault, ModelError
from luthier.studies.jacobian_gram import gram
from luthier.studies.last_linear import last_linear, read, rows_of
from luthier.svg import AMBER, DARK, draw, log_axis
from luthier.units import size

PartOf = Literal["P", "F", "P+F"]
_MOST_BYTES = 2**30  # of F
PARTS: tuple[PartOf, ...] = ("P", "F", "P+F")


@dataclass(frozen=True, eq=False)
class NTK:
    """Both parts of the kernel over n rows: the first ``train`` are training rows, the others are held out.

    Ranks, norms, traces and the FT ratio are those of the training rows; a kernel of classes C is a matrix of rows x C.

    Args:
        P: shape (n, n), float64; the kernel's part is this times the identity over classes.
        F: shape (n, C, n, C), float64.
        logits: shape (n, C), float64.
        labels: shape (n,), class numbers.
        train: rows of training.
        head_norm: Frobenius norm of V, without the bias.
        head_bias: whether V has a bias.
        weights: numbers in the weights of F.
        passes: how often the rows went through the model and back.
        most_bytes: of the Jacobian that were held at once.
        eps: of the numbers that the gradients were computed in.
    """

    P: Array
    F: Array
    logits: Array
    labels: Array
    train: int
    head_norm: float
    head_bias: bool
    weights: int
    passes: int
    most_bytes: int
    eps: float

    def block(self, part: PartOf, rows: slice, columns: slice) -> Array:
        """The kernel between two sets of rows, shape (rows, C, columns, C)."""
        eye = np.eye(self.logits.shape[1])
        wide = np.einsum("nm,cd->ncmd", self.P[rows, columns], eye) if part != "F" else 0.0
        return np.asarray(wide if part == "P" else wide + self.F[rows, :, columns])

    @cached_property
    def delta(self) -> Array:
        """onehot(y_i) - softmax(f(x_i)) of the training rows, shape (train, C)."""
        return np.asarray(np.eye(self.logits.shape[1])[self.labels[: self.train]] - softmax(self.logits[: self.train]))

    def change(self, part: PartOf = "P+F") -> Array:
        """sum_i kernel(x, x_i) delta_i for every row, shape (n, C).

        The logits' change for each unit of rate, to first order, when one step of gradient descent is taken on the training rows' summed
        cross-entropy; for their mean it is this over ``train``.
        """
        if part == "P":
            return np.asarray(self.P[:, : self.train] @ self.delta)
        own = np.einsum("ncmd,md->nc", self.F[:, :, : self.train], self.delta)
        return np.asarray(own if part == "F" else own + self.change("P"))

    @cached_property
    def ft_ratio(self) -> float:
        """Mean over training x of |sum_i F(x, x_i) delta_i| / |sum_i (P + F)(x, x_i) delta_i|.

        Above 1 where the two parts work against each other; NaN where nothing changes.
        """
        own, whole = (np.linalg.norm(self.change(part)[: self.train], axis=1) for part in PARTS[1:])
        return float((own / whole).mean()) if whole.all() else float("nan")

    @property
    def rank_tolerance(self) -> float:
        """Eigenvalues count towards a rank when they are above this times the largest: rows x C x eps."""
        return self.train * int(self.logits.shape[1]) * self.eps

    @cached_property
    def eigenvalues(self) -> dict[str, Array]:
        """Of each part as a matrix over the training rows, descending, shape (train x C,)."""
        train, many = slice(self.train), self.train * self.logits.shape[1]
        found: dict[str, Array] = {"P": np.repeat(np.linalg.eigvalsh(self.P[train, train])[::-1], self.logits.shape[1])}
        for part in PARTS[1:]:
            found[part] = np.linalg.eigvalsh(self.block(part, train, train).reshape(many, many))[::-1]
        return found

    def rank(self, part: str) -> int:
        """Eigenvalues above ``rank_tolerance`` times the largest."""
        values = self.eigenvalues[part]
        return int((values > self.rank_tolerance * values[0]).sum()) if values[0] > 0 else 0

    def to_dict(self) -> dict[str, Any]:
        """The numbers, without the kernels."""
        parts = {
            part: {
                "rank": self.rank(part),
                "frobenius": float(np.sqrt(np.square(self.eigenvalues[part]).sum())),
                "trace": float(self.eigenvalues[part].sum()),
            }
            for part in PARTS
        }
        return {
            "rows": self.train,
            "held_rows": len(self.labels) - self.train,
            "classes": self.logits.shape[1],
            "weights": self.weights,
            "parts": parts,
            "ft_ratio": None if np.isnan(self.ft_ratio) else self.ft_ratio,
            "head_norm": self.head_norm,
            "head_bias": self.head_bias,
            "rank_tolerance": self.rank_tolerance,
            "passes": self.passes,
            "most_bytes": self.most_bytes,
        }

    def lines(self) -> list[str]:
        """The numbers as text, 80 columns."""
        told = self.to_dict()
        rows = [
            f"{part:<6}{one['rank']:>8,}{one['frobenius']:>18.4g}{one['trace']:>14.4g}"
            for part, one in told["parts"].items()
        ]
        return [
            f"Neural tangent kernel: {told['rows']:,} rows x {told['classes']} classes",
            f"{told['weights']:,} weights outside the head's last linear module",
            "          rank    Frobenius norm         trace",
            *rows,
            f"(ranks: eigenvalues above {told['rank_tolerance']:.1e} of the largest)",
            f"FT ratio {self.ft_ratio:.4g}: how much of a first step's change comes through F",
            f"Norm of the head's last linear module {self.head_norm:.4g}",
        ]

    def plot(self) -> str:
        """The eigenvalues of P and F over the training rows, as SVG text."""

        def paint(figure: Any) -> None:
            axes = figure.add_subplot()
            for part, line, colour in (("P", "--", AMBER), ("F", "-", DARK)):
                values = self.eigenvalues[part][: self.rank(part)]
                axes.plot(np.arange(1, len(values) + 1), values, line, color=colour, label=part)
            if any(self.rank(part) for part in PARTS):
                log_axis(axes.yaxis, axes.set_yscale)
            axes.set_xlabel("number of the eigenvalue, from the largest")
            axes.set_ylabel("eigenvalue (logits per\nunit of rate and error)")
            axes.legend()

        return draw(paint, name="ntk", label="Eigenvalues of the two parts of the neural tangent kernel", height=3.3)


def ntk(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    held: Iterable[Mapping[str, Any]] = (),
    where: Sequence[str] | None = None,
    family: Family | None = None,
    limit_bytes: int = 2**30,
) -> NTK:
    """The empirical kernel of ``model`` at its present weights, exactly. Looks only: nothing of the model changes.

    F has (rows x classes)^2 numbers, held and training rows together; it is refused above 1 GiB, which is 11,585 rows x classes. Its
    eigenvalues take about three times that for a while, and a time that grows with the cube of the training rows x classes.

    Args:
        batches: training rows, mappings with ``labels``; each row goes through the model alone, with the padding of its batch, so batches
            of one row, or of rows of one length, are fastest.
        held: rows that are not trained on, for ``kernel_regression``.
        where: selectors of the weights of F, such as ``("all",)`` or ``("*.lora_*",)``; None for those that require gradients. The
            head's last linear module is never among them.
        family: where the parts of a model are that Luthier does not know.
        limit_bytes: of the Jacobian that may be held at once; less of it takes more passes over the rows, and the same result.
    Raises:
        ModelError: there is no last linear module, the logits are not what it gives at one place of the text, LoRA is merged, or
            ``where`` stands for no weight.
        DataError: there are no rows, too many for F, or a label is no class of the model.
    """
    anatomy = Anatomy.of(model, family)
    linear = last_linear(model, anatomy)
    names = _chosen(model, anatomy, where)
    device = next(model.parameters()).device
    rows, labels = rows_of(batches, device)
    others, other_labels = rows_of(held, device)
    if not rows:
        raise DataError.of([Fault("batches", "must hold at least one row")], "the rows")
    wrong = [label for label in labels + other_labels if label not in range(linear.out_features)]
    if wrong:
        fault = Fault("labels", f"must be class numbers below {linear.out_features}", str(wrong[0]))
        raise DataError.of([fault], "the rows")
    most = math.isqrt(_MOST_BYTES // 8) // linear.out_features
    if len(rows) + len(others) > most:
        got = f"{len(rows) + len(others):,} rows of {linear.out_features:,} classes"
        fault = Fault(
            "the kernel",
            f"must fit in {size(_MOST_BYTES)}",
            got,
            f"Look at {most:,} rows at most, held-out ones among them.",
        )
        raise DataError.of([fault], "the rows")
    with paused(model), torch.enable_grad():
        logits, features, mass = map(np.stack, zip(*read(model, linear, rows + others), strict=True))
        found = gram(model, rows + others, names, limit_bytes=limit_bytes)
    bias = linear.bias is not None
    weight = linear.weight.detach()
    return NTK(
        features @ features.T + (np.outer(mass, mass) if bias else 0.0),
        found.values,
        logits,
        np.array(labels + other_labels),
        len(rows),
        float(weight.double().norm()),
        bias,
        sum(model.get_parameter(name).numel() for name in names),
        found.passes,
        found.most_bytes,
        float(torch.finfo(weight.dtype).eps),
    )


def _chosen(model: nn.Module, anatomy: Anatomy, where: Sequence[str] | None) -> list[str]:
    """The weights of F, from the top of the model: a part's backward pass then ends early."""
    weights = dict(model.named_parameters())
    named = (
        {name for name, one in weights.items() if one.requires_grad} if where is None else select_all(anatomy, where)
    )
    top_first = sorted(anatomy.parts, key=lambda part: part.depth)[::-1]
    names = [part.name for part in top_first if part.name in named and not part.name.startswith(f"{anatomy.output}.")]
    if not names:
        do = "Give where=('all',) for all of them." if where is None else ""
        raise ModelError.of(
            [Fault("where", "must stand for a weight outside the last linear module", f"{where}", do)], "the model"
        )
    return [name for name in names if weights[name].is_floating_point() and weights[name].numel()]
