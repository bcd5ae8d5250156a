"""Temperature scaling: one number divides all logits, so that confidence on the validation rows fits their accuracy.

Source: Guo, Pleiss, Sun, Weinberger, ICML 2017, section 4.2 (arXiv:1706.04599); the fit is ``scores.fit_temperature``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from luthier.core.claims import Claim, Place, owns
from luthier.core.context import Context
from luthier.core.ingredient import Findings, Ingredient, Outputs, ingredient
from luthier.core.scores import HIGHEST, LOWEST, fit_temperature

FEW = 50


@ingredient
class Temperature(Ingredient):
    """Divides the logits by the T that minimises the mean cross-entropy of the validation rows.

    Which class wins never changes. Only the split ``validation`` is read. Regression, and runs without that split, are
    left alone, with a note. When the best T lies outside what is searched (such as when every validation row is right),
    predictions are left as they are.
    """

    def touches(self) -> tuple[Claim, ...]:
        return (owns(Place.PREDICTIONS),)

    def measure(self, outputs: Mapping[str, Outputs], ctx: Context) -> Findings | None:
        split = outputs.get("validation")
        if split is None or not len(split.targets):
            ctx.note("temperature needs validation rows; there are none, so predictions are left as they are.")
            return None
        if split.logits.ndim != 2 or split.logits.shape[1] < 2 or not np.issubdtype(split.targets.dtype, np.integer):
            ctx.note("temperature is for classification; predictions of numbers are left as they are.")
            return None
        if not np.isfinite(split.logits).all():
            ctx.note(
                "temperature needs logits that are finite numbers; some are not, so predictions are left as they are."
            )
            return None
        fit = fit_temperature(split.logits, split.targets)
        if fit.at_bound:
            unused = {"temperature": 1.0, "nll_before": fit.nll_before, "nll_after": fit.nll_before}
            why = "every row is right, or they are no better than chance"
            note = f"the best temperature lies outside {LOWEST:g} to {HIGHEST:g} ({why}), so none is used."
            return Findings(unused, notes=(note,))
        values = {"temperature": fit.value, "nll_before": fit.nll_before, "nll_after": fit.nll_after}
        rows = len(split.targets)
        few = f"the temperature is fitted on {rows} validation rows; with fewer than {FEW} it may not help on new ones."
        return Findings(values, scale=(1.0 / fit.value,), notes=(few,) if rows < FEW else ())
