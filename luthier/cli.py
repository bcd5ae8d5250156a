"""The command line. Light to load: what needs torch is imported inside the command that needs it.

Exit codes: 0 done, 1 failed in the run, 2 refused before it.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.errors import LuthierError, RunError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune pretrained transformers by recipe.",
    rich_markup_mode=None,
)

RecipeOption = Annotated[
    str, typer.Option("--recipe", "-r", help="A shipped name (see 'luthier recipes') or a YAML file.")
]
ModelOption = Annotated[str | None, typer.Option("--model", "-m", help="A local folder, a hub id, or 'demo'.")]
DataOption = Annotated[
    str | None,
    typer.Option("--data", "-d", help="A file (csv, tsv, json, jsonl, parquet, .gz), a folder, or a hub id."),
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
    typer.Option("--map", help="NAME:THEIRS=OURS: a label of a shifted test that is named otherwise; may be repeated."),
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Goes before the recipe's.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="PATH=VALUE in the recipe, such as stages.1.lr=3e-5; may be repeated.")
]
DemoOption = Annotated[
    bool, typer.Option("--demo", help="Use the demo's model and text: MiniLM and BBC News from two wheels.")
]

DEMO_SETS = ("max_length=128",)  # keeps the demo under two minutes of training on two cores


@app.command()
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

    model, source, label_of = _sources(model, data, demo)
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
        ood=_named(ood),
        out_domain=out_domain,
        label_map=_mapped(label_map),
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
    say.line(f"  luthier fit --recipe llrd {'--demo' if demo else f'--model {model} --data {data}'}")


@app.command()
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

    model, source, _ = _sources(model, data, demo)
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
        ood=_named(ood),
        out_domain=out_domain,
        label_map=_mapped(label_map),
        seed=seed,
        sets=sets or (),
        timed=time,
        narrator=narrator(),
    )


@app.command()
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


@app.command()
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
    from luthier.soups import soup as cooked

    if how not in ("greedy", "uniform"):
        raise LuthierError(f"--how must be greedy or uniform; got {how!r}.")
    say = narrator()
    made = cooked(runs, out=out, data=data, how=how, ood=_named(ood), narrator=say)  # type: ignore[arg-type]
    for line in made.lines():
        say.line(line)
    say.line(f"model: {out / 'model'}")


@app.command()
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
        str | None, typer.Option("--seeds", help="How many, or which: 5, or 0,3,7; 5 if not given.")
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
    from luthier.comparing import compare as compared
    from luthier.comparing import designed, jobs
    from luthier.console import narrator
    from luthier.trials.places import parameters

    if not recipe:
        raise LuthierError("--recipe must be given, once for each recipe to compare.")
    one, rows, _ = _sources(model[0] if model else None, data[0] if data else None, demo)
    say = narrator(to_stderr=print_jobs)
    asked: dict[str, Any] = {
        "model": model or one,
        "data": data or rows,
        "out": out,
        "seeds": None if seeds is None else _seeds(seeds),
        "vary": vary.split(",") if vary else (),
        "metric": metric,
        "against": against,
        "early": early,
        "text": text,
        "text_pair": text_pair,
        "label": label,
        "task": task,
        "ood": _named(ood),
        "out_domain": out_domain,
        "label_map": _mapped(label_map),
        "sets": [*DEMO_SETS, *(sets or ())] if demo else sets or (),
        "search": search or (),
        "budget": budget,
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


@app.command()
def gather(comparison: Annotated[Path, typer.Argument(help="The folder of a comparison.")]) -> None:
    """Tell what the runs of a comparison say that are done now; writes its comparison.json and compare.html anew."""
    from luthier.comparing import tell
    from luthier.console import narrator

    say = narrator()
    say.show(tell(comparison))
    say.line(f"page: {comparison / 'compare.html'}")


@app.command()
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

    typer.echo(f"{done(comparison, only=only or (), save_every=save_every)} runs done here")
    if told := failures(comparison, only or ()):
        raise RunError("\n".join(told))


@app.command()
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
    from luthier.studying import KINDS
    from luthier.studying import study as looked

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
        ood=_named(ood),
        out_domain=out_domain,
        label_map=_mapped(label_map),
        rows=rows,
        seed=seed,
        narrator=say,
    ):
        say.line(f"\n{one.title}")
        for line in one.lines:
            say.line(f"  {line}")
    page = Path(place) / "report.html"
    if page.is_file():
        say.line(f"\npage: {page}")


@app.command()
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


@app.command()
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
    found = again(run, out=out, model=model, data=data, ood=_named(ood), out_domain=out_domain, narrator=say)
    say.line()
    for line in found.lines():
        say.line(line)
    raise typer.Exit(0 if found.same else 1)


@app.command()
def diff(
    one: Annotated[Path, typer.Argument(help="A finished run's folder.")],
    other: Annotated[Path, typer.Argument(help="Another one.")],
) -> None:
    """Show what differs between two finished runs: recipe, environment, data, scores, weights."""
    from luthier.differing import differences

    for line in differences(one, other).lines():
        typer.echo(line)


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Print this recipe's text.")] = None) -> None:
    """List the recipes that come with Luthier, or print one."""
    from luthier.catalogue import recipe_text, recipes_table

    typer.echo(recipe_text(name) if name else recipes_table())


@app.command()
def methods() -> None:
    """List the ingredients, with what each does."""
    from luthier.catalogue import methods_table

    typer.echo(methods_table())


@app.command()
def card(name: Annotated[str, typer.Argument(help="An ingredient's name.")]) -> None:
    """Print an ingredient's card: equation, when it helps, when it hurts, source."""
    from luthier.catalogue import card as read_card

    typer.echo(read_card(name))


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipe files, for editors."""
    import json

    from luthier.recipe.schema import schema as made

    typer.echo(json.dumps(made(), indent=1))


@app.command()
def init(
    data: Annotated[str, typer.Option("--data", "-d", help="The data the recipe is for.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The recipe file to write.")] = Path("recipe.yaml"),
    text: TextOption = None,
    text_pair: PairOption = None,
    label: LabelOption = None,
) -> None:
    """Write a starter recipe that fits your data, with every choice explained."""
    from luthier.starter import starter

    if out.exists():
        raise LuthierError(f"{out} exists.  Choose another --out; nothing was touched.")
    made, said = starter(data, text=text, text_pair=text_pair, label=label, file=str(out))
    from luthier.jsonfile import write_whole

    write_whole(out, made)
    typer.echo("\n".join(said))


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        from luthier import __version__

        typer.echo(f"luthier {__version__}")
        raise typer.Exit


def _sources(model: str | None, data: str | None, demo: bool) -> tuple[str, Any, str]:
    """The model, the data, and the data's short name for a folder."""
    if demo:
        return model or "demo", data or "demo", "demo" if data is None else Path(data).name.split(".")[0]
    missing = [flag for flag, value in (("--model", model), ("--data", data)) if value is None]
    if model is None:
        raise LuthierError(f"{' and '.join(missing)} must be given, or --demo.")
    return model, data, Path(data or "recipe").name.split(".")[0]


def _seeds(told: str) -> int | list[int]:
    parts = told.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise LuthierError(f"--seeds {told}: must be a number of seeds, or numbers such as 0,3,7.")
    return int(told) if len(parts) == 1 else [int(part) for part in parts if part.strip()]


def _named(ood: list[str] | None) -> dict[str, str]:
    found = {}
    for item in ood or ():
        name, equals, path = item.partition("=")
        if not equals or not name or not path:
            raise LuthierError(f"--ood {item}: must be NAME=PATH.")
        found[name] = path
    return found


def _mapped(told: list[str] | None) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for item in told or ():
        name, colon, pair = item.partition(":")
        theirs, equals, ours = pair.partition("=")
        if not (colon and equals and name and theirs and ours):
            raise LuthierError(f"--map {item}: must be NAME:THEIRS=OURS.")
        found.setdefault(name, {})[theirs] = ours
    return found


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


if __name__ == "__main__":
    main()
