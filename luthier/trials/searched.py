"""A comparison's searches all together: doing them, what waits for them, what they found."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from luthier.core.scores import HIGHER_IS_BETTER
from luthier.errors import LuthierError
from luthier.trials.design import Design
from luthier.trials.desk import Desk
from luthier.trials.search import Do, Search, with_values


def searches(desk: Desk, design: Design) -> tuple[Search, ...]:
    """One a setting and recipe that has spaces."""
    spaces = design.more.get("search", {}).get("spaces", {})
    return tuple(Search(desk, design, one.name, recipe) for one in design.settings for recipe in spaces)


def search(desk: Desk, design: Design, do: Do, among: Collection[tuple[str, str]]) -> int:
    """Does this process' share of searches, in turn, until none has a run for it now; gives how many runs it did.

    Args:
        among: (setting, recipe) of those searches.
    """
    done = 0
    left = tuple(one for one in searches(desk, design) if (one.setting, one.recipe) in among)
    while left:
        left = tuple(one for one in left if one.step(do))
        done += len(left)
    return done


def waiting(desk: Desk, design: Design) -> set[tuple[str, str]]:
    """(setting, recipe) whose runs wait for a search that is not over."""
    return {(one.setting, one.recipe) for one in searches(desk, design) if not one.over}


def resolved(desk: Desk, design: Design) -> Design:
    """The design whose recipes have the values that were found, where a search is over."""
    for one in searches(desk, design):
        if one.over:
            design = with_values(design, one.setting, one.recipe, (one.winner or {})["values"])
    return design


def chosen(desk: Desk, design: Design) -> dict[str, Any]:
    """What was found, by recipe; with several settings by ``RECIPE on SETTING``."""
    several = len(design.settings) > 1
    found = [(one, one.winner) for one in searches(desk, design)]
    return {f"{one.recipe} on {one.setting}" if several else one.recipe: won for one, won in found if won}


def progress(desk: Desk, design: Design) -> dict[str, str]:
    """A line for each search of which a run has ended: how far it is, and the best score so far."""
    lines = {}
    for one in searches(desk, design):
        ended = [trial for trial in one.told() if "score" in trial]
        if not ended:
            continue
        minutes = sum(trial["seconds"] for trial in ended) / 60
        runs, most = one.budget.get("runs"), one.budget.get("minutes")
        line = f"search {one.name} " + (f"{len(ended)}/{runs}" if runs else f"{len(ended)}, {minutes:.1f}/{most:g} min")
        if scored := [trial for trial in ended if trial["score"] is not None]:
            best = max if HIGHER_IS_BETTER[scored[0]["metric"]] else min
            line += f": best {scored[0]['metric']} {best(trial['score'] for trial in scored):.4f} on validation"
        lines[one.name] = line
    return lines


def refuse_under_way(desk: Desk, before: Design, now: Design) -> None:
    """
    Raises:
        LuthierError: more search was asked for while runs with the settings found before are under way.
    """
    then, asked = before.more.get("search", {}), now.more.get("search", {})
    if then and then["budget"] != asked["budget"]:
        of = [trial for trial in before.trials() if trial.recipe in then["spaces"]]
        if busy := [trial.name for trial in of if desk.state(trial) == "running"]:
            why = f"{', '.join(busy)} under way with the settings found before"
            raise LuthierError(f"{why}.  Call again when they have ended; then the search goes on.")
