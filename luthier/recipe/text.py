"""Recipes as text: YAML <-> Recipe. All faults of a text are found before any is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from luthier.core.ingredient import Ingredient
from luthier.errors import Fault, RecipeError, did_you_mean
from luthier.jsonfile import expanded
from luthier.recipe import registry, shipped
from luthier.recipe.changes import changed
from luthier.recipe.recipe import ALIASES, Recipe, Stage
from luthier.recipe.values import parse

T = TypeVar("T")


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
    faults = [fault for change in sets if (fault := changed(plain, change))]
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


def write(recipe: Recipe) -> str:
    """The recipe as YAML with every default filled in; ``read`` gives the same recipe back."""
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True, width=110)
