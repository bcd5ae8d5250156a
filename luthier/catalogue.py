"""What there is to choose from: recipes, ingredients, cards."""

from __future__ import annotations

import ast
import importlib.util
import textwrap
from importlib import resources
from pathlib import Path

from luthier.errors import Fault, RecipeError, did_you_mean
from luthier.recipe import registry
from luthier.recipe.shipped import description, names, text

FAMILIES = {
    "settings": "rates, schedules, what is trainable",
    "surgery": "weights and how the forward pass sees them",
    "modules": "modules put in",
    "losses": "the loss",
    "gradients": "the gradient",
    "optimizers": "the optimizer and the step",
    "averaging": "averages of weights",
    "data": "the stream of batches",
    "calibration": "the predictions",
}


def recipes_table() -> str:
    """The shipped recipes, a line or two each, at 80 columns."""
    rows = [(name, description(name)) for name in names()]
    return _columns(rows) + "\n\nluthier recipes NAME prints one; save it, change it, and give the file to --recipe."


def recipe_text(name: str) -> str:
    """A shipped recipe's YAML.

    Raises:
        RecipeError: there is none of that name.
    """
    if name not in names():
        hint = did_you_mean(name, names()) or f"There are: {', '.join(names())}."
        raise RecipeError.of([Fault(name, "must be a shipped recipe", do=hint)], "luthier recipes")
    return text(name).rstrip()


def methods_table() -> str:
    """The ingredients by family, each with its first sentence, at 80 columns. Reads the files; loads none of them."""
    parts = []
    for family, about in FAMILIES.items():
        rows = [(name, _sentence(name)) for name in sorted(registry.INGREDIENTS) if registry.family(name) == family]
        if rows:
            parts.append(f"{family}: {about}\n{textwrap.indent(_columns(rows), '  ')}")
    return "\n\n".join(parts) + "\n\nluthier card NAME prints a card: equation, when it helps, when it hurts, source."


def card(name: str) -> str:
    """An ingredient's card.

    Raises:
        RecipeError: there is no ingredient of that name.
    """
    if name not in registry.INGREDIENTS:
        hint = did_you_mean(name, registry.INGREDIENTS) or "See 'luthier methods'."
        raise RecipeError.of([Fault(name, "must be an ingredient", do=hint)], "luthier card")
    written = _card_file(name).read_text(encoding="utf-8").rstrip()
    return written.replace("<!-- claims -->", "\n".join(f"- {claim}" for claim in _claims(name)) or "- none")


def _claims(name: str) -> list[str]:
    return [str(claim) for claim in registry.find(name)().touches()]


def _card_file(name: str) -> Path:
    inside = Path(str(resources.files("luthier"))) / "cards" / f"{name}.md"
    return inside if inside.is_file() else inside.parents[2] / "docs" / "methods" / f"{name}.md"


def _sentence(name: str) -> str:
    spec = importlib.util.find_spec("luthier")
    assert spec is not None and spec.submodule_search_locations
    module = registry.INGREDIENTS[name].partition(":")[0].split(".")[1:]
    path = Path(spec.submodule_search_locations[0]).joinpath(*module).with_suffix(".py")
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(said.split("\n\n")[0].partition(":")[2].split())


def _columns(rows: list[tuple[str, str]], width: int = 76) -> str:
    first = max((len(name) for name, _ in rows), default=0) + 2
    lines = []
    for name, about in rows:
        wrapped = textwrap.wrap(about, width - first) or [""]
        lines.append(f"{name:<{first}}{wrapped[0]}")
        lines += [" " * first + more for more in wrapped[1:]]
    return "\n".join(lines)
