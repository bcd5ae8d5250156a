"""What a comparison is asked, read: recipes, seeds, searches, early stopping. Every fault of all of these at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from luthier.core.scores import HIGHER_IS_BETTER
from luthier.errors import Fault, LuthierError, MissingExtra, did_you_mean
from luthier.recipe import text as recipe_text
from luthier.recipe.recipe import Recipe
from luthier.trials import budget as budgets
from luthier.trials import proposals, spaces
from luthier.trials.design import spread
from luthier.trials.early import Early

Recipes = Sequence[str | Path | Recipe] | Mapping[str, str | Path | Recipe]
T = TypeVar("T")


@dataclass(frozen=True)
class Told:
    """What was asked, as a design has it; ``more`` is what a search or an early stop adds."""

    recipes: dict[str, Recipe]
    seeds: tuple[dict[str, int], ...]
    more: dict[str, Any]


def read(
    recipes: Recipes,
    *,
    sets: Sequence[str],
    metric: str | None,
    against: str | None,
    seeds: int | Sequence[int] | None,
    vary: Sequence[str],
    early: str | None,
    search: Sequence[str],
    budget: int | str | None,
) -> Told:
    """
    Raises:
        LuthierError: what cannot be; all faults.
        MissingExtra: a search without Optuna.
    """
    faults: list[Fault] = []

    def tried(work: Callable[[], T]) -> T | None:
        try:
            return work()
        except MissingExtra:
            raise
        except LuthierError as error:
            faults.extend(error.faults or [Fault("", str(error))])
            return None

    known = tried(lambda: recipes_of(recipes, sets))
    tried(lambda: _named(known, metric, against))
    tried(lambda: spread(1, vary))
    stop = tried(lambda: None if early is None else Early.read(early))
    numbers = tried(lambda: _numbers(seeds, vary, stop, bool(search)))
    more: dict[str, Any] = {} if stop is None else {"early": dataclasses.asdict(stop)}
    if search:
        proposals.needed()
        amount = tried(lambda: budgets.read(budget))
        more["search"] = {"spaces": tried(lambda: spaces.asked(search, known or {})) if known else {}, "budget": amount}
    elif budget is not None:
        faults.append(Fault("--budget", "must come with --search, whose it is"))
    if faults or known is None or numbers is None:
        raise LuthierError.of(list(dict.fromkeys(faults)), "the comparison")
    return Told(known, numbers, more)


def recipes_of(given: Recipes, sets: Sequence[str]) -> dict[str, Recipe]:
    """Recipes by name, with their changes; every fault of every recipe at once."""
    named: list[tuple[str, str | Path | Recipe]] = []
    if isinstance(given, Mapping):
        named = list(given.items())
    else:
        for one in given:
            if isinstance(one, Recipe):
                named.append((one.name, one))
                continue
            told, equals, meant = str(one).partition("=")
            named.append((told, meant) if equals else (Path(one).stem, one))
    names = [name for name, _ in named]
    faults = [
        Fault(name, "must be named once", "two of that name", "Write one as NAME=RECIPE.")
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    faults += [
        Fault(name or "the name", "must be a folder's name", do="Letters, digits, . _ - +")
        for name in dict.fromkeys(names)
        if not name or not all(letter.isalnum() or letter in "._-+" for letter in name) or name.startswith(".")
    ]
    if not named:
        faults.append(Fault("--recipe", "must name a recipe"))
    own: dict[str, list[str]] = {name: [] for name in names}
    for change in sets:
        name, colon, rest = change.partition(":")
        if colon and "=" not in name:
            if name not in own:
                faults.append(
                    Fault(f"--set {change}", "must begin with a recipe's name", name, did_you_mean(name, own))
                )
            else:
                own[name].append(rest)
        else:
            for every in own.values():
                every.append(change)
    made = {}
    for name, spec in named:
        try:
            made[name] = dataclasses.replace(recipe_text.read(spec, sets=own[name]), name=name)
        except LuthierError as error:
            faults += inside(name, error)
    if faults:
        raise LuthierError.of(faults, "the recipes")
    return made


def inside(name: str, error: LuthierError) -> list[Fault]:
    """The faults of ``error``, each under ``name``."""
    if not error.faults:
        return [Fault(name, str(error).rstrip("."))]
    return [dataclasses.replace(fault, where=f"{name}: {fault.where}".rstrip(": ")) for fault in error.faults]


def _named(recipes: Mapping[str, Recipe] | None, metric: str | None, against: str | None) -> None:
    faults = []
    if metric is not None and metric not in HIGHER_IS_BETTER:
        faults.append(
            Fault(
                "--metric", f"must be of {', '.join(HIGHER_IS_BETTER)}", metric, did_you_mean(metric, HIGHER_IS_BETTER)
            )
        )
    if against is not None and recipes is not None and against not in recipes:
        faults.append(Fault("--against", f"must be of {', '.join(recipes)}", against, did_you_mean(against, recipes)))
    if faults:
        raise LuthierError.of(faults, "the comparison")


def _numbers(
    seeds: int | Sequence[int] | None, vary: Sequence[str], early: Early | None, searched: bool
) -> tuple[dict[str, int], ...]:
    """The seeds of every recipe: with early stopping as many as start."""
    if early is None:
        return spread(5 if seeds is None else seeds, vary)
    faults = []
    if searched:
        do = "What is found may change the schedule, which must be known beforehand: search, then compare what was found."
        faults.append(Fault("--search", "cannot be beside --early", do=do))
    if vary:
        do = "Where the spread comes from is told from a full grid of finished runs; drop one."
        faults.append(Fault("--vary", "cannot be beside --early", ", ".join(vary), do))
    if seeds is not None and list(range(seeds) if isinstance(seeds, int) else seeds) != list(range(early.start)):
        faults.append(Fault("--seeds", f"must be the {early.start} that --early starts", str(seeds), "Leave it out."))
    if faults:
        raise LuthierError.of(faults, "--early")
    return spread(early.start, ())
