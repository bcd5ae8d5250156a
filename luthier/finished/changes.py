"""What is written otherwise in two run folders: values by path, recipes by stage and ingredient, environments."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from luthier.errors import Fault, LuthierError

WIDTH = 80
_DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{20,}\b")


@dataclass(frozen=True)
class Change:
    """One value that two runs do not share.

    Args:
        path: where it is; a recipe's as ``--set`` has it, such as ``stages.finetune.learning_rate``.
        one, other: the values.
        only: the run that has it at all; empty when both do.
    """

    path: str
    one: Any
    other: Any
    only: Literal["", "one", "other"] = ""

    def __str__(self) -> str:
        if self.only:
            which, value = ("first", self.one) if self.only == "one" else ("second", self.other)
            return f"{self.path}: only in the {which}" + ("" if value == {} else f": {_shown(value)}")
        return f"{self.path}: {_shown(self.one)} -> {_shown(self.other)}"


def changes(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[Change, ...]:
    """The values at which two nested mappings differ, by dotted path, in the order of the first."""
    return tuple(_changed("", one, other))


def surroundings(run: Path) -> dict[str, Any]:
    """Versions, hardware, threads and processes with which the run in ``run`` began.

    Raises:
        LuthierError: environment.json is not there, or cannot be read.
    """
    try:
        told = json.loads((run / "environment.json").read_text(encoding="utf-8"))
        return {name: value for name, value in told.items() if name != "identity"}
    except (OSError, ValueError, AttributeError) as error:
        raise _unreadable(run / "environment.json", error) from None


def wrapped(lines: Iterable[str]) -> list[str]:
    """Lines of at most 80 columns; what goes on is indented by four more."""
    told: list[str] = []
    for line in map(str.rstrip, lines):
        indent = " " * (len(line) - len(line.lstrip()))
        told += textwrap.wrap(line, WIDTH, subsequent_indent=f"{indent}    ", break_on_hyphens=False) or [""]
    return told


def _changed(path: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[Change]:
    for key in dict.fromkeys((*one, *other)):
        where = f"{path}.{key}" if path else str(key)
        if key not in other:
            yield Change(where, one[key], None, "one")
        elif key not in one:
            yield Change(where, None, other[key], "other")
        elif isinstance(one[key], Mapping) and isinstance(other[key], Mapping):
            yield from _changed(where, one[key], other[key])
        elif one[key] != other[key]:
            yield Change(where, one[key], other[key])


def between_recipes(one: Path, other: Path) -> tuple[Change, ...]:
    """The changes between the recipes of two run folders.

    Raises:
        LuthierError: recipe.yaml is not there, or cannot be read.
    """
    return tuple(_ordered(changes(_recipe(one), _recipe(other))))


def _ordered(found: Iterable[Change]) -> Iterator[Change]:
    """Leaves out a change of order where what both recipes have stands in one order."""
    for change in found:
        if change.path != "order" and not change.path.endswith(".ingredients"):
            yield change
            continue
        ours, theirs = [x for x in change.one if x in change.other], [x for x in change.other if x in change.one]
        if ours != theirs:
            yield replace(change, one=ours, other=theirs)


def _recipe(run: Path) -> dict[str, Any]:
    """The recipe with stages and ingredients by name, as ``--set`` has them, and their order beside them."""
    import yaml

    path = run / "recipe.yaml"
    try:
        told = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
        stages = dict(_named((stage["name"], dict(stage)) for stage in told["stages"]))
        for name, stage in stages.items():
            parts = dict(_named(item for part in stage.pop("ingredients") for item in part.items()))
            stages[name] = {**stage, "ingredients": list(parts), **parts}
        return {**told, "order": list(stages), "stages": stages}
    except (OSError, yaml.YAMLError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise _unreadable(path, error) from None


def _named(items: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The items, each name once: what occurs again is ``name 2``."""
    seen: dict[str, int] = {}
    for name, value in items:
        seen[name] = seen.get(name, 0) + 1
        yield (name if seen[name] == 1 else f"{name} {seen[name]}"), value


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(item)}" for name, item in value.items()) or "nothing"
    return _DIGEST.sub(r"\1...", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _unreadable(path: Path, error: Exception) -> LuthierError:
    fault = Fault(str(path), "must be as a run wrote it", str(error).split("\n")[0], "Give the folder of a run.")
    return LuthierError.of([fault], "the run folder")
