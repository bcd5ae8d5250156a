"""study: what fine-tuning is about to do, or has done, to a model: its kernel, its features, its clusters, what it forgot."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier import call
from luthier.errors import Fault, LuthierError
from luthier.finished.reruns import moved, other_data, other_weights
from luthier.finished.subject import KINDS, Kind, Study, Subject
from luthier.finished.weights import weightless
from luthier.jsonfile import expanded, plain, write_whole
from luthier.narrate import Narrator, Silent
from luthier.recipe import text as recipes
from luthier.report import Report
from luthier.sources import models
from luthier.training.job import Columns, prepare
from luthier.training.replay import Replay

__all__ = ["KINDS", "Kind", "Study", "study"]


def study(
    place: str | Path,
    *,
    kinds: Sequence[Kind] | None = None,
    recipe: str = "lp-ft",
    data: Any = None,
    stage: str | None = None,
    general: str | None = None,
    ood: Mapping[str, Any] | None = None,
    out_domain: Any = None,
    label_map: Mapping[str, Mapping[str, str]] | None = None,
    rows: int = 64,
    seed: int | None = None,
    narrator: Narrator | None = None,
) -> list[Study]:
    """Looks at a finished run, or at a model before a run. Trains nothing but the exact probes that come before a stage.

    Args:
        place: a run folder; or a model (a folder, a hub id, ``demo``), with ``recipe`` and ``data``.
        kinds: ``ntk``, the kernel at the start of a stage; ``drift``, how far the features moved in each stage (a run only);
            ``clusters``, how the labels lie in each layer; ``forgetting``, which rows the last training lost (a run of a
            classification only). None = all that can be had.
        recipe: of a model before a run: by which it would be trained.
        data, ood, out_domain, label_map: as in ``fit``; they go before the run's own.
        stage: at whose start the kernel is, and since when forgetting counts; None = the last one, and the last one that trains.
        general: the split that should not be forgotten; None = all shifted tests, else ``test``.
        rows: rows that are looked at, the first ones of each split; forgetting looks at all.
        seed: of the head of a model that was not trained yet.
        narrator: who says what happens.
    Returns:
        one a kind. With a run folder they are also written into ``study/`` there, and into its report.html.
    Raises:
        LuthierError: what is needed is not there, or is not what the run was made from.
    """
    say = narrator or Silent()
    path = expanded(place)
    report = Report.load(path) if (path / "report.json").is_file() else None
    asked = list(KINDS if kinds is None else kinds)
    for kind, why in _without(report).items():
        if kind in asked:
            asked.remove(kind)
            say.line(f"{kind} {why}, and is left out")
    known = recipes.read(recipe, seed=seed) if report is None else recipes.read(path / "recipe.yaml")
    called = _called(path, report, data) if report else {}
    job = prepare(
        known,
        model=called.get("model", str(place)),
        data_source=known.source("in", called.get("data") if data is None else data),
        columns=None if report is None else Columns(*(report.data["columns"][name] for name in _COLUMNS)),
        ood=ood or called.get("ood"),
        out_domain=known.source("out", called.get("out_domain") if out_domain is None else out_domain),
        label_map=label_map or (None if ood else called.get("label_map")),
        narrator=say,
    )
    if report is not None:
        own = {name: job.data.splits[name] for name in report.data["sizes"] if name in job.data.splits}
        # what is given anew is the caller's; without all its shifted tests it cannot be told
        whole = data is None and not ood and out_domain is None and len(own) == len(report.data["sizes"])
        faults = [*other_data(path, job.data.source, own, report)] if whole else []
        faults += other_weights(path, job, report)
        if faults:
            raise LuthierError.of(faults, f"study of {path}")
    if report is not None and (faults := weightless(path)):
        raise LuthierError.of(faults, f"study of {path}")
    after = models.reload(path / "model") if report else job.loaded.model
    subject = Subject(job, after, report, Replay(job, path if report else None, say), rows)
    found = []
    for kind in asked:
        with say.bar(kind, 1) as bar:
            try:
                found.append(subject.study(kind, stage=stage, general=general))
            except LuthierError as error:
                if kinds is not None:
                    raise
                say.line(f"{kind} is left out: {error}")
            bar.advance(1)
    if report is not None:
        for one in found:
            write_whole(
                path / "study" / f"{one.kind}.json", json.dumps(plain(dataclasses.asdict(one)), indent=1) + "\n"
            )
        from luthier import page

        page.save(report, path)
    return found


_COLUMNS = ("text", "text_pair", "label")


def _without(report: Report | None) -> dict[str, str]:
    """The kinds that cannot be had, and why."""
    if report is None:
        needs = "compares before and after: it needs the folder of a run that has ended"
        return {"drift": needs, "forgetting": needs}
    return {} if report.task == "classification" else {"forgetting": "is for classes: no number is plainly right"}


def _called(run: Path, report: Report, data: Any) -> dict[str, Any]:
    """What the run was called with, where that is now, without the shifted tests that are on disk no more.

    Raises:
        LuthierError: its model was in memory, or its data, in whose place no ``data`` is given.
    """
    told: dict[str, Any] = {name: _named(getattr(report, name)["source"]) for name in ("model", "data")}
    if (run / call.NAME).is_file():
        then = call.Call.load(run)
        told = then.arguments()
        ood = {name: place for name, place in told["ood"].items() if place is not None and not moved(then, place)}
        told["label_map"] = {
            name: one for name, one in told["label_map"].items() if name in ood or name not in told["ood"]
        }
        told["ood"] = ood
    if told["model"] is None or (told["data"] is None and data is None):
        do = "Give --data, and run it from a model folder or a hub id."
        fault = Fault(str(run), "must name where its model and data came from", "memory", do)
        raise LuthierError.of([fault], "study")
    return told


def _named(source: Any) -> str | None:
    """What a report says was named; None for what was in memory."""
    return None if str(source).endswith("in memory") else str(source)
