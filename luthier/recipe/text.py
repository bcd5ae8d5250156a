"""Recipes as text: YAML <-> Recipe. All faults of a text are found before any is told."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from luthier.core.ingredient import Ingredient
from luthier.errors import Fault, RecipeError, did_you_mean
from luthier.jsonfile import expanded
from luthier.recipe import registry, shipped
from luthier.recipe.recipe import Recipe, Stage

T = TypeVar("T")
_NUMBER = re.compile(r"-?[0-9]+")
ALIASES = {"lr": "learning_rate", "num_train_epochs": "epochs", "max_steps": "steps"}


class _Loader(yaml.SafeLoader):
    """Safe YAML in which ``1e-5`` is a number and a key may stand only once."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d[\d_]*)(\.[\d_]*)?([eE][-+]?\d+)$|^[-+]?(\d[\d_]*)?\.\d[\d_]*([eE][-+]?\d+)?$|^[-+]?\d[\d_]*\.$"
    ),
    list("-+0123456789."),
)


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(None, None, "a key must be a name", key_node.start_mark)
        if key in found:
            raise yaml.MarkedYAMLError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
        found[key] = loader.construct_object(value_node, deep=True)  # type: ignore[no-untyped-call]
    return found


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse(text: str, *, inside: str = "the text") -> Any:
    """YAML's plain values.

    Raises:
        RecipeError: not YAML, or a key stands twice; with its line.
    """
    try:
        return _apart(yaml.load(text, Loader=_Loader))
    except RecursionError:
        raise RecipeError.of([Fault(inside, "must not hold itself, nor be nested so deep")], inside) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else inside
        raise RecipeError.of([Fault(where, getattr(error, "problem", None) or "must be YAML")], inside) from None
    except ValueError as error:  # a date such as 2020-13-45
        raise RecipeError.of([Fault(inside, "must be YAML", str(error))], inside) from None


def _apart(value: Any) -> Any:
    """The same values, each mapping and list by itself: YAML's ``*name`` gives one object in several places."""
    if isinstance(value, dict):
        return {key: _apart(item) for key, item in value.items()}
    return [_apart(item) for item in value] if isinstance(value, list) else value


def read(source: str | Path | Recipe, *, sets: Sequence[str] = (), seed: int | None = None) -> Recipe:
    """A recipe from a shipped name, a file, or a Recipe; with ``--set`` style changes.

    Args:
        source: ``lp-ft``, ``my.yaml``, or a Recipe, which comes back with the changes.
        sets: changes such as ``stages.1.lr=3e-5``; a stage or an ingredient goes by number or by name.
        seed: goes before the recipe's own.
    Raises:
        RecipeError: there is no such recipe, or it has faults.
    """
    if isinstance(source, Recipe):
        plain, inside = source.to_dict(), source.name
    else:
        plain, inside = _plain(source)
    if not isinstance(plain, dict):
        raise RecipeError.of([Fault("the file", "must be a mapping with the key 'stages'", _kind(plain))], inside)
    _beside(plain, source)
    faults = [fault for change in sets if (fault := _change(plain, change))]
    if faults:
        raise RecipeError.of(faults, "--set")
    if seed is not None:
        plain["seed"] = seed
    plain.setdefault("name", inside.removesuffix(".yaml").removesuffix(".yml"))
    return build(plain, inside=inside)


def _plain(source: str | Path) -> tuple[Any, str]:
    path = expanded(source)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            there = "a folder" if path.is_dir() else "nothing there"
            raise RecipeError.of([Fault(str(source), "must be a file", there)], "--recipe")
        return parse(_text(path), inside=path.name), path.name
    if str(source) not in shipped.names():
        hint = did_you_mean(str(source), shipped.names()) or f"Shipped: {', '.join(shipped.names())}."
        raise RecipeError.of([Fault(str(source), "must be a shipped recipe or a .yaml file", do=hint)], "--recipe")
    return parse(shipped.text(str(source)), inside=str(source)), str(source)


