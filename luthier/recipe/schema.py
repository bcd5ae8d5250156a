"""JSON Schema of a recipe file, for editors."""

from __future__ import annotations

from typing import Any

import pydantic

from luthier.recipe import registry
from luthier.recipe.recipe import ALIASES, Recipe, Stage


def schema() -> dict[str, Any]:
    """The schema: what ``read`` takes, with every ingredient's fields."""
    recipe, stage = _fields(Recipe, "stages"), _fields(Stage, "ingredients")
    for alias, name in ALIASES.items():
        stage["properties"][alias] = {**stage["properties"][name], "description": f"the same as {name}"}
    entries: list[dict[str, Any]] = []
    for name in sorted(registry.INGREDIENTS):
        values = _fields(registry.find(name))
        entries.append({"const": name})
        alone = {"anyOf": [values, {"type": "null"}]}
        entries.append(
            {"type": "object", "properties": {name: alone}, "required": [name], "additionalProperties": False}
        )
    stage["properties"]["ingredients"] = {"type": "array", "items": {"anyOf": entries}}
    recipe["properties"]["stages"] = {"type": "array", "items": stage, "minItems": 1}
    recipe["required"] = ["stages"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Luthier recipe", **recipe}


def _fields(kind: type[Any], *without: str) -> dict[str, Any]:
    """The schema of a class' fields, without those that are described elsewhere."""
    properties: dict[str, Any] = {}
    for name, field in kind.__dataclass_fields__.items():
        if name in without:
            continue
        made = pydantic.TypeAdapter(_annotation(kind, name)).json_schema()
        default = field.default
        if default is None or isinstance(default, (str, int, float, bool, tuple)):
            made["default"] = list(default) if isinstance(default, tuple) else default
        properties[name] = made
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _annotation(kind: type[Any], name: str) -> Any:
    import typing

    return typing.get_type_hints(kind, include_extras=True)[name]
