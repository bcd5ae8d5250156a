"""Split conformal: sets of classes that hold the true one with a given chance, measured on every split.

Source: Vovk, Gammerman, Shafer 2005; scores of Sadinle, Lei, Wasserman, JASA 2019 (arXiv:1609.00451) and Romano, Sesia, Candes,
NeurIPS 2020 (arXiv:2006.02544); the mathematics is in ``core.conformal``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import Field

from luthier.core.calibration import unfit
from luthier.core.conformal import Sets, conformal_scores, conformal_threshold, coverage_range
from luthier.core.context import Context
from luthier.core.ingredient import Findings, Ingredient, Outputs, ingredient
from luthier.core.scores import Array, softmax

FEW = 50


def coverage_and_size(sets: Array, labels: Array) -> tuple[float, float]:
    """The share of sets that hold their label, and the mean number of classes in a set.

    Args:
        sets: shape (n, k), whether each class is in.
        labels: shape (n,), class numbers.
    """
    return float(sets[np.arange(len(labels)), labels].mean()), float(sets.sum(axis=1).mean())


@ingredient
class Conformal(Ingredient):
    """Measures prediction sets: how often they hold the true class and how large they are, with a threshold from validation.

    Changes no prediction; ``predict`` gives the sets beside its own. The sets are those of the model as it was trained, before any
    calibration. Regression, and runs without
    validation rows, are left alone, with a note.

    Args:
        alpha: share of sets that may miss the true class.
        score: ``lac`` (a set holds every class above one bound; the smallest sets) or ``aps`` (the likeliest classes until their sum
            reaches a bound; larger sets, whose coverage varies less from row to row).
    """

    alpha: float = Field(default=0.1, gt=0.0, lt=1.0)
    score: Literal["lac", "aps"] = "lac"

    def measure(self, outputs: Mapping[str, Outputs], ctx: Context) -> Findings | None:
        split = outputs.get("validation")
        why = unfit(split)
        if split is None or why:
            ctx.note(f"conformal {why}, so no prediction sets are measured.")
            return None
        n = len(split.targets)
        scores = conformal_scores(softmax(split.logits), self.score)[np.arange(n), split.targets]
        threshold = conformal_threshold(scores, self.alpha)
        sets = Sets(self.score, threshold)
        low, high = coverage_range(n, self.alpha)
        values = {"alpha": self.alpha, "threshold": threshold, "coverage_low": low, "coverage_high": high}
        told = []
        for name, other in outputs.items():
            if unfit(other):
                continue
            covered, size = coverage_and_size(sets.of(softmax(other.logits)), other.targets)
            values |= {f"coverage_{name}": covered, f"set_size_{name}": size}
            told.append(f"{name} {100 * covered:.1f} % with {size:.2f} classes a set")
        notes = [f"prediction sets ({self.score}) for {100 * (1 - self.alpha):g} % coverage: {', '.join(told)}."]
        if np.isinf(threshold):
            notes.append(f"{n} validation rows are too few for alpha {self.alpha:g}: every set holds all classes.")
        elif n < FEW:
            spread = f"on new rows like them coverage may be {100 * low:.0f} to {100 * high:.0f} %"
            notes.append(f"the threshold of the prediction sets is fitted on {n} validation rows; {spread}.")
        return Findings(values, sets=sets, notes=tuple(notes))
