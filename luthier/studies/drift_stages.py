"""Drift in each stage of a run, side by side, and from the run's start to its end."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from luthier.studies.drift import Drift, Look, drift
from luthier.svg import AMBER, DARK, SOFT, clipped, draw, gaps

# as far apart in lightness as lines on white can be; the marks differ too
MARKS = ((DARK, "o"), (AMBER, "s"), ("#7b5ea7", "^"), ("#4f9488", "D"))


@dataclass(frozen=True)
class Span:
    """What one stage did; or several, ``first + second``, where the model between them is not known."""

    name: str
    drift: Drift

    @property
    def still(self) -> bool:
        """Whether no feature moved: the head alone changed."""
        return all(layer.diff == 0 and not layer.diff_outside for layer in self.drift.layers)


@dataclass(frozen=True)
class StagedDrift:
    """The study over stages.

    Args:
        spans: in order; together they are the whole run.
        whole: from the start of the run to its end.
        hidden: what is not shown and why, a sentence each.
    """

    spans: tuple[Span, ...]
    whole: Drift
    hidden: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The whole run's numbers as ``Drift`` has them, and ``stages``: the same for each span under its name, ``stage``."""
        told = [{"stage": span.name, **span.drift.to_dict()} for span in self.spans]
        return {**self.whole.to_dict(), "stages": told, "hidden": list(self.hidden)}

    def lines(self) -> list[str]:
        """The study as text of at most 80 columns, grouped by stage."""
        notes = [line for told in self.hidden for line in ("", *textwrap.wrap(told, 80))]
        if len(self.spans) == 1:
            return self.whole.lines() + notes
        outside = f" Outside: {self.whole.rows_outside} rows." if self.whole.rows_outside else ""
        told = [f"Features of {self.whole.rows} rows, before and after each stage.{outside}"]
        for span in self.spans:
            told += ["", *_headed(span.name, span.drift), *(["no feature moved"] if span.still else span.drift.table())]
        moved = [span for span in self.spans if not span.still]
        told += ["", *_headed("from start to end", self.whole)]
        if len(moved) > 1:
            told += self.whole.table()
        elif moved:
            told += textwrap.wrap(f"the features as in {moved[0].name}", 80)
        else:
            told += ["no feature moved"]
        return [*told, "", *self.whole.legend(), *notes]

    def plot(self) -> str:
        """SVG: each layer's displacement and likeness in each stage, and its Fisher ratio between the stages."""
        if len(self.spans) == 1:
            return self.whole.plot()
        at = range(len(self.whole.layers))

        def paint(figure: Any) -> None:
            moved, like, apart = figure.subplots(3, 1, sharex=True)
            for span, (colour, mark) in zip(self.spans, itertools.cycle(MARKS), strict=False):
                look: dict[str, Any] = {"color": colour, "marker": mark, "markersize": 5.5, "clip_on": False}
                layers = span.drift.layers
                moved.plot(at, [layer.diff for layer in layers], "-", label=clipped(span.name, 24), **look)
                like.plot(at, gaps([layer.cka for layer in layers]), "-", **look)
                if span.still:
                    continue  # its rows outside did not move either, and its Fisher ratio is what it was
                apart.plot(at, gaps([layer.fdr_after for layer in layers]), "-", **look)
                if self.whole.rows_outside:
                    far = gaps([layer.diff_outside for layer in layers])
                    moved.plot(at, far, "--", **{**look, "markersize": 8.0}, markerfacecolor="white", zorder=1.9)
            if self.whole.rows_outside:
                moved.plot([], [], "o--", color=SOFT, markerfacecolor="white", label="rows outside")
            first = gaps([layer.fdr_before for layer in self.whole.layers])
            apart.plot(at, first, "x:", color=SOFT)
            moved.plot([], [], "x:", color=SOFT, label="FDR at the start")
            moved.set_ylim(bottom=0)
            moved.set_ylabel("moved (L2)")
            like.set_ylabel("CKA (1: same)")
            apart.set_ylabel("FDR after it (no unit)")
            apart.set_xlabel("block, and what the head reads")
            apart.set_xticks(list(at), [layer.name.removeprefix("block ") for layer in self.whole.layers])
            wide = max(len(span.name) for span in self.spans) > 18
            moved.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2 if wide else 3)

        label = "How far each layer's features moved in each stage, and how alike they stayed"
        return draw(paint, name="drift", label=label, height=6.4)


def by_stage(
    starts: Sequence[tuple[str, Look | None]], end: Look, *, hidden: Sequence[str] = (), ridge: float = 1e-3
) -> StagedDrift:
    """The drift of each stage and of the whole.

    Args:
        starts: of each stage its name and a look at the model when it begins; None where that is not known, but for the first.
        end: a look at the model when the last stage has ended.
        hidden: which of them are not known and why, in sentences.
    Raises:
        DataError: the looks are not of the same rows.
    """
    first = starts[0][1]
    assert first is not None  # the start of a run is always there
    spans, names, begun = [], list[str](), first
    for (name, _), then in zip(starts, [*(look for _, look in starts[1:]), end], strict=True):
        names.append(name)
        if then is not None:
            spans.append(Span(" + ".join(names), drift(begun, then, ridge=ridge)))
            begun, names = then, []
    return StagedDrift(tuple(spans), drift(first, end, ridge=ridge), tuple(hidden))


def _headed(name: str, found: Drift) -> list[str]:
    return textwrap.wrap(f"{name}: norm of the head {found.head_norm_before:.4g} -> {found.head_norm_after:.4g}", 80)
