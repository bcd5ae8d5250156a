"""Where a search looks: ``[RECIPE:]PATH=SPACE`` as frozen values. Nothing here knows of Optuna or of runs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from luthier.errors import Fault, LuthierError, did_you_mean
from luthier.recipe import text as recipe_text
from luthier.recipe import values as yaml_values
from luthier.recipe.changes import place
from luthier.recipe.recipe import Recipe

KINDS = "log:LOW:HIGH, float:LOW:HIGH, int:LOW:HIGH[:STEP] or one:A,B,C"
NEVER = (
    "name",
    "description",
    "seed",
    "seeds",
    "task",
    "metric",
    "data",
)  # no method's settings; a lucky seed least of all


@dataclasses.dataclass(frozen=True)
class Space:
    """Values of one field.

    Args:
        kind: ``log`` (uniform in its logarithm), ``float`` (uniform), ``int``, or ``one`` of ``choices``.
        low, high: both may be taken.
    """

    kind: Literal["log", "float", "int", "one"]
    low: float = 0
    high: float = 0
    step: int = 1
    choices: tuple[Any, ...] = ()

    @property
    def every(self) -> Sequence[Any] | None:
        """All values, in order; None where there is no end of them."""
        if self.kind == "one":
            return self.choices
        return range(int(self.low), int(self.high) + 1, self.step) if self.kind == "int" else None

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values that a recipe must take for it to take all: the choices, or the least and the most."""
        every = self.every
        return self.choices or ((self.low, self.high) if every is None else (every[0], every[-1]))


def parse(told: str) -> Space:
    """
    >>> parse("log:1e-6:1e-4"), parse("one:linear, cosine").choices, list(parse("int:1:6:2").every)
    (Space(kind='log', low=1e-06, high=0.0001, step=1, choices=()), ('linear', 'cosine'), [1, 3, 5])

    Raises:
        LuthierError: it is none; with all that is wrong with it.
    """
    kind, _, rest = told.strip().partition(":")
    if kind == "one":
        return _one(told, rest)
    numbers: list[Any] = []
    try:
        numbers = [int(each) if kind == "int" else float(each) for each in rest.split(":")]
    except ValueError:
        pass
    if kind not in ("log", "float", "int") or len(numbers) not in ((2, 3) if kind == "int" else (2,)):
        raise LuthierError.of([Fault(told, f"must be {KINDS}")], "the space")
    low, high, *step = numbers
    faults = []
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        faults.append(Fault(told, "must have numbers with LOW below HIGH"))
    if kind == "log" and low <= 0:
        faults.append(Fault(told, "must have LOW above 0"))
    if step and step[0] < 1:
        faults.append(Fault(told, "must have a STEP of at least 1"))
    if faults:
        raise LuthierError.of(faults, "the space")
    return Space(kind, low, high, *step)  # type: ignore[arg-type]


def _one(told: str, rest: str) -> Space:
    choices = yaml_values.parse(f"[{rest}]", inside=told)
    if len({json.dumps(each) for each in choices}) < max(2, len(choices)):
        raise LuthierError.of([Fault(told, "must name two or more values, each once")], "the space")
    return Space("one", choices=tuple(choices))


def asked(given: Sequence[str], recipes: Mapping[str, Recipe]) -> dict[str, dict[str, str]]:
    """The spaces of each recipe that is searched, by path: ``{"ft": {"stages.0.lr": "log:1e-6:1e-4"}}``.

    Args:
        given: ``[RECIPE:]PATH=SPACE``; without RECIPE it is for every recipe that has PATH.
    Raises:
        LuthierError: not of that form, a recipe or path that is none, or values that a recipe refuses; all of these at once.
    """
    faults: list[Fault] = []
    found: dict[str, dict[str, str]] = {}
    taken: set[tuple[str, int, str]] = set()
    plain = {name: recipe.to_dict() for name, recipe in recipes.items()}
    for one in given:
        where = f"--search {one}"
        left, _, told = one.partition("=")
        name, colon, path = (part.strip() for part in left.rpartition(":"))
        if not path or not told:
            faults.append(Fault(where, "must be [RECIPE:]PATH=SPACE, such as stages.0.lr=log:1e-6:1e-4"))
            continue
        if colon and name not in recipes:
            faults.append(Fault(where, "must begin with a recipe's name", name, did_you_mean(name, recipes)))
            continue
        places = {own: place(plain[own], path) for own in ([name] if colon else recipes)}
        if not any(places.values()):
            faults.append(
                Fault(where, "must name a value that a recipe has", path, _hint(recipes[next(iter(places))], path))
            )
        elif path.split(".")[0] in NEVER:
            faults.append(Fault(where, f"must not be of {', '.join(NEVER)}", path, "They are no settings of a method."))
        try:
            space = parse(told)
        except LuthierError as error:
            faults += [dataclasses.replace(fault, where=where) for fault in error.faults]
            continue
        for own, found_at in places.items():
            if found_at is None:
                continue
            holder, key = found_at
            which = (own, id(holder), {"epochs": "steps"}.get(key, key))
            if which in taken:
                faults.append(Fault(where, f"must be searched once in {own}"))
            taken.add(which)
            faults += _refused(recipes[own], path, space, f"{where}, in {own}")
            found.setdefault(own, {})[path] = told.strip()
    if faults:
        raise LuthierError.of(list(dict.fromkeys(faults)), "the search")
    return found


def changes(values: Mapping[str, Any]) -> list[str]:
    """``values`` by path as the changes that ``--set`` takes.

    >>> changes({"stages.0.lr": 3e-05, "head": "mlp"})
    ['stages.0.lr=3e-05', 'head="mlp"']
    """
    return [f"{path}={json.dumps(value)}" for path, value in values.items()]


def _refused(recipe: Recipe, path: str, space: Space, where: str) -> list[Fault]:
    faults = []
    for value in space.ends:
        try:
            recipe_text.read(recipe, sets=changes({path: value}))
        except LuthierError as error:
            faults += [dataclasses.replace(fault, where=f"{where}: {fault.where}") for fault in error.faults]
    return faults


def _hint(recipe: Recipe, path: str) -> str:
    try:
        recipe_text.read(recipe, sets=[f"{path}=0"])
    except LuthierError as error:
        return next((fault.do for fault in error.faults), "")
    return ""


def grown(now: Any, before: Any, shared: Sequence[str]) -> Any:
    """The search of a comparison that goes on with recipes that were not there before, or with more budget; None where they are at odds.

    Args:
        now, before: ``{"spaces", "budget"}``; None = no search.
        shared: recipes of both; their spaces must be the same.
    """
    empty: dict[str, Any] = {"spaces": {}, "budget": {}}
    mine, theirs = now or empty, before or empty
    if any(mine["spaces"].get(name) != theirs["spaces"].get(name) for name in shared):
        return None
    spaces = {**theirs["spaces"], **mine["spaces"]}
    budgets = [one["budget"] for one in (theirs, mine) if one["budget"]]
    if len({tuple(one) for one in budgets}) > 1:
        return None  # runs before and minutes now
    return (
        {"spaces": spaces, "budget": {key: max(one[key] for one in budgets) for key in budgets[0]}} if budgets else {}
    )
