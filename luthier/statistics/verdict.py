"""What a comparison over seeds comes to, in a sentence: who beats whom by how much, or what could not be told and what it would take.

A claim is made only where p, corrected over all comparisons made together, is below alpha and the interval excludes 0. The two look at
different things: sign flips at the seeds, exactly and whatever the distribution, but on these test rows; the interval at seeds and
rows together, by a t distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from luthier.statistics.arrays import refuse, share
from luthier.statistics.exact import holm, sign_flips
from luthier.statistics.paired import Difference, Interval, interval
from luthier.statistics.power import MOST_SEEDS, smallest_detectable
from luthier.statistics.simulate import COARSE, seeds_to_claim, smallest_detectable_simulated

Test = Literal["sign flips", "t"]
POWER = 0.8  # of what ``detectable`` and ``seeds_needed`` say


@dataclass(frozen=True)
class Unit:
    """How a difference is told: ``factor`` times its value, ``digits`` after the point, and a name."""

    name: str = "points"
    factor: float = 100.0
    digits: int = 1


POINTS = Unit()  # of accuracy and F1
PLAIN = Unit("", 1.0, 3)


@dataclass(frozen=True)
class Pair:
    """Two recipes on one split: ``found`` is ``one`` minus ``other``, larger is better."""

    one: str
    other: str
    on: str
    found: Difference


@dataclass(frozen=True)
class Verdict:
    """What came of one pair.

    Args:
        interval: of level 1 - alpha, not corrected for the number of comparisons; its p is that of the t distribution.
        p: of ``test``; p_adjusted: corrected by Holm over all ``comparisons``.
        floor: what ``p_adjusted`` would be at the least, had the seeds of this pair agreed perfectly.
        claimed: whether p_adjusted < alpha and 0 is outside the interval.
        detectable: the smallest true difference that would be claimed with chance 0.8, about, in the metric's unit; infinite where none.
        seeds_needed: seeds to claim the difference seen with chance 0.8, about; None where no number of seeds would do.
    """

    pair: Pair
    interval: Interval
    test: Test
    comparisons: int
    alpha: float
    p: float
    p_adjusted: float
    floor: float
    claimed: bool
    detectable: float
    seeds_needed: int | None


def verdicts(
    pairs: Sequence[Pair], *, alpha: float = 0.05, test: Test = "sign flips", undefined: int = 0
) -> tuple[Verdict, ...]:
    """The verdict on each of ``pairs``, which are corrected together: all that will be told side by side belongs in one call.

    Args:
        test: whose p is corrected. "sign flips" needs no assumption and 6 seeds or more (alpha 0.05, one comparison); "t" is the
            interval's own p, can claim with fewer, and trusts that differences are normal from seed to seed.
        undefined: further pairs, of which there is no verdict; they count in the correction, with p = 1.
    """
    share(alpha, "alpha")
    if test not in ("sign flips", "t"):
        raise refuse("test", "must be 'sign flips' or 't'", test)
    looked = [interval(pair.found, level=1 - alpha) for pair in pairs]
    if test == "sign flips":
        flips = [sign_flips(pair.found.by_seed) for pair in pairs]
        p, least = [flip.p for flip in flips], [flip.smallest for flip in flips]
    else:
        p, least = [seen.p for seen in looked], [0.0] * len(pairs)
    corrected, made, many = holm([*p, *[1.0] * undefined]), [], len(pairs) + undefined
    for at, (pair, seen) in enumerate(zip(pairs, looked, strict=True)):
        made.append(
            Verdict(
                pair=pair,
                interval=seen,
                test=test,
                comparisons=many,
                alpha=alpha,
                p=p[at],
                p_adjusted=corrected[at],
                floor=holm([*p[:at], least[at], *p[at + 1 :], *[1.0] * undefined])[at],
                claimed=corrected[at] < alpha and (seen.low > 0 or seen.high < 0),
                detectable=_detectable(pair.found, alpha, many, test),
                seeds_needed=seeds_to_claim(
                    pair.found.mean,
                    pair.found.spread,
                    alpha=alpha,
                    shared=pair.found.shared,
                    comparisons=many,
                    flips=test == "sign flips",
                ),
            )
        )
    return tuple(made)


def _detectable(found: Difference, alpha: float, many: int, test: Test) -> float:
    if test == "sign flips" and found.seeds <= COARSE:
        return smallest_detectable_simulated(
            found.spread, found.seeds, alpha=alpha, shared=found.shared, comparisons=many
        )
    return smallest_detectable(found.spread, found.seeds, alpha=alpha / many, shared=found.shared)


def sentence(verdict: Verdict, *, unit: Unit = POINTS) -> str:
    """The outcome of one pair in plain words."""
    pair, seen, seeds = verdict.pair, verdict.interval, verdict.pair.found.seeds
    where = f" on {pair.on}" if pair.on else ""
    if verdict.claimed:
        one, other, sign = (pair.one, pair.other, 1) if seen.value > 0 else (pair.other, pair.one, -1)
        low, high = sorted((sign * seen.low, sign * seen.high))
        return f"{one} beats {other}{where} by {_told(sign * seen.value, low, high, unit)}"
    if not any(pair.found.by_seed) and seen.low == seen.high:
        return f"{pair.one} and {pair.other} score the same{where} with each of {seeds} seeds"
    apart = f"{pair.one} from {pair.other}{where}"
    holms = f" after Holm over {verdict.comparisons}" if verdict.comparisons > 1 else ""
    saw = _told(seen.value, seen.low, seen.high, unit)
    if verdict.floor >= verdict.alpha:
        why = f"their smallest possible p is {verdict.floor:.3g}{holms}, so nothing can be claimed"
        return f"{seeds} seeds cannot separate {apart} ({saw}): {why}, and {_wanted(verdict)}"
    saw += f", p = {verdict.p_adjusted:.2g}{holms}"
    if verdict.p_adjusted < verdict.alpha:
        rows = f"other test rows than these {pair.found.rows:,} might"
        return f"{seeds} seeds separate {apart}, but {rows} not ({saw}): {_wanted(verdict)}"
    least = _number(unit.factor * verdict.detectable, unit.digits) + _name(unit)
    sight = f"{seeds} see differences only from about {least} on"
    if unit == POINTS and verdict.detectable > 1:  # more than all
        sight = f"{seeds} see no difference that there can be"
    return f"{seeds} seeds cannot separate {apart} ({saw}): {_wanted(verdict)}, while {sight}"


def _wanted(verdict: Verdict) -> str:
    seeds, found = verdict.seeds_needed, verdict.pair.found
    if seeds is not None:
        return f"they would need about {max(seeds, found.seeds + 1):,}"
    # With ever more seeds the error falls to sqrt(shared), and no further.
    edge = stats.norm.isf(verdict.alpha / (2 * verdict.comparisons)) + stats.norm.isf(1 - POWER)
    if abs(found.mean) < edge * found.shared**0.5:
        return f"no number of seeds would do on {found.rows:,} test rows, more rows are needed"
    return f"they would need more than {MOST_SEEDS:,}"


def _told(value: float, low: float, high: float, unit: Unit) -> str:
    """``2.1 points [0.4, 3.9]``, with more digits where a bound that is not 0 would read 0.0."""
    digits = unit.digits
    while digits < 9 and any(bound and not float(_number(unit.factor * bound, digits)) for bound in (low, high)):
        digits += 1
    mean, least, most = (_number(unit.factor * number, digits) for number in (value, low, high))
    return f"{mean}{_name(unit)} [{least}, {most}]"


def _number(value: float, digits: int) -> str:
    return f"{value:z.{digits}f}"  # z: no minus before a zero


def _name(unit: Unit) -> str:
    return f" {unit.name}" if unit.name else ""
