"""Commands about many runs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli.options import (
    DEMO_SETS,
    DemoOption,
    LabelOption,
    MapOption,
    OodOption,
    OutDomainOption,
    PairOption,
    TaskOption,
    TextOption,
    mapped_of,
    named_of,
    seeds_of,
    sources_of,
)
from luthier.errors import LuthierError, RunError
from luthier.jsonfile import expanded


def compare(
    recipe: Annotated[
        list[str] | None,
        typer.Option("--recipe", "-r", help="A shipped name, a file, or NAME=RECIPE; repeat it for each."),
    ] = None,
    model: Annotated[list[str] | None, typer.Option("--model", "-m", help="As for fit; may be repeated.")] = None,
    data: Annotated[list[str] | None, typer.Option("--data", "-d", help="As for fit; may be repeated.")] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The comparison's folder; called again, it goes on there.")
    ] = Path("comparison"),
    seeds: Annotated[
        str | None,
        typer.Option(
            "--seeds", help="How many, or which: 5, or 0,3,7; if not given those it has, or 5 where it is new."
        ),
    ] = None,
    vary: Annotated[
        str | None,
        typer.Option("--vary", help="Streams that vary each by itself, a full grid: head,order (and dropout)."),
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", help="What is compared; the task's own if not given.")
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", help="Compare all others with this recipe only, not all pairs.")
    ] = None,
    text: TextOption = None,
    text_pair: PairOption = None,
    label: LabelOption = None,
    task: TaskOption = None,
    ood: OodOption = None,
    out_domain: OutDomainOption = None,
    label_map: MapOption = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="PATH=VALUE in all recipes, or NAME:PATH=VALUE in one; may be repeated."),
    ] = None,
    early: Annotated[
        str | None,
        typer.Option(
            "--early",
            help="start=20,share=0.3,keep=5: 20 seeds start, all pause at 0.3 of their steps, the 5 best go on.",
        ),
    ] = None,
    search: Annotated[
        list[str] | None,
        typer.Option(
            "--search",
            help="Find a setting first: [NAME:]PATH=SPACE, a space being log:LOW:HIGH, float:LOW:HIGH, int:LOW:HIGH[:STEP] "
            "or one:A,B,C; may be repeated.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", help="Of search for each recipe: 20 (runs) or 30min; 10 runs if not given."),
    ] = None,
    weights: Annotated[
        bool | None,
        typer.Option(
            "--weights/--no-weights",
            help="Whether runs keep their weights when they have ended; they do, if not said otherwise before.",
        ),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="How many runs at a time.")] = 1,
    on: Annotated[
        str,
        typer.Option("--on", help="Where they are done: local, ray (RAY_ADDRESS, else this machine) or slurm."),
    ] = "local",
    slurm: Annotated[
        list[str] | None,
        typer.Option("--slurm", help="KEY=VALUE of a job: partition, timeout_min, gpus_per_node; may be repeated."),
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option("--save-every", min=1, help="Steps between checkpoints; a twentieth of the time if not given."),
    ] = None,
    print_jobs: Annotated[
        bool, typer.Option("--print-jobs", help="Run nothing: print a line of shell for each run that is left.")
    ] = False,
    demo: DemoOption = False,
) -> None:
    """Run several recipes over several seeds, and tell what their differences are worth."""
    from luthier.console import narrator
    from luthier.trials.comparing import compare as compared
    from luthier.trials.comparing import designed, jobs
    from luthier.trials.outcome import listed
    from luthier.trials.places import parameters

    if not recipe:
        raise LuthierError("--recipe must be given, once for each recipe to compare.")
    one, rows, _ = sources_of(model[0] if model else None, data[0] if data else None, demo)
    say, out = narrator(to_stderr=print_jobs), expanded(out)
    asked: dict[str, Any] = {
        "model": model or one,
        "data": data or rows,
        "out": out,
        "seeds": None if seeds is None else seeds_of(seeds),
        "vary": vary.split(",") if vary else (),
        "metric": metric,
        "against": against,
        "early": early,
        "text": text,
        "text_pair": text_pair,
        "label": label,
        "task": task,
        "ood": named_of(ood),
        "out_domain": out_domain,
        "label_map": mapped_of(label_map),
        "sets": [*DEMO_SETS, *(sets or ())] if demo else sets or (),
        "search": search or (),
        "budget": budget,
        "weights": weights,
        "narrator": say,
    }
    if print_jobs:
        if on != "local" or workers != 1 or slurm:
            raise LuthierError("--print-jobs runs nothing, so --on, --workers and --slurm have no say; leave them out.")
        for line in jobs(out, designed(recipe, **asked), save_every):
            typer.echo(line)
        say.line(f"when they are done: luthier gather {shlex.quote(str(out.absolute()))}")
        return
    place: dict[str, Any] = {"on": on, "workers": workers, "slurm": parameters(slurm or []), "save_every": save_every}
    found = compared(recipe, **asked, **place)
    say.line()
    say.show(found)
    if failed := [row.name for row in found.trials if row.state == "failed"]:
        told = f"{len(failed)} of {len(found.trials)} runs failed: {listed(failed)}"
        raise RunError(f"{told}.  The same command tries them again.")


def gather(
    comparison: Annotated[Path, typer.Argument(help="The folder of a comparison.")],
    metric: Annotated[
        str | None, typer.Option("--metric", help="What they are compared by now; as the comparison says if not given.")
    ] = None,
) -> None:
    """Tell what the runs of a comparison say that are done now; writes its comparison.json and compare.html anew."""
    from luthier.console import narrator
    from luthier.trials import comparing

    narrator().show(comparing.gather(expanded(comparison), metric=metric))


def work(
    comparison: Annotated[Path, typer.Argument(help="The folder of a comparison that was begun.")],
    only: Annotated[
        list[str] | None, typer.Argument(help="Names of runs, as in its folder runs/; all that are left without.")
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option("--save-every", min=1, help="Steps between checkpoints; a twentieth of the time if not given."),
    ] = None,
) -> None:
    """Do runs of a comparison that no one has yet; any number of processes and machines may share its folder.

    With names, it fails when one of these runs has.
    """
    from luthier.trials.work import failures
    from luthier.trials.work import work as done

    comparison = expanded(comparison)
    typer.echo(f"{done(comparison, only=only or (), save_every=save_every)} runs done here")
    if told := failures(comparison, only or ()):
        raise RunError("\n".join(told))


def soup(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs that have ended, of one model and task.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder for the averaged model.")],
    how: Annotated[
        str, typer.Option("--how", help="greedy (those that help on validation) or uniform (all).")
    ] = "greedy",
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="What to score on; the first run's data if not given.")
    ] = None,
    ood: Annotated[list[str] | None, typer.Option("--ood", help="A shifted test, NAME=PATH; may be repeated.")] = None,
) -> None:
    """Average the weights of several runs into one model, and score it beside them."""
    from luthier.console import narrator
    from luthier.finished.soups import soup as cooked

    if how not in ("greedy", "uniform"):
        raise LuthierError(f"--how must be greedy or uniform; got {how!r}.")
    say, out = narrator(), expanded(out)
    made = cooked(runs, out=out, data=data, how=how, ood=named_of(ood), narrator=say)  # type: ignore[arg-type]
    for line in made.lines():
        say.line(line)
    say.line(f"model: {out / 'model'}")
