"""Runs that are no part of a comparison any more: made of other rows, or from another model, than the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.errors import Fault, LuthierError
from luthier.report import Report
from luthier.sources.data import digests
from luthier.training.job import Job
from luthier.trials.design import Trial
from luthier.trials.desk import Desk

_DO = "Choose another --out; or remove that folder, and the run is made anew."


def stale(trials: Sequence[Trial], desk: Desk, job: Job) -> list[Fault]:
    """Runs that have ended and were made of other rows, or from another model, than ``job`` has now."""
    now = digests(job.data.splits) if trials else {}
    faults = []
    for trial in trials:
        told = desk.report(trial)
        then: Mapping[str, str] = told["data"].get("digests", {})
        odd = [f"other rows in {name}" for name in now if name in then and then[name] != now[name]]
        if told["model"]["pretrained"] != job.loaded.pretrained:
            odd.append("another model")
        if odd:
            where = f"runs/{trial.name}"
            faults.append(Fault(where, "must be of the data and the model as they are now", ", ".join(odd), _DO))
    return faults


def mixed(reports: Mapping[str, Report]) -> None:
    """Refuses runs of one setting that were measured on other rows than the first of them.

    Raises:
        LuthierError: some were; each is named.
    """
    if not reports:
        return
    first = next(iter(reports))
    faults = []
    for name, report in reports.items():
        one, other = _measured(report), _measured(reports[first])
        odd = [f"other rows in {split}" for split in one if split in other and one[split] != other[split]]
        if odd:
            faults.append(Fault(f"runs/{name}", f"must be measured on the rows of runs/{first}", ", ".join(odd), _DO))
    if faults:
        raise LuthierError.of(faults, "the runs that are there")


def _measured(report: Report) -> dict[str, Any]:
    told: Mapping[str, Any] = report.data.get("digests", {})
    return {name: value for name, value in told.items() if name not in ("train", "out_domain")}