def _beside(plain: dict[str, Any], source: object) -> None:
    """Paths of data in a recipe's file are taken from where that file is."""
    told = plain.get("data")
    if isinstance(source, (str, Path)) and isinstance(told, dict):
        for which, place in told.items():
            beside = expanded(source).parent / str(place)
            if isinstance(place, str) and beside.exists():
                told[which] = str(beside)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        fault = Fault(f"line {line}", "must be UTF-8", f"byte {error.object[error.start]:#04x}", "Save it as UTF-8.")
        raise RecipeError.of([fault], path.name) from None
    except OSError as error:
        raise RecipeError.of([Fault(str(path), "must be readable", error.strerror or str(error))], "--recipe") from None


def _kind(value: Any) -> str:
    return "nothing" if value is None else "a list" if isinstance(value, list) else repr(value)


def build(plain: Mapping[str, Any], *, inside: str) -> Recipe:
    """The recipe that plain values mean.

    Raises:
        RecipeError: every fault, each with its path.
    """
    faults: list[Fault] = []
    stages = []
    given = plain.get("stages")
    if not isinstance(given, list) or not given:
        got = "an empty list" if given == [] else "nothing" if given is None else repr(given)
        raise RecipeError.of([Fault("stages", "must be a list of stages", got)], inside)
    for at, stage in enumerate(given):
        made = _stage(stage, f"stages[{at}]", faults)
        if made:
            stages.append(made)
    values = {key: value for key, value in plain.items() if key != "stages"}
    standing = stages or [Stage()]  # so that the recipe's own fields are checked even when a stage has faults
    recipe = _make(Recipe, {**values, "stages": standing}, "", faults)
    if faults or recipe is None:
        raise RecipeError.of(faults, inside)
    return recipe


def _stage(plain: Any, path: str, faults: list[Fault]) -> Stage | None:
    if not isinstance(plain, dict):
        faults.append(Fault(path, "must be a mapping with the key 'ingredients'", repr(plain)))
        return None
    values: dict[str, Any] = {}
    for key, value in plain.items():
        name = ALIASES.get(str(key), str(key))
        if name in values:
            words = [str(word) for word in plain if ALIASES.get(str(word), str(word)) == name]
            faults.append(Fault(f"{path}.{name}", "must stand once", " and ".join(words)))
        values[name] = value
    entries = values.pop("ingredients", None) or []
    if not isinstance(entries, list):
        faults.append(Fault(f"{path}.ingredients", "must be a list", repr(entries)))
        entries = []
    parts = [_ingredient(entry, f"{path}.ingredients[{at}]", faults) for at, entry in enumerate(entries)]
    return _make(Stage, {**values, "ingredients": tuple(part for part in parts if part)}, path, faults)


def _ingredient(entry: Any, path: str, faults: list[Fault]) -> Ingredient | None:
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        faults.append(Fault(path, "must be a name, or one name with its values", repr(entry)))
        return None
    [(name, values)] = entry.items()
    if name not in registry.INGREDIENTS:
        hint = did_you_mean(str(name), registry.INGREDIENTS) or "See 'luthier methods'."
        faults.append(Fault(path, f"unknown ingredient {name!r}", do=hint))
        return None
    if values is not None and not isinstance(values, dict):
        faults.append(Fault(f"{path}.{name}", "must be a mapping of values", repr(values)))
        return None
    return _make(registry.find(name), values or {}, f"{path}.{name}", faults)


def _make(kind: type[T], values: Mapping[str, Any], path: str, faults: list[Fault]) -> T | None:
    try:
        return kind(**{str(key): value for key, value in values.items()})
    except RecipeError as error:
        for fault in error.faults:
            own = fault.where.partition(".")[2]
            faults.append(dataclasses.replace(fault, where=".".join(filter(None, (path, own))) or inside_of(kind)))
        return None


def inside_of(kind: type[Any]) -> str:
    return "the " + kind.__name__.lower()


def _change(plain: dict[str, Any], change: str) -> Fault | None:
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
        which = last if _below(here, last) is not None else _names(here)[0]
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


def write(recipe: Recipe) -> str:
    """The recipe as YAML with every default filled in; ``read`` gives the same recipe back."""
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True, width=110)
