"""rerun: a finished run once more from its folder alone, and whether the same weights come out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from luthier.call import Call
from luthier.errors import DataError, Fault, LuthierError
from luthier.finished.changes import Change, changes, surroundings, wrapped
from luthier.finished.diff import Differences, diff
from luthier.finished.weights import weightless
from luthier.folder import environment, fresh, refuse
from luthier.jsonfile import expanded, plain
from luthier.narrate import Narrator, Silent
from luthier.recipe import text as recipes
from luthier.recipe.recipe import Recipe
from luthier.report import Report
from luthier.sources.data import Split, digest
from luthier.stock import Stock
from luthier.training.engine import fit
from luthier.training.job import Columns, Job, prepare

# What the sum of floating-point numbers depends on, and how a cause is called: top-level names of environment.json.
CAUSES = {
    "versions": "other versions", "python": "other versions", "threads": "another thread count",
    "processes": "another number of processes", "sharded": "another number of processes",
    "precision": "another precision", "device": "another device", "gpus": "another device",
    "processor": "another processor", "platform": "another system",
}  # fmt: skip

FLAGS = {"model": "--model", "data": "--data", "out_domain": "--out-domain"}  # how what has moved is given anew


@dataclass(frozen=True)
class Rerun:
    """A run that was repeated.

    Args:
        run, out: the folders of the run and of its repetition.
        differences: between them, the run first.
        causes: why the weights differ, the likeliest first; empty when they are bit-equal.
    """

    run: str
    out: str
    differences: Differences
    causes: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether the weights are equal to the bit."""
        return self.differences.weights.same

    def lines(self) -> list[str]:
        """What was found, at most 80 columns wide."""
        found = self.differences
        if self.same:
            told = [f"the weights are bit-equal: all {found.weights.tensors} tensors"]
        else:
            told = ["the weights differ", *(f"  likely cause: {cause}" for cause in self.causes)]
        named = [change for change in found.identity if not change.path.endswith(".source")]
        for title, changed in (("recipe", found.recipe), ("data, start weights", tuple(named))):
            told += [f"{title}: the same"] if not changed else [title, *(f"  {change}" for change in changed)]
        told += ["environment: the same"] if not found.environment else ["environment, then and now"]
        told += [f"  {change}" for change in found.environment]
        return wrapped([*told, *found.outcome(equal=False)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON has."""
        told: dict[str, Any] = plain({"same": self.same, **asdict(self)})
        return told


def rerun(
    run: str | Path,
    *,
    out: str | Path | None = None,
    model: Any = None,
    data: Any = None,
    ood: Mapping[str, Any] | None = None,
    out_domain: Any = None,
    narrator: Narrator | None = None,
) -> Rerun:
    """Trains a finished run again as it was called, into a folder of its own, and compares the two.

    Args:
        run: the folder of a run that has ended; nothing in it is changed.
        out: the new run folder; None = RUN-rerun beside it, or the first of RUN-rerun-2, ... that is not there.
        model, data, ood, out_domain: where these are now; needed for what was in memory, and for files that have moved.
        narrator: who says what happens.
    Raises:
        LuthierError: something that the run was made from is not there, or not what it was. Nothing is trained or written then.
    """
    say, path = narrator or Silent(), expanded(run)
    report, call = Report.load(path), Call.load(path)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LuthierError("a run is repeated in one process.  Start luthier rerun without torchrun.")
    target = fresh(path.resolve().parent if path.name in ("", "..") else path.parent, f"{path.resolve().name}-rerun")
    if out is not None:
        target = _new(expanded(out))
    refuse(target, resume=False)
    given = {"model": model, "data": data, "out_domain": out_domain}
    arguments = call.arguments() | {name: value for name, value in given.items() if value is not None}
    arguments["ood"] = arguments["ood"] | dict(ood or {})
    recipe = recipes.read(path / "recipe.yaml")
    then = surroundings(path)
    faults = [*weightless(path), *gone(path, call, arguments, FLAGS), *_read_otherwise(path, recipe, report, then)]
    if faults:
        raise LuthierError.of(faults, f"rerun of {path}")
    stock = Stock()  # so that what is read to be checked is not read again
    others = {name: arguments[name] for name in ("model", "ood", "out_domain", "label_map")}
    columns = Columns(arguments["text"], arguments["text_pair"], arguments["label"])
    job = prepare(recipe, data_source=arguments["data"], columns=columns, stock=stock, **others)
    faults = [*other_data(path, job.data.source, job.data.splits, report), *other_weights(path, job, report)]
    if faults:
        raise DataError.of(faults, f"rerun of {path}")
    del job
    for change in changes(then, {**then, **environment()}):
        say.line(f"other than when the run was made: {change}")
    fit(recipe, out=target, narrator=say, stock=stock, **arguments)
    found = diff(path, target)
    return Rerun(str(run), str(target), found, () if found.weights.same else tuple(_causes(found, path, report)))


def _new(out: Path) -> Path:
    if out.is_dir() and any(out.iterdir()):
        raise LuthierError(f"{out} is not empty.  Choose another --out; nothing was touched.")
    return out


def gone(run: Path, call: Call, arguments: Mapping[str, Any], flags: Mapping[str, str]) -> Iterator[Fault]:
    """What the run was called with and is neither there nor given anew: the names in ``flags``, which say how to give it, and ``ood``."""
    sought = {**{name: arguments[name] for name in flags}, **{f"ood.{k}": v for k, v in arguments["ood"].items()}}
    if isinstance(sought["data"], Mapping):
        sought |= {f"data.{split}": place for split, place in sought.pop("data").items()}
    for name, place in sought.items():
        do = f"Give {flags.get(name.partition('.')[0], '--ood ' + name.removeprefix('ood.') + '=PATH')}."
        if place is None and name in call.memory:
            yield Fault(f"{run}: {name}", "must be given: it was in memory when the run was made", do=do)
        elif isinstance(place, str) and moved(call, place):
            yield Fault(f"{run}: {name}", "must be where it was when the run was made", f"nothing at {place}", do)


def moved(call: Call, place: str) -> bool:
    """Whether ``place`` was on disk when the run was made, and is not now; a hub id and ``demo`` never were."""
    return place in (*call.paths, *call.paths.values()) and not expanded(place).exists()


def _read_otherwise(run: Path, recipe: Recipe, report: Report, then: Mapping[str, Any]) -> Iterator[Fault]:
    """The recipe's file, when it was changed; another version of Luthier may read it otherwise, which the end tells."""
    ours = then.get("versions", {}).get("luthier") == environment()["versions"]["luthier"]
    if recipe.digest != report.recipe_digest and ours:
        do = "Put it back as it was; luthier fit --recipe makes another run of it."
        must = f"must be the recipe of the run (digest {report.recipe_digest})"
        yield Fault(str(run / "recipe.yaml"), must, recipe.digest, do)


def other_data(run: Path, source: str, splits: Mapping[str, Split], report: Report) -> Iterator[Fault]:
    """Data that does not hold what it held when the run was made; other rows would be held out than those it did not train on."""
    if digest(splits) != report.data["digest"]:
        sizes = {name: len(split) for name, split in splits.items()}
        got = "other texts or labels"
        if sizes != report.data["sizes"]:
            got = f"{_counted(sizes)} rows, and not {_counted(report.data['sizes'])}"
        do = "Put the data back as it was, or give a copy of it with --data; for other data, luthier fit makes a new run."
        yield Fault(source, f"must hold what it held when {run} was made", got, do)


def other_weights(run: Path, job: Job, report: Report) -> Iterator[Fault]:
    """A model whose pretrained weights are not those of the run."""
    known = report.model.get("pretrained")
    if known and job.loaded.pretrained != known and job.task.label_names == report.labels:
        do = "Put the weights back as they were, or give a copy of them with --model."
        got = f"the digest {job.loaded.pretrained[:12]}, and not {known[:12]}"
        yield Fault(job.loaded.source, f"must hold the weights that {run} began with", got, do)


def _counted(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {rows}" for name, rows in sizes.items())


def _causes(found: Differences, run: Path, report: Report) -> Iterator[str]:
    """Why the weights may differ, the likeliest first."""
    if found.parted is None and found.scored_alike:
        yield f"{run / 'model'} was changed after the run had ended: losses and scores are the same to the last digit"
    starts = [change for change in found.identity if change.path == "model.start weights"]
    if found.recipe:
        yield "the recipe is read otherwise than it was"
    if starts:
        yield "the run began from other weights: the new head was drawn otherwise"
    told = list(_named(found.environment))
    within = list(_named(changes(surroundings(run), {**surroundings(run), **report.environment})))
    yield from told
    yield from (f"the run itself was gone on with elsewhere: {one}" for one in within)
    device = str(surroundings(run).get("device", "cpu"))
    if device != "cpu":
        yield f"the device {device} does not always add in the same order"
    elif not (told or within or starts or found.recipe or (found.parted is None and found.scored_alike)):
        yield "none is known: recipe, data, start weights, versions and hardware are the same"


def _named(environments: tuple[Change, ...]) -> Iterator[str]:
    """The changes that can change a sum, under the name of the cause, in the order of ``CAUSES``."""
    for name in dict.fromkeys(CAUSES.values()):
        told = [
            f"{one}".removeprefix("versions.") for one in environments if CAUSES.get(one.path.split(".")[0]) == name
        ]
        if told:
            yield f"{name} ({'; '.join(told)})"
