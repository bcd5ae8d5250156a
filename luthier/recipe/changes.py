"""Places in a recipe's plain values by path, and changes of what stands there, as ``--set`` has them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from luthier.errors import Fault, did_you_mean
from luthier.recipe import registry
from luthier.recipe.recipe import ALIASES, Recipe, Stage
from luthier.recipe.values import parse

_NUMBER = re.compile(r"-?[0-9]+")


def changed(plain: dict[str, Any], change: str) -> Fault | None:
    """Makes a change such as ``stages.finetune.lr=3e-5`` in place; what is wrong with it where it cannot be made.

    Args:
        plain: a recipe's plain values, as they were written.
    """
    path, found, value = change.partition("=")
    if not found:
        return Fault(change, "must be PATH=VALUE, such as stages.1.lr=3e-5")
    *steps, last = path.strip().split(".")
    if meant := _in_stages(plain, path.strip().removeprefix("stages.")):
        return Fault(path, "must say where it stands", do=f"Did you mean {' or '.join(meant)}?")
    here: Any = plain
    if steps and steps[0] in _mappings() and plain.get(steps[0]) is None:
        plain[steps[0]] = {}
    for step in steps:
        below = _below(here, step)
        if below is None:
            return Fault(path, f"there is no {step!r} here", do=_known(here, step))
        here = below
    if isinstance(here, list):
        return Fault(path, "must name a value, not a list's item", do=_whole(here, steps, last, value))
    if not isinstance(here, dict):
        return Fault(path, "must name a value inside a mapping")
    name = ALIASES.get(last, last)
    known = parse(value, inside=change)
    if "stages" in steps:
        other = {"epochs": "steps", "steps": "epochs"}.get(name)
        for key in [
            key for key in here if ALIASES.get(key, key) == other or (key != name and ALIASES.get(key) == name)
        ]:
            del here[key]
    here[name] = known
    return None


def _in_stages(plain: Mapping[str, Any], path: str) -> list[str]:
    """Whole paths of what ``path`` begins with, where that is no field of a recipe but of its stages or their ingredients."""
    first, *rest = path.split(".")
    if first in _fields(Recipe):
        return []
    found = []
    stages = plain.get("stages")
    for stage, own in zip(_names(stages), stages if isinstance(stages, list) else (), strict=True):
        if stage == first or not isinstance(own, dict):
            return []
        if not rest and ALIASES.get(first, first) in _fields(Stage):
            found.append(f"stages.{stage}.{path}")
        for name in _names(own.get("ingredients")):
            if name == first and rest:
                found.append(f"stages.{stage}.{path}")
            elif not rest and name in registry.INGREDIENTS and first in _fields(registry.find(name)):
                found.append(f"stages.{stage}.{name}.{path}")
    return found


def _fields(kind: type[Any]) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _mappings() -> set[str]:
    """The recipe's fields that are mappings and may be left out."""
    hints = get_type_hints(Recipe)
    return {name for name, hint in hints.items() if any(get_origin(one) is dict for one in get_args(hint))}


def place(plain: dict[str, Any], path: str) -> tuple[dict[str, Any], str] | None:
    """What holds the value that ``path`` names, and its key there; None when there is no such value.

    Args:
        plain: a recipe's ``to_dict()``, every default filled in.
    """
    *steps, last = path.strip().split(".")
    here: Any = plain
    for step in steps:
        here = _below(here, step)
    name = ALIASES.get(last, last)
    return (here, name) if isinstance(here, dict) and name in here else None


def _below(here: Any, step: str) -> Any:
    if isinstance(here, dict):
        if step in here:
            return here[step]
        return _below(here["ingredients"], step) if "ingredients" in here else None
    if not isinstance(here, list):
        return None
    if _NUMBER.fullmatch(step):
        return here[int(step)] if -len(here) <= int(step) < len(here) else None
    for at, item in enumerate(here):
        if item == step:
            here[at] = {step: {}}
            return here[at][step]
        if isinstance(item, dict) and item.get("name") == step:
            return item
        if isinstance(item, dict) and len(item) == 1 and step in item:
            item[step] = item[step] or {}
            return item[step]
    return None


def _known(here: Any, step: str) -> str:
    if isinstance(here, dict):
        parts = _names(here.get("ingredients", ()))
        return did_you_mean(step, [*map(str, here), *parts]) or f"Known: {', '.join([*map(str, here), *parts])}."
    if not isinstance(here, list):
        return ""
    names = _names(here)
    return did_you_mean(step, names) or f"There are {len(here)}, counted from 0: {', '.join(names)}."


def _whole(here: list[Any], steps: list[str], last: str, value: str) -> str:
    """How a list that ``last`` should stand in is given: with all its items."""
    if steps[-1] == "stages":
        which = last if not here or _below(here, last) is not None else _names(here)[0]
        return f"Name a value of a stage, such as stages.{which}.lr=3e-5."
    items, item = list(here), parse(value, inside=value)
    if _NUMBER.fullmatch(last) and -len(items) <= int(last) < len(items):
        items[int(last)] = item
    else:
        items.append(item)
    told = yaml.safe_dump(items, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000).strip()
    return f"Give the whole list: '{'.'.join(steps)}={told}'."


def _names(items: Any) -> list[str]:
    """What the items of a list, stages or ingredients, go by."""
    told = items if isinstance(items, list) else []
    return [
        str(item.get("name") or (next(iter(item)) if len(item) == 1 else at)) if isinstance(item, dict) else str(item)
        for at, item in enumerate(told)
    ]
