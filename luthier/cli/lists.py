"""Commands that tell what there is, and start a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.options import (
    LabelOption,
    PairOption,
    TextOption,
)
from luthier.errors import LuthierError
from luthier.jsonfile import expanded


def recipes(name: Annotated[str | None, typer.Argument(help="Print this recipe's text.")] = None) -> None:
    """List the recipes that come with Luthier, or print one."""
    from luthier.catalogue import recipe_text, recipes_table

    typer.echo(recipe_text(name) if name else recipes_table())


def methods() -> None:
    """List the ingredients, with what each does."""
    from luthier.catalogue import methods_table

    typer.echo(methods_table())


def card(name: Annotated[str, typer.Argument(help="An ingredient's name.")]) -> None:
    """Print an ingredient's card: equation, when it helps, when it hurts, source."""
    from luthier.catalogue import card as read_card

    typer.echo(read_card(name))


def schema() -> None:
    """Print the JSON Schema of recipe files, for editors."""

    from luthier.recipe.schema import schema as made

    typer.echo(json.dumps(made(), indent=1))


def init(
    data: Annotated[str, typer.Option("--data", "-d", help="The data the recipe is for.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The recipe file to write.")] = Path("recipe.yaml"),
    text: TextOption = None,
    text_pair: PairOption = None,
    label: LabelOption = None,
) -> None:
    """Write a starter recipe that fits your data, with every choice explained."""
    from luthier.starter import starter

    out = expanded(out)
    if out.exists():
        raise LuthierError(f"{out} exists.  Choose another --out; nothing was touched.")
    made, said = starter(data, text=text, text_pair=text_pair, label=label, file=str(out))
    from luthier.jsonfile import write_whole

    write_whole(out, made)
    typer.echo("\n".join(said))
