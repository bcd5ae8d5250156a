"""YAML as plain values: numbers as people write them, no key twice, no value in two places."""

from __future__ import annotations

import re
from typing import Any

import yaml

from luthier.errors import Fault, RecipeError


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
