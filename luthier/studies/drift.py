"""Drift: how far the features of a model moved between two of its states, and what that did to their geometry.

Source: Kumar, Raghunathan, Jones, Ma, Liang, ICLR 2022 (arXiv:2202.10054): distances inside and outside the training distribution;
Tomihari, Sato, NeurIPS 2024: the statistics before and after. Each statistic's own source is in ``likeness``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from luthier.core.anatomy import Anatomy
from luthier.errors import DataError, Fault
from luthier.studies.columns import number
from luthier.studies.features import Rows, features, head_norm, read
from luthier.studies.likeness import cka, cosine_pairs, cosine_self, diff, fdr
from luthier.svg import AMBER, DARK, draw, gaps

__all__ = [
    "Drift",
    "LayerDrift",
    "Look",
    "cka",
    "cosine_pairs",
    "cosine_self",
    "diff",
    "drift",
    "fdr",
    "features",
    "look",
    "study",
]

Batches = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Look:
    """One state of a model: its features inside and outside the training distribution, and its head's norm."""

    inside: Rows
    outside: Rows | None
    head_norm: float


@dataclass(frozen=True)
class LayerDrift:
    """One depth; None where a number is not defined.

    Args:
        name: ``block 0``, ..., or ``head``: what the head's last linear reads.
        width: h.
        diff: mean L2 distance before to after; relative: that over the mean norm before.
        diff_outside: ``diff`` on the rows outside; ratio: diff / diff_outside.
        cosine_self: mean cosine of each row with itself, before and after.
        cosine_pairs_before, cosine_pairs_after: mean cosine of different rows.
        cka: linear CKA of before and after.
        fdr_before, fdr_after: Fisher's ratio with the study's ridge.
    """

    name: str
    width: int
    diff: float
    relative: float | None
    diff_outside: float | None
    ratio: float | None
    cosine_self: float | None
    cosine_pairs_before: float | None
    cosine_pairs_after: float | None
    cka: float | None
    fdr_before: float | None
    fdr_after: float | None


@dataclass(frozen=True)
class Drift:
    """What training did to the features, layer by layer from the bottom.

    Args:
        rows, rows_outside: how many rows were looked at; classes: how many labels they have, 0 where they are no classes.
        ridge: of FDR.
        head_norm_before, head_norm_after: ||V||_F of the head's last linear, bias excluded.
    """

    layers: tuple[LayerDrift, ...]
    rows: int
    rows_outside: int
    classes: int
    ridge: float
    head_norm_before: float
    head_norm_after: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and None, for JSON."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers]}

    def lines(self) -> list[str]:
        """The study as text of at most 80 columns."""
        return [
            f"Features of {self.rows} rows, before and after."
            + (f" Outside: {self.rows_outside} rows." if self.rows_outside else ""),
            f"Norm of the head: {self.head_norm_before:.4g} -> {self.head_norm_after:.4g}.",
            "",
            *self.table(),
            "",
            *self.legend(),
        ]

    def table(self) -> list[str]:
        """A line a layer, under the names of the columns."""
        told = [
            f"{'':9}{'moved':>9}{'share':>7}{'in/out':>8}{'self':>7}{'CKA':>7}{'pairs':>7}{'->':>7}{'FDR':>9}{'->':>9}"
        ]
        for one in self.layers:
            wide = [
                number(one.diff, 9),
                number(one.relative, 7),
                number(one.ratio, 8),
                number(one.cosine_self, 7),
                number(one.cka, 7),
            ]
            wide += [number(one.cosine_pairs_before, 7), number(one.cosine_pairs_after, 7)]
            told.append(f"{one.name:9}" + "".join(wide) + number(one.fdr_before, 9) + number(one.fdr_after, 9))
        return told

    def legend(self) -> list[str]:
        """What the columns of the table are."""
        return [
            "moved: mean L2 distance; share: of the mean norm before; in/out: against the",
            "rows outside; self: cosine of a row with itself; pairs: of different rows;",
            f"FDR: classes apart against classes wide, ridge {self.ridge:g}; not across row counts.",
        ]

    def plot(self) -> str:
        """SVG: the displacement, the likeness and the Fisher ratio of each layer."""
        names = [layer.name.removeprefix("block ") for layer in self.layers]
        at = range(len(names))

        def paint(figure: Any) -> None:
            moved, like, apart = figure.subplots(3, 1, sharex=True)
            moved.plot(at, [layer.diff for layer in self.layers], "o-", color=DARK, label="inside")
            if self.rows_outside:
                moved.plot(at, gaps([layer.diff_outside for layer in self.layers]), "s--", color=AMBER, label="outside")
            moved.set_ylim(bottom=0)
            moved.set_ylabel("moved (L2)")
            like.plot(at, gaps([layer.cka for layer in self.layers]), "o-", color=DARK, label="CKA")
            like.plot(at, gaps([layer.cosine_self for layer in self.layers]), "s--", color=AMBER, label="cosine")
            like.set_ylabel("likeness (1: same)")
            apart.plot(at, gaps([layer.fdr_before for layer in self.layers]), "s--", color=AMBER, label="before")
            apart.plot(at, gaps([layer.fdr_after for layer in self.layers]), "o-", color=DARK, label="after")
            apart.set_ylabel("FDR (no unit)")
            apart.set_xlabel("block, and what the head reads")
            apart.set_xticks(list(at), names)
            for axes in (moved, like, apart):
                axes.legend(loc="best")

        return draw(
            paint, name="drift", label="How far each layer's features moved, and how alike they stayed", height=6.0
        )


