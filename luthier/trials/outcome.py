"""The outcome of a comparison in sentences: one a pair where they are few, else one a winner."""

from __future__ import annotations

import math
from collections.abc import Sequence

from luthier.comparison import Versus
from luthier.statistics.verdict import Unit
from luthier.trials.pairs import unit_of

MOST = 8  # pairs that have a sentence each


def outcome(pairs: Sequence[Versus], metric: str, *, several: bool) -> tuple[str, ...]:
    """What can be claimed comes first; within each, as it came.

    Args:
        several: whether each sentence names its setting.
    """
    if len(pairs) <= MOST:
        ranked = sorted(pairs, key=lambda pair: not pair.claimed)
        return tuple(_in(pair, pair.sentence, several) for pair in ranked)
    claims, rest = [], []
    for setting, split in dict.fromkeys((pair.setting, pair.split) for pair in pairs):
        here = [pair for pair in pairs if (pair.setting, pair.split) == (setting, split)]
        won: dict[str, dict[str, float]] = {}
        for pair in here:
            if pair.claimed:
                winner, loser = (pair.one, pair.other) if pair.value > 0 else (pair.other, pair.one)
                won.setdefault(winner, {})[loser] = abs(pair.value)
        claims += [
            _in(here[0], _beaten(winner, losers, split, unit_of(metric)), several) for winner, losers in won.items()
        ]
        rest += [_in(pair, pair.sentence, several) for pair in here if math.isnan(pair.value)]  # it says why
        left = [pair for pair in here if not pair.claimed and not math.isnan(pair.value)]
        if left:
            rest.append(_in(here[0], _apart(left, split), several))
    return (*claims, *rest)


def _beaten(winner: str, losers: dict[str, float], split: str, unit: Unit) -> str:
    """
    >>> _beaten("mosbach", {"ft": 0.292, "lp": 0.192}, "test", Unit())
    'mosbach beats ft and lp on test by 19.2 to 29.2 points'
    """
    told = [f"{unit.factor * value:.{unit.digits}f}" for value in sorted(losers.values())]
    by = told[0] if told[0] == told[-1] else f"{told[0]} to {told[-1]}"
    return f"{winner} beats {listed(list(losers))} on {split} by {by}{' ' + unit.name if unit.name else ''}"


def _apart(pairs: Sequence[Versus], split: str) -> str:
    """Pairs of which nothing is claimed; those with one recipe in common are told by it."""
    seeds = min(len(pair.by_seed) for pair in pairs)
    which = f"{seeds} seed{'' if seeds == 1 else 's'} cannot separate"
    common = {pairs[0].one, pairs[0].other}.intersection(*({pair.one, pair.other} for pair in pairs))
    if common and len(pairs) > 1:
        one = common.pop()
        return (
            f"{which} {listed([pair.other if pair.one == one else pair.one for pair in pairs])} from {one} on {split}"
        )
    return f"{which} {listed([f'{pair.one} from {pair.other}' for pair in pairs])} on {split}"


def listed(names: Sequence[str], most: int = 15) -> str:
    """
    >>> listed(["a"]), listed(["a", "b", "c"]), listed(["a", "b", "c"], 2)
    ('a', 'a, b and c', 'a, b and 1 more')
    """
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _in(pair: Versus, sentence: str, several: bool) -> str:
    return f"{pair.setting}: {sentence}" if several else sentence
