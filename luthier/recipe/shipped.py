"""The recipes that come with Luthier, as files. Light: lists and reads text, builds nothing."""

from __future__ import annotations

from importlib import resources

import yaml

FOLDER = resources.files("luthier") / "recipes"


def names() -> list[str]:
    """Their names, sorted."""
    return sorted(item.name.removesuffix(".yaml") for item in FOLDER.iterdir() if item.name.endswith(".yaml"))


def text(name: str) -> str:
    """The YAML of the recipe called ``name``, which must be one of ``names()``."""
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def description(name: str) -> str:
    """What the recipe says of itself."""
    return str(yaml.safe_load(text(name)).get("description", ""))
