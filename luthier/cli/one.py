"""Commands about one run: make it, ask it, repeat it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.options import (
    DEMO_SETS,
    DataOption,
    DemoOption,
    LabelOption,
    MapOption,
    ModelOption,
    OodOption,
    OutDomainOption,
    PairOption,
    RecipeOption,
    SeedOption,
    SetOption,
    TaskOption,
    TextOption,
    mapped_of,
    named_of,
    sources_of,
)
from luthier.errors import LuthierError


def fit(
    recipe: RecipeOption = "lp-ft",
    model: ModelOption = None,
    data: DataOption = None,
    text: TextOption = None,
    text_pair: PairOption = None,
    label: LabelOption = None,
    task: TaskOption = None,
    ood: OodOption = None,
    out_domain: OutDomainOption = None,
    label_map: MapOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The run folder; runs/RECIPE-DATA-seedN if not given.")
    ] = None,
    seed: SeedOption = None,
    sets: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    save_every: Annotated[
        int | None,
        typer.Option("--save-every", min=1, help="Steps between checkpoints; every two minutes if not given."),
    ] = None,
    keep_stages: Annotated[
        bool, typer.Option("--keep-stages", help="Keep the weights at the end of each stage, for luthier study.")
    ] = False,
    track: Annotated[
        list[str] | None, typer.Option("--track", help="tensorboard, wandb, mlflow or trackio; may be repeated.")
    ] = None,
    demo: DemoOption = False,
) -> None:
    """Fine-tune a model on your data; leaves a run folder with model, report and log."""
    from luthier.console import narrator
    from luthier.folder import fresh
    from luthier.narrate import Silent

    model, source, label_of = sources_of(model, data, demo)
    if out is None:
        if resume:
            raise LuthierError("--resume needs --out, the folder of the run to go on with.")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise LuthierError("--out must be given when several processes run, so that all of them mean one folder.")
        name = f"{Path(recipe).stem}-{label_of}" + (f"-seed{seed}" if seed is not None else "")
        out = fresh(Path("runs"), name)
    from luthier.engine import fit as run

    sets = [*DEMO_SETS, *(sets or ())] if demo else sets
    say = narrator() if os.environ.get("RANK", "0") == "0" else Silent()
    report = run(
        recipe,
        model=model,
        data=source,
        out=out,
        seed=seed,
        text=text,
        text_pair=text_pair,
        label=label,
        task=task,
        ood=named_of(ood),
        out_domain=out_domain,
        label_map=mapped_of(label_map),
        sets=sets or (),
        resume=resume,
        save_every=save_every,
        keep_stages=keep_stages,
        trackers=track or (),
        narrator=say,
    )
    say.line()
    say.show(report)
    say.line("\nnext:")
    say.line(f"  luthier report {out}")
    say.line(f"  luthier predict {out} --data FILE --out predictions.csv")
    sources = "--demo" if demo else f"--model {model} --data {data or report.data['source']}"
    say.line(f"  luthier fit --recipe llrd {sources}")


def plan(
    recipe: RecipeOption = "lp-ft",
    model: ModelOption = None,
    data: DataOption = None,
    text: TextOption = None,
    text_pair: PairOption = None,
    label: LabelOption = None,
    task: TaskOption = None,
    ood: OodOption = None,
    out_domain: OutDomainOption = None,
    label_map: MapOption = None,
    seed: SeedOption = None,
    sets: SetOption = None,
    demo: DemoOption = False,
    time: Annotated[
        bool, typer.Option("--time/--no-time", help="Time one step and forecast minutes and memory.")
    ] = True,
) -> None:
    """Check everything and show who would learn what; trains nothing and writes nothing."""
    from luthier.console import narrator

    model, source, _ = sources_of(model, data, demo)
    from luthier.forecast import forecast

    sets = [*DEMO_SETS, *(sets or ())] if demo else sets
    forecast(
        recipe,
        model=model,
        data=source,
        text=text,
        text_pair=text_pair,
        label=label,
        task=task,
        ood=named_of(ood),
        out_domain=out_domain,
        label_map=mapped_of(label_map),
        seed=seed,
        sets=sets or (),
        timed=time,
        narrator=narrator(),
    )


def predict(
    run: Annotated[Path, typer.Argument(help="A finished run's folder.")],
    data: Annotated[str, typer.Option("--data", "-d", help="One file with the columns the run was trained on.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A .csv, .tsv or .jsonl; printed if not given.")
    ] = None,
) -> None:
    """Label new rows with a finished run's model: label, and each class' calibrated probability."""
    from luthier.console import narrator
    from luthier.errors import DataError, Fault

    if out is not None and out.exists():
        raise DataError.of(
            [Fault(str(out), "must not exist yet", do="Choose another name; nothing was touched.")], "--out"
        )
    if out is not None and out.suffix not in (".csv", ".tsv", ".jsonl"):
        raise DataError.of([Fault(str(out), "must end in .csv, .tsv or .jsonl")], "--out")
    from luthier.predictions import predict as run_predict

    say = narrator(to_stderr=True)
    found = run_predict(run, data, narrator=say)
    if out is None:
        import csv

        table = found.table()
        writer = csv.writer(sys.stdout)
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))
        return
    found.save(out)
    say.line(f"{len(found.labels)} predictions in {out}")


def report(run: Annotated[Path, typer.Argument(help="A run's folder, or its report.json.")]) -> None:
    """Show a run's result, and write its report.html anew."""
    from luthier.console import narrator
    from luthier.report import Report

    found = Report.load(run)
    say = narrator()
    say.show(found)
    folder = run if run.is_dir() else run.parent
    from luthier import page

    say.line(f"page: {page.save(found, folder)}")


def rerun(
    run: Annotated[Path, typer.Argument(help="A finished run's folder; nothing in it is changed.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The new run folder; RUN-rerun if not given.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Where the model is now, if it moved or was in memory.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="Where the data is now, if it moved or was in memory.")
    ] = None,
    ood: OodOption = None,
    out_domain: Annotated[
        str | None, typer.Option("--out-domain", help="Where the out-domain rows are now, if they moved.")
    ] = None,
) -> None:
    """Repeat a finished run from its folder; exit 0 if the weights are bit-equal, 1 if not."""
    from luthier.console import narrator
    from luthier.reruns import rerun as again

    say = narrator()
    found = again(run, out=out, model=model, data=data, ood=named_of(ood), out_domain=out_domain, narrator=say)
    say.line()
    for line in found.lines():
        say.line(line)
    raise typer.Exit(0 if found.same else 1)


def diff(
    one: Annotated[Path, typer.Argument(help="A finished run's folder.")],
    other: Annotated[Path, typer.Argument(help="Another one.")],
) -> None:
    """Show what differs between two finished runs: recipe, environment, data, scores, weights."""
    from luthier.differing import differences

    for line in differences(one, other).lines():
        typer.echo(line)
