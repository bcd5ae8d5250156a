"""Options that several commands have, and what their words mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.errors import Fault, LuthierError

RecipeOption = Annotated[
    str, typer.Option("--recipe", "-r", help="A shipped name (see 'luthier recipes') or a YAML file.")
]
ModelOption = Annotated[str | None, typer.Option("--model", "-m", help="A local folder, a hub id, or 'demo'.")]
DataOption = Annotated[
    str | None,
    typer.Option("--data", "-d", help="A file (csv, tsv, json, jsonl, parquet, .gz), a folder, a hub id, or 'demo'."),
]
TextOption = Annotated[str | None, typer.Option("--text", help="Column of the text; inferred if not given.")]
PairOption = Annotated[str | None, typer.Option("--text-pair", help="Column of the second text.")]
LabelOption = Annotated[str | None, typer.Option("--label", help="Column of the label.")]
TaskOption = Annotated[
    str | None, typer.Option("--task", help="classification or regression; decided from the labels if not given.")
]
OodOption = Annotated[
    list[str] | None, typer.Option("--ood", help="NAME=PATH: one more shifted test set; may be repeated.")
]
OutDomainOption = Annotated[
    str | None,
    typer.Option("--out-domain", help="Training rows of another domain, for recipes that ask for some (gradual)."),
]
MapOption = Annotated[
    list[str] | None,
    typer.Option(
        "--map", help="NAME:THEIRS=OURS: a label of a shifted test, or of out_domain, named otherwise; may be repeated."
    ),
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Goes before the recipe's.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="PATH=VALUE in the recipe, such as stages.1.lr=3e-5; may be repeated.")
]
DemoOption = Annotated[
    bool, typer.Option("--demo", help="Use the demo's model and text: MiniLM and BBC News from two wheels.")
]
DEMO_SETS = ("max_length=128",)  # keeps the demo under two minutes of training on two cores


def sources_of(model: str | None, data: Any, demo: bool) -> tuple[str, Any, str]:
    """The model, the data, and the data's short name for a folder."""
    short = Path(data).name.split(".")[0] if isinstance(data, str) else "demo" if demo else "recipe"
    if demo:
        return model or "demo", data or "demo", short
    missing = [flag for flag, value in (("--model", model), ("--data", data)) if value is None]
    if model is None:
        raise LuthierError(f"{' and '.join(missing)} must be given, or --demo.")
    return model, data, short


def seeds_of(told: str) -> int | list[int]:
    parts = told.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise LuthierError(f"--seeds {told}: must be a number of seeds, or numbers such as 0,3,7.")
    return int(told) if len(parts) == 1 else [int(part) for part in parts if part.strip()]


def named_of(ood: list[str] | None) -> dict[str, str]:
    found: dict[str, str] = {}
    faults = []
    for item in ood or ():
        name, equals, path = item.partition("=")
        if not equals or not name or not path:
            raise LuthierError(f"--ood {item}: must be NAME=PATH.")
        if (known := found.setdefault(name, path)) != path:
            do = "Give each shifted test a name of its own."
            faults.append(Fault(f"--ood {name}", "must stand once", f"{known} and {path}", do))
    if faults:
        raise LuthierError.of(faults, "the command")
    return found


def mapped_of(told: list[str] | None) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    faults = []
    for item in told or ():
        name, colon, pair = item.partition(":")
        theirs, equals, ours = pair.partition("=")
        if not (colon and equals and name and theirs and ours):
            raise LuthierError(f"--map {item}: must be NAME:THEIRS=OURS.")
        known = found.setdefault(name, {}).setdefault(theirs, ours)
        if known != ours:
            do = "A label of theirs means one of yours."
            faults.append(Fault(f"--map {name}:{theirs}", "must stand once", f"{known} and {ours}", do))
    if faults:
        raise LuthierError.of(faults, "the command")
    return found
