"""Forgetting: rows that a model had right before the last training and has wrong after it, on each split, the general ones first.

Source: Toneva, Sordoni, Tachet des Combes, Trischler, Bengio, Gordon, ICLR 2019 (arXiv:1812.05159): a row that was right and is
wrong is forgotten; McNemar, Psychometrika 12, 1947: whether more rows went one way than the other.
Differs: Toneva et al. count over the steps of a training, on its own rows; here two models are compared, on rows that were held out.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from luthier.core.scores import Array, nll
from luthier.errors import DataError, Fault
from luthier.statistics.exact import mcnemar
from luthier.svg import AMBER, DARK, clipped, draw

__all__ = ["Change", "Forgetting", "change", "study"]


@dataclass(frozen=True)
class Change:
    """What happened on one split.

    Args:
        general: whether the split stands for what the model should not lose.
        rows: how many there are.
        right_before, right_after: how many of them are right.
        nll_before, nll_after: nats a row, not calibrated.
        forgotten: numbers of the rows that were right and are wrong.
        learned: numbers of the rows that were wrong and are right.
        p: McNemar's, exact and two-sided.
    """

    split: str
    general: bool
    rows: int
    right_before: int
    right_after: int
    nll_before: float
    nll_after: float
    forgotten: tuple[int, ...]
    learned: tuple[int, ...]
    p: float

    @property
    def accuracy_before(self) -> float:
        """Share of the rows that was right."""
        return self.right_before / self.rows

    @property
    def accuracy_after(self) -> float:
        """Share of the rows that is right."""
        return self.right_after / self.rows

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        share = {"accuracy_before": self.accuracy_before, "accuracy_after": self.accuracy_after}
        return {**asdict(self), "forgotten": list(self.forgotten), "learned": list(self.learned), **share}


@dataclass(frozen=True)
class Forgetting:
    """The study.

    Args:
        since: the stage at whose start the model is that the end is compared with.
        changes: a split each, the general ones first.
        notes: what a reader should know, a sentence each.
    """

    since: str
    changes: tuple[Change, ...]
    notes: tuple[str, ...] = ()

    @property
    def general(self) -> tuple[Change, ...]:
        """The general splits."""
        return tuple(one for one in self.changes if one.general)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        told = [one.to_dict() for one in self.changes]
        return {
            "since": self.since,
            "general": [one.split for one in self.general],
            "splits": told,
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """The study as text of at most 80 columns."""
        told = [
            f"{'':19}{'rows':>7}{'accuracy':>10}{'->':>7}{'NLL':>8}{'->':>8}{'forgot':>7}{'learned':>8}{'p':>6}",
        ]
        for one in self.changes:
            name = clipped(one.split, 17) + (" *" if one.general else "")
            told.append(
                f"{name:19}{one.rows:7}{one.accuracy_before:10.3f}{one.accuracy_after:7.3f}{one.nll_before:8.3f}"
                f"{one.nll_after:8.3f}{len(one.forgotten):7}{len(one.learned):8}{_p(one.p):>6}"
            )
        sentences = [_sentence(one) for one in self.general]
        told += ["", *(line for sentence in sentences for line in textwrap.wrap(sentence, 80, subsequent_indent="  "))]
        return [
            *told,
            "",
            "* general. forgot: right before and wrong now; learned: wrong before and right",
            "now; p: of so uneven a change, were each as likely (McNemar, exact), a split at",
            "a time, of this one run; NLL: nats a row, not calibrated.",
            *(line for note in self.notes for line in textwrap.wrap(note, 80)),
        ]

    def plot(self) -> str:
        """SVG: of each split the accuracy before and after, and the shares of its rows that were forgotten and learned."""
        names = [clipped(one.split, 18) + (" *" if one.general else "") for one in self.changes]
        at = np.arange(len(names))[::-1]

        def paint(figure: Any) -> None:
            right, turned = figure.subplots(1, 2, sharey=True)
            ends = [
                [100 * one.accuracy_before for one in self.changes],
                [100 * one.accuracy_after for one in self.changes],
            ]
            right.hlines(at, *ends, color=DARK, linewidth=1)
            right.plot(ends[0], at, "s", color=AMBER, markersize=9, label="before", zorder=3)
            right.plot(ends[1], at, "o", color=DARK, markersize=5.5, label="after", zorder=3)
            right.set_xlabel("accuracy (% of rows)")
            right.set_yticks(at, names)
            right.set_ylim(-0.6, len(names) - 0.4)
            right.margins(x=0.12)
            for one, y in zip(self.changes, at, strict=True):
                lost, won = (100 * len(rows) / one.rows for rows in (one.forgotten, one.learned))
                turned.barh(y, -lost, 0.5, color=AMBER, label="forgotten" if y == at[0] else None)
                turned.barh(y, won, 0.5, color=DARK, label="learned" if y == at[0] else None)
                for x, count, side in ((-lost, len(one.forgotten), -1), (won, len(one.learned), 1)):
                    turned.annotate(
                        f"{count}", (x, y), (4 * side, 0), textcoords="offset points", va="center",
                        ha="left" if side > 0 else "right", size=9,
                    )  # fmt: skip
            turned.axvline(0, color=DARK, linewidth=0.8)
            most = max(1.0, *(100 * max(len(one.forgotten), len(one.learned)) / one.rows for one in self.changes))
            turned.set_xlim(-1.45 * most, 1.45 * most)
            turned.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
            turned.set_xlabel("changed (% of rows; number)")
            for axes in (right, turned):
                axes.grid(visible=False, axis="y")
                axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)

        label = "Accuracy of each split before and after, and the rows that were forgotten and learned"
        return draw(paint, name="forgetting", label=label, height=1.6 + 0.42 * len(names))


def change(split: str, before: Array, after: Array, labels: Array, *, general: bool = False) -> Change:
    """What happened between two models on the same rows.

    Args:
        before, after: shape (n, k), logits.
        labels: shape (n,), class numbers.
    Raises:
        DataError: no rows, or the shapes disagree.
    """
    if not len(labels) or before.shape != after.shape or len(before) != len(labels):
        must = "must have at least one row, and two outputs for each"
        got = f"{len(before)} and {len(after)} outputs for {len(labels)} rows"
        raise DataError.of([Fault(split, must, got)], "a study of forgetting")
    had, has = before.argmax(axis=1) == labels, after.argmax(axis=1) == labels
    return Change(
        split=split,
        general=general,
        rows=len(labels),
        right_before=int(had.sum()),
        right_after=int(has.sum()),
        nll_before=nll(before, labels),
        nll_after=nll(after, labels),
        forgotten=tuple(np.flatnonzero(had & ~has).tolist()),
        learned=tuple(np.flatnonzero(~had & has).tolist()),
        p=mcnemar(had, has).p,
    )


def study(
    splits: Mapping[str, tuple[Array, Array, Array]],
    *,
    since: str,
    general: str | None = None,
    notes: Sequence[str] = (),
) -> Forgetting:
    """The change on every split.

    Args:
        splits: name -> (logits before, logits after, labels).
        since: the stage at whose start ``before`` is.
        general: the split that stands for what should not be lost, ``NAME`` or ``ood_NAME``; None = all shifted tests, else ``test``.
    Raises:
        DataError: there is no such split, or what ``change`` raises.
    """
    if not splits:
        raise DataError.of([Fault("the data", "must hold out at least one split")], "a study of forgetting")
    chosen = general_of(list(splits), general)
    order = [*chosen, *(name for name in splits if name not in chosen)]
    return Forgetting(since, tuple(change(name, *splits[name], general=name in chosen) for name in order), tuple(notes))


def general_of(splits: Sequence[str], asked: str | None) -> list[str]:
    """The general splits among ``splits``.

    >>> general_of(["test", "ood_a", "ood_b"], None), general_of(["validation", "test"], None)
    (['ood_a', 'ood_b'], ['test'])
    >>> general_of(["test", "ood_a", "ood_b"], "b")
    ['ood_b']
    """
    if asked is None:
        shifted = [name for name in splits if name.startswith("ood_")]
        return shifted or [name for name in splits if name == "test"] or list(splits)
    found = [name for name in splits if name in (asked, f"ood_{asked}")]
    if not found:
        do = f"There are: {', '.join(name.removeprefix('ood_') for name in splits)}."
        raise DataError.of([Fault("--general", "must be a split that is held out", asked, do)], "a study of forgetting")
    return found[:1]


def _sentence(one: Change) -> str:
    """What happened on a split, in words."""
    told = f"{one.split}: of {one.right_before} rows that were right {len(one.forgotten)} are wrong now"
    return f"{told}, of {one.rows - one.right_before} that were wrong {len(one.learned)} are right now."


def _p(value: float) -> str:
    """
    >>> _p(0.625), _p(1.0), _p(0.0004)
    ('.625', '1', '<.001')
    """
    return "1" if value >= 0.9995 else "<.001" if value < 0.001 else f"{value:.3f}"[1:]
