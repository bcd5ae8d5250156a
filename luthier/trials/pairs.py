"""Recipes against each other: differences paired by seed and test row, and what can be claimed of them.

In each setting two families of comparisons are corrected, each by itself: all pairs of recipes on the split that is looked at first, and
all pairs on all shifted tests together. So the chance of a false claim is at most alpha in each family, and not in all together.

Where streams vary apart, runs that share a head's start or an order are no independent seeds, so only the diagonal of the grid is paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from luthier import evaluate
from luthier.comparison import Setting, Versus
from luthier.core.ingredient import Outputs
from luthier.core.scores import HIGHER_IS_BETTER, Array, ece, log_softmax, softmax
from luthier.errors import DataError
from luthier.statistics.exact import mcnemar, smallest_p
from luthier.statistics.paired import Difference, difference, difference_by
from luthier.statistics.verdict import PLAIN, POINTS, Pair, Test, Unit, Verdict, sentence, verdicts
from luthier.trials.design import independent

ALPHA = 0.05
RESAMPLES = 400  # of the rows, for metrics that are no mean over rows


@dataclass(frozen=True)
class Seen:
    """A run that has ended: whose it is, and what it said of each split's rows."""

    recipe: str
    seeds: tuple[tuple[str, int], ...]
    outputs: Mapping[str, Outputs]


def unit_of(metric: str) -> Unit:
    """How differences of ``metric`` are told: points for what is a share of rows, else plain numbers."""
    return POINTS if metric in ("accuracy", "f1_macro") else PLAIN


def versus(
    setting: Setting,
    runs: Sequence[Seen],
    recipes: Sequence[str],
    metric: str,
    against: str | None = None,
    *,
    selected: bool = False,
) -> list[Versus]:
    """Every pair of recipes on every split that nothing was chosen on: test and shifted tests, or validation where that is all.

    Args:
        against: only pairs with this recipe, which then comes second.
        selected: whether the runs were chosen, so that their seeds are no random sample: differences are told where both recipes have
            two seeds in common, and nothing is claimed of them.
    """
    by: dict[str, dict[tuple[tuple[str, int], ...], Seen]] = {name: {} for name in recipes}
    for run in runs:
        by[run.recipe][run.seeds] = run
    shifted = [split for split in setting.splits if split.startswith("ood_")]
    made = []
    for family in ([setting.shown], shifted):
        many, single, undefined = [], [], 0
        for split in family:
            for one, other in couples(recipes, against):
                both = [seeds for seeds in by[one] if seeds in by[other] and independent(seeds)]
                if len(both) < (2 if selected else 1):
                    continue
                mine, theirs = ([by[name][seeds].outputs[split] for seeds in both] for name in (one, other))
                try:
                    if len(both) == 1:
                        single.append(_one_seed(setting, split, one, other, mine[0], theirs[0], metric))
                        continue
                    pair = Pair(one, other, split, _difference(mine, theirs, metric))
                except DataError as error:
                    single.append(_undefined(setting, split, one, other, mine, theirs, metric, error))
                    undefined += 1
                    continue
                if selected:
                    single.append(_selected(setting, pair, metric))
                else:
                    many.append(pair)
        made += [_told(setting, verdict, metric) for verdict in _judged(many, undefined)] + single
    return made


def couples(recipes: Sequence[str], against: str | None) -> list[tuple[str, str]]:
    """The recipes to compare, two and two: all, or each with ``against``, which comes second."""
    if against is not None:
        return [(one, against) for one in recipes if one != against and against in recipes]
    return [(one, other) for other, one in combinations(recipes, 2)]


def _judged(pairs: Sequence[Pair], undefined: int) -> tuple[Verdict, ...]:
    """By sign flips where so many seeds can claim something after correction, else by t; the results do not decide which.

    Args:
        undefined: pairs of the family whose metric is not defined; they count in the correction.
    """
    if not pairs:
        return ()
    seeds = min(pair.found.seeds for pair in pairs)
    test: Test = "sign flips" if smallest_p(seeds) * (len(pairs) + undefined) < ALPHA else "t"
    return verdicts(pairs, alpha=ALPHA, test=test, undefined=undefined)


def _difference(one: Sequence[Outputs], other: Sequence[Outputs], metric: str) -> Difference:
    by_row = ROWS.get(metric)
    if by_row is not None:
        return difference(*(np.array([by_row(out) for out in side]) for side in (one, other)))

    def scorer(side: Sequence[Outputs]) -> Callable[[Array], Array]:
        return lambda at: np.array([_score(Outputs(out.logits[at], out.targets[at]), metric) for out in side])

    return difference_by(scorer(one), scorer(other), len(one[0].targets), resamples=RESAMPLES)


def _score(out: Outputs, metric: str) -> float:
    """Larger is better; nan where the metric is not defined."""
    if metric in ROWS:
        return float(ROWS[metric](out).mean())
    score = _SCORES[metric](out)
    return math.nan if score is None else float(score if HIGHER_IS_BETTER[metric] else -score)


def _right(out: Outputs) -> Array:
    return np.asarray(out.logits.argmax(axis=1) == out.targets)


def _likelihood(out: Outputs) -> Array:
    return np.asarray(log_softmax(out.logits)[np.arange(len(out.targets)), out.targets.astype(int)])


def _square(out: Outputs) -> Array:
    likely = softmax(out.logits)
    likely[np.arange(len(out.targets)), out.targets.astype(int)] -= 1.0
    return np.asarray(-np.square(likely).sum(axis=1))


def _gap(out: Outputs) -> Array:
    return np.asarray(-np.abs(out.logits[:, 0] - out.targets))


