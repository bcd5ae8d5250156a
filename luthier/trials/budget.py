"""How much a search may cost: runs, or minutes of training; the same for each recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from luthier.errors import Fault, LuthierError

USUAL_RUNS = 10
HOPELESS = 10  # trials; a search by minutes whose first ones all failed is over


def read(told: int | str | None) -> dict[str, Any]:
    """
    >>> read(None), read("20"), read("30min")
    ({'runs': 10}, {'runs': 20}, {'minutes': 30.0})

    Raises:
        LuthierError: neither runs nor minutes.
    """
    written = str(USUAL_RUNS if told is None else told).strip()
    minutes = written.endswith("min")
    try:
        amount = float(written.removesuffix("min")) if minutes else int(written)
    except ValueError:
        amount = 0
    if not (amount > 0 and math.isfinite(amount)):
        raise LuthierError.of([Fault("--budget", "must be runs (20) or minutes (30min)", str(told))], "the search")
    return {"minutes": amount} if minutes else {"runs": amount}


def spent(budget: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no more is to be tried.

    Minutes are those of the runs that have ended, and for each that is under way as many as these took on average; the last run may go
    beyond them.

    Args:
        trials: what was asked for; those that have ended have score (None = failed) and seconds.
    """
    if "runs" in budget:
        return len(trials) >= int(budget["runs"])
    ended = [one for one in trials if "score" in one]
    if len(ended) >= HOPELESS and all(one["score"] is None for one in ended):
        return True
    total = sum(one["seconds"] for one in ended)
    usual = total / len(ended) if ended else 0.0
    return bool(trials) and bool(total + usual * (len(trials) - len(ended)) >= 60 * budget["minutes"])