def look(model: nn.Module, batches: Batches, *, outside: Batches | None = None, anatomy: Anatomy | None = None) -> Look:
    """The state of ``model``, to be compared with a later one.

    Args:
        batches: rows of the training distribution, always in the same order and batches; ``labels`` give FDR.
        outside: rows of another distribution.
    """
    far = None if outside is None else read(model, outside, anatomy=anatomy)
    return Look(read(model, batches, anatomy=anatomy), far, head_norm(model, anatomy=anatomy))


def drift(before: Look, after: Look, *, ridge: float = 1e-3) -> Drift:
    """The change from ``before`` to ``after``.

    Raises:
        DataError: the two are not of the same rows in the same order, or not of one model's layers.
    """
    _comparable(before.inside, after.inside, "batches")
    if (before.outside is None) != (after.outside is None):
        raise DataError.of([Fault("outside", "must be looked at before and after, or never")], "a study of drift")
    far = None if before.outside is None or after.outside is None else (before.outside.vectors, after.outside.vectors)
    if before.outside is not None and after.outside is not None:
        _comparable(before.outside, after.outside, "outside")
    labels = before.inside.labels
    classes = labels if labels is not None and labels.ndim == 1 and labels.dtype.kind in "iu" else None
    layers = []
    for name, old in before.inside.vectors.items():
        new = after.inside.vectors[name]
        moved, level = diff(old, new), float(np.linalg.norm(old, axis=1).mean())
        beyond = diff(far[0][name], far[1][name]) if far else None
        layers.append(
            LayerDrift(
                name=name,
                width=old.shape[1],
                diff=moved,
                relative=moved / level if level else None,
                diff_outside=beyond,
                ratio=moved / beyond if beyond else None,
                cosine_self=cosine_self(old, new),
                cosine_pairs_before=cosine_pairs(old),
                cosine_pairs_after=cosine_pairs(new),
                cka=cka(old, new),
                fdr_before=None if classes is None else fdr(old, classes, ridge=ridge),
                fdr_after=None if classes is None else fdr(new, classes, ridge=ridge),
            )
        )
    rows = len(before.inside.vectors[layers[0].name])
    apart = 0 if before.outside is None else len(before.outside.vectors[layers[0].name])
    kinds = 0 if classes is None else len(np.unique(classes))
    return Drift(tuple(layers), rows, apart, kinds, ridge, before.head_norm, after.head_norm)


def study(
    before: nn.Module, after: nn.Module, batches: Batches, *, outside: Batches | None = None, ridge: float = 1e-3
) -> Drift:
    """The change from the model ``before`` to the model ``after`` on the same batches, which are gone through twice."""
    kept, far = list(batches), None if outside is None else list(outside)
    return drift(look(before, kept, outside=far), look(after, kept, outside=far), ridge=ridge)


def _comparable(before: Rows, after: Rows, where: str) -> None:
    shapes = [{name: rows.shape for name, rows in look.vectors.items()} for look in (before, after)]
    same = (before.labels is None) == (after.labels is None)
    if same and before.labels is not None and after.labels is not None:
        same = np.array_equal(before.labels, after.labels)
    if shapes[0] != shapes[1]:
        got = f"{len(shapes[0])} layers and {len(shapes[1])}, or other widths or rows"
        raise DataError.of([Fault(where, "must go through the same layers before and after", got)], "a study of drift")
    if not same or before.digest != after.digest:
        must = "must hold the same rows, in the same order and batches, before and after"
        raise DataError.of([Fault(where, must, do="Do not shuffle between the two.")], "a study of drift")