# Metrics that are means over rows: of each row, larger is better.
ROWS: dict[str, Callable[[Outputs], Array]] = {"accuracy": _right, "nll": _likelihood, "brier": _square, "mae": _gap}
_SCORES: dict[str, Callable[[Outputs], float | None]] = {
    "f1_macro": lambda out: evaluate.f1_macro(out.logits.argmax(axis=1), out.targets),
    "mcc": lambda out: evaluate.mcc(out.logits.argmax(axis=1), out.targets),
    "auroc": lambda out: evaluate.auroc(out.logits, out.targets),
    "ece": lambda out: ece(out.logits, out.targets),
    "rmse": lambda out: evaluate.rmse(out.logits[:, 0], out.targets),
    "pearson": lambda out: evaluate.pearson(out.logits[:, 0], out.targets),
    "spearman": lambda out: evaluate.spearman(out.logits[:, 0], out.targets),
}


def _told(setting: Setting, verdict: Verdict, metric: str) -> Versus:
    seen, pair, told = verdict.interval, verdict.pair, sentence(verdict, unit=unit_of(metric))
    optimistic = pair.on == setting.chosen_on
    if optimistic:
        told = f"nothing is claimed on {pair.on}, by which some recipe chose weights or rates; as numbers go, {told}"
    return Versus(
        setting=setting.name,
        split=pair.on,
        one=pair.one,
        other=pair.other,
        value=seen.value,
        low=seen.low,
        high=seen.high,
        by_seed=pair.found.by_seed,
        p=verdict.p,
        p_adjusted=verdict.p_adjusted,
        comparisons=verdict.comparisons,
        test=verdict.test,
        claimed=verdict.claimed and not optimistic,
        detectable=verdict.detectable if math.isfinite(verdict.detectable) else None,
        seeds_needed=verdict.seeds_needed,
        sentence=told,
    )


def _selected(setting: Setting, pair: Pair, metric: str) -> Versus:
    """Runs that were chosen by validation: their mean difference, of which neither an interval nor a p would mean anything."""
    found, unit = pair.found, unit_of(metric)
    told = f"{unit.factor * found.mean:+.{unit.digits}f}{' ' + unit.name if unit.name else ''}"
    seeds = f"{told} over the {found.seeds} seeds that both kept"
    why = "their runs were chosen by validation, so they are no random sample of seeds"
    told = f"nothing is claimed of {pair.one} and {pair.other} on {pair.on} ({seeds}): {why}"
    return _unclaimed(setting, pair.on, pair.one, pair.other, (found.mean, found.mean, found.mean), found.by_seed, told)


def _one_seed(
    setting: Setting, split: str, one: str, other: str, mine: Outputs, theirs: Outputs, metric: str
) -> Versus:
    """Two single models. Nothing is claimed of their recipes, whatever p is."""
    unit = unit_of(metric)
    by_row = ROWS.get(metric)
    if by_row is None:
        apart = _difference([mine, mine], [theirs, theirs], metric).by_seed[0]
        low = high = apart
        p, test = 1.0, "none"
    else:
        rows = np.asarray(by_row(mine), dtype=np.float64) - np.asarray(by_row(theirs), dtype=np.float64)
        apart = float(rows.mean())
        spread = 1.96 * float(rows.std(ddof=1)) / math.sqrt(len(rows)) if len(rows) > 1 else 0.0
        low, high = apart - spread, apart + spread
        p, test = (mcnemar(_right(mine), _right(theirs)).p, "McNemar") if metric == "accuracy" else (1.0, "none")
    told = f"{unit.factor * apart:+.{unit.digits}f}{' ' + unit.name if unit.name else ''}"
    why = f", McNemar p = {p:.2g} for these two models" if test == "McNemar" else ""
    told = f"one seed cannot separate {one} from {other} on {split}: {told}{why}; run more seeds"
    return _unclaimed(setting, split, one, other, (apart, low, high), (apart,), told, p=p, test=test)


def _undefined(
    setting: Setting,
    split: str,
    one: str,
    other: str,
    mine: Sequence[Outputs],
    theirs: Sequence[Outputs],
    metric: str,
    error: DataError,
) -> Versus:
    """A pair with a run, or too few rows, of which the metric or the statistics can tell nothing; the difference is nan."""
    scores = {name: [_score(out, metric) for out in side] for name, side in ((one, mine), (other, theirs))}
    gone = {name: sum(not math.isfinite(score) for score in each) for name, each in scores.items()}
    runs = " and ".join(f"{many} of {len(mine)} runs of {name}" for name, many in gone.items() if many)
    why = f"{metric} is not defined for {runs}"
    if not runs:
        told = "; ".join(f"{fault.where} {fault.must}; got {fault.got}" for fault in error.faults)
        why = f"its rows give no interval of {metric} ({told})"
    elif metric in ("pearson", "spearman"):
        why += ", where all predictions or all targets are the same"
    told = f"nothing is claimed of {one} and {other} on {split}: {why}"
    by_seed = tuple(a - b for a, b in zip(*scores.values(), strict=True))
    return _unclaimed(setting, split, one, other, (math.nan, math.nan, math.nan), by_seed, told)


def _unclaimed(
    setting: Setting,
    split: str,
    one: str,
    other: str,
    seen: tuple[float, float, float],
    by_seed: tuple[float, ...],
    told: str,
    *,
    p: float = 1.0,
    test: str = "none",
) -> Versus:
    """A difference, as value, low and high, of which nothing is claimed whatever p is."""
    value, low, high = seen
    return Versus(
        setting=setting.name,
        split=split,
        one=one,
        other=other,
        value=value,
        low=low,
        high=high,
        by_seed=by_seed,
        p=p,
        p_adjusted=p,
        comparisons=1,
        test=test,
        claimed=False,
        detectable=None,
        seeds_needed=None,
        sentence=told,
    )
