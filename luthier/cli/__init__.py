"""The command line. Light to load: what needs torch is imported inside the command that needs it.

Exit codes: 0 done, 1 failed or stopped in the run (of rerun: other weights), 2 refused before it.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from luthier.cli import inside, lists, many, one
from luthier.errors import LuthierError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune pretrained transformers by recipe.",
    rich_markup_mode=None,
)

# In the order of ``luthier --help``.
for command in (
    *(one.fit, one.plan, one.predict, one.report, one.rerun, one.diff),
    *(many.compare, many.work, many.gather, many.soup, inside.study),
    *(lists.init, lists.recipes, lists.methods, lists.card, lists.schema),
):
    app.command()(command)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        from luthier import __version__

        typer.echo(f"luthier {__version__}")
        raise typer.Exit


def main() -> None:
    """Runs the command line; a user's mistake gives its message and no traceback."""
    try:
        app()
    except LuthierError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(1) from None
