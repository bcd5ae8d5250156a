"""The command that looks into a model."""

from __future__ import annotations

from typing import Annotated

import typer

from luthier.cli.options import (
    DataOption,
    MapOption,
    OodOption,
    OutDomainOption,
    RecipeOption,
    SeedOption,
    mapped_of,
    named_of,
)
from luthier.jsonfile import expanded


def study(
    place: Annotated[
        str, typer.Argument(help="The folder of a run that has ended; or a model, with --recipe and --data.")
    ],
    ntk: Annotated[bool, typer.Option("--ntk", help="The neural tangent kernel at the start of a stage.")] = False,
    drift: Annotated[
        bool, typer.Option("--drift", help="How far the features moved in each stage, layer by layer.")
    ] = False,
    clusters: Annotated[bool, typer.Option("--clusters", help="How the labels lie in each layer.")] = False,
    forgetting: Annotated[
        bool, typer.Option("--forgetting", help="Which rows the last training lost and won, on every split.")
    ] = False,
    general: Annotated[
        str | None,
        typer.Option("--general", help="The split not to be forgotten; all shifted tests, else test, if not given."),
    ] = None,
    recipe: RecipeOption = "lp-ft",
    data: DataOption = None,
    ood: OodOption = None,
    out_domain: OutDomainOption = None,
    label_map: MapOption = None,
    stage: Annotated[
        str | None,
        typer.Option(
            "--stage",
            help="At whose start the kernel is, the last if not given; since when forgetting counts, the last that trains.",
        ),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=2, help="Rows that are looked at; forgetting looks at all.")] = 64,
    seed: SeedOption = None,
) -> None:
    """Look into a model: its kernel, its features, its clusters, what it forgot. All of them if none is named."""
    from luthier.console import narrator
    from luthier.finished.studying import KINDS
    from luthier.finished.studying import study as looked

    chosen = {"ntk": ntk, "drift": drift, "clusters": clusters, "forgetting": forgetting}
    kinds = [kind for kind in KINDS if chosen[kind]] or None
    say = narrator()
    for one in looked(
        place,
        kinds=kinds,
        recipe=recipe,
        data=data,
        stage=stage,
        general=general,
        ood=named_of(ood),
        out_domain=out_domain,
        label_map=mapped_of(label_map),
        rows=rows,
        seed=seed,
        narrator=say,
    ):
        say.line(f"\n{one.title}")
        for line in one.lines:
            say.line(f"  {line}")
    page = expanded(place) / "report.html"
    if page.is_file():
        say.line(f"\npage: {page}")
