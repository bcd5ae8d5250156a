"""Commands about one run: make it, ask it, repeat it."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

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
from luthier.jsonfile import expanded


def fit(
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", "-r", help="A shipped name (see 'luthier recipes') or a YAML file; lp-ft if not given."
        ),
    ] = None,
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
        Path | None,
        typer.Option("--out", "-o", help="The run folder; runs/RECIPE-DATA if not given, with -seedN after --seed N."),
    ] = None,
    seed: SeedOption = None,
    sets: SetOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out; what is not given is as it was called with.")
    ] = False,
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
    from luthier.call import Call
    from luthier.console import narrator
    from luthier.folder import fresh
    from luthier.narrate import Silent

    asked: dict[str, Any] = {
        "model": model,
        "data": data,
        "text": text,
        "text_pair": text_pair,
        "label": label,
        "ood": named_of(ood),
        "out_domain": out_domain,
        "label_map": mapped_of(label_map),
    }
    out = None if out is None else expanded(out)
    if resume:
        if out is None:
            raise LuthierError("--resume needs --out, the folder of the run to go on with.")
        asked = _begun(out, asked)
        there = out / "recipe.yaml"
        recipe = recipe or (str(there) if there.is_file() else None)
    recipe = recipe or "lp-ft"
    asked["model"], asked["data"], label_of = sources_of(asked["model"], asked["data"], demo)
    if out is None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise LuthierError("--out must be given when several processes run, so that all of them mean one folder.")
        name = f"{Path(recipe).stem}-{label_of}" + (f"-seed{seed}" if seed is not None else "")
        out = fresh(Path("runs"), name)
    from luthier.training.engine import fit as run

    say = narrator() if os.environ.get("RANK", "0") == "0" else Silent()
    report = run(
        recipe,
        **asked,
        out=out,
        seed=seed,
        task=task,
        sets=[*(DEMO_SETS if demo else ()), *(sets or ())],
        resume=resume,
        save_every=save_every,
        keep_stages=keep_stages,
        trackers=track or (),
        narrator=say,
    )
    say.line()
    say.show(report)
    say.line("\nnext:")
    say.line(f"  luthier report {shlex.quote(str(out))}")
    say.line(f"  luthier predict {shlex.quote(str(out))} --data FILE --out predictions.csv")
    told = (
        ("--task", task),
        ("--seed", None if seed is None else str(seed)),
        *(("--set", change) for change in sets or () if not change.strip().startswith("stages.")),
    )
    asked["data"] = asked["data"] or report.data["source"]
    if demo:  # which names these
        asked |= {name: None for name in ("model", "data") if asked[name] == "demo"}
    options = Call.of(**asked).options(*told)
    say.line(f"  luthier fit --recipe llrd {'--demo ' if demo else ''}{options}".rstrip())


def _begun(out: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """What the run in ``out`` was called with, for all that is not asked for now."""
    from luthier.call import NAME, Call
    from luthier.finished.reruns import FLAGS, gone

    if not (out / NAME).is_file():
        return asked
    call = Call.load(out)
    then = call.arguments()
    told = {name: asked[name] or value for name, value in then.items()}
    told["ood"] = then["ood"] | asked["ood"]
    if faults := list(gone(out, call, told, FLAGS)):
        raise LuthierError.of(faults, f"--resume of {out}")
    return told


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
        bool, typer.Option("--time/--no-time", help="Time a step of each stage and forecast minutes and memory.")
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
    run: Annotated[Path, typer.Argument(help="A finished run's folder, or a soup's.")],
    data: Annotated[str, typer.Option("--data", "-d", help="One file with the columns the run was trained on.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A .csv, .tsv or .jsonl; printed if not given.")
    ] = None,
) -> None:
    """Label new rows with a finished run's model: label, and each class' calibrated probability."""
    from luthier.console import narrator
    from luthier.errors import DataError, Fault

    out = None if out is None else expanded(out)
    if out is not None and out.exists():
        raise DataError.of(
            [Fault(str(out), "must not exist yet", do="Choose another name; nothing was touched.")], "--out"
        )
    if out is not None and out.suffix not in (".csv", ".tsv", ".jsonl"):
        raise DataError.of([Fault(str(out), "must end in .csv, .tsv or .jsonl")], "--out")
    from luthier.finished.predictions import predict as run_predict

    say = narrator(to_stderr=True)
    found = run_predict(run, data, narrator=say)
    if out is None:
        for line in found.lines():
            sys.stdout.write(f"{line}\r\n")
        return
    found.save(out)
    say.line(f"{len(found.labels)} predictions in {out}")


def report(run: Annotated[Path, typer.Argument(help="A run's folder, or its report.json.")]) -> None:
    """Show a run's result, and write its report.html anew."""
    from luthier.console import narrator
    from luthier.report import Report

    run = expanded(run)
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
    ood: Annotated[
        list[str] | None,
        typer.Option(
            "--ood", help="NAME=PATH: where a shifted test is now, if it moved or was in memory; may be repeated."
        ),
    ] = None,
    out_domain: Annotated[
        str | None, typer.Option("--out-domain", help="Where the out-domain rows are now, if they moved.")
    ] = None,
) -> None:
    """Repeat a finished run from its folder; exit 0 if the weights are bit-equal, 1 if not."""
    from luthier.console import narrator
    from luthier.finished.reruns import rerun as again

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
    from luthier.finished.diff import diff as differing

    for line in differing(one, other).lines():
        typer.echo(line)
