"""The subject of a study: a job, the model that its run ended with, and what each kind of study sees in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from luthier.outputs import logits
from luthier.placement import Placement
from luthier.report import Report
from luthier.sources.text import collate
from luthier.studies import clusters, drift, drift_stages, forgetting
from luthier.studies.kernel_regression import kernel_regressions
from luthier.studies.ntk import ntk
from luthier.training import stages
from luthier.training.job import Job
from luthier.training.replay import Replay

Kind = Literal["ntk", "drift", "clusters", "forgetting"]
KINDS: tuple[Kind, ...] = ("ntk", "drift", "clusters", "forgetting")


@dataclass(frozen=True)
class Study:
    """One study's result.

    Args:
        kind: which study.
        title: what was looked at.
        found: plain numbers.
        lines: the same as text at 80 columns.
        svg: the same as a picture.
    """

    kind: str
    title: str
    found: Mapping[str, Any]
    lines: tuple[str, ...]
    svg: str


@dataclass(frozen=True)
class Subject:
    """What is looked at.

    Args:
        after: the model at the end of the run; before a run, the model as it is.
        report: None before a run.
        rows: most rows of a split that are looked at, the first ones; forgetting looks at all.
    """

    job: Job
    after: nn.Module
    report: Report | None
    replay: Replay
    rows: int

    def study(self, kind: Kind, *, stage: str | None = None, general: str | None = None) -> Study:
        """One study; ``stage`` and ``general`` as in ``luthier.study``."""
        match kind:
            case "ntk":
                return self._kernel(stage)
            case "drift":
                return self._drift()
            case "clusters":
                return self._clusters()
            case "forgetting":
                return self._forgetting(stage, general)

    def _kernel(self, stage: str | None) -> Study:
        """The kernel at the start of a stage, as the stage's own surgery leaves the model."""
        last = stage or self.replay.stages[-1]
        model = self.replay.at(last)
        plan = self.job.plan.stages[self.replay.stages.index(last)]
        where: tuple[str, ...] | None = ("all",)
        if plan.stage.solver != "exact":
            stages.attach(self.job, plan, model, Placement())
            where = None
        train = self._batches("train", self.rows, size=1)
        found = ntk(model, train, held=self._batches(self._held, self.rows, size=1), where=where)
        fits = kernel_regressions(found)
        told = found.to_dict() | {"kernel_regression": [fit.to_dict() for fit in fits.values()]}
        fitted = [line for fit in fits.values() for line in fit.lines()]
        lines = (*found.lines(), *(fitted or ["No kernel regression: it takes at least five training rows."]))
        title = f"The kernel of {len(train)} training rows at the start of {last!r}"
        return Study("ntk", title, told, lines, found.plot())

    def _drift(self) -> Study:
        """Before and after each stage; stages between which the model is not known are taken together."""
        inside = self._batches(self._held, self.rows)
        rows = _count(inside)
        far = next((name for name in self.job.encoded if name.startswith("ood_")), None)
        outside = self._batches(far, rows) if far else None
        starts: list[tuple[str, drift.Look | None]] = []
        hidden = []
        for name in self.replay.stages:
            if self.replay.blocked(name):
                starts.append((name, None))
                hidden.append(self._unknown(name))
            else:
                starts.append((name, drift.look(self.replay.at(name), inside, outside=outside)))
        found = drift_stages.by_stage(starts, drift.look(self.after, inside, outside=outside), hidden=hidden)
        title = f"How the features of {rows} rows of {self._held} moved" + (f", and of {far}" if far else "")
        return Study("drift", title, found.to_dict(), tuple(found.lines()), found.plot())

    def _clusters(self) -> Study:
        inside = self._batches(self._held, self.rows)
        found = clusters.study(self.after, inside)
        before = clusters.study(self.job.loaded.model, inside) if self.report else None
        told = found.to_dict() | ({"before": before.to_dict()} if before else {})
        title = f"How the labels of {_count(inside)} rows of {self._held} lie"
        return Study("clusters", title, told, tuple(found.lines(before=before)), found.plot(before=before))

    def _forgetting(self, stage: str | None, general: str | None) -> Study:
        """The end of the run against the start of ``stage``, or of the last stage that trains, as near to it as is known."""
        splits = [name for name in self.job.encoded if name not in ("train", "out_domain")]
        forgetting.general_of(splits, general)  # a wrong name is told before the work
        trained = [plan.name for plan in self.job.plan.stages if plan.stage.solver != "exact"] or self.replay.stages[:1]
        since, notes = stage or trained[-1], []
        if stage is None and self.replay.blocked(since):
            notes.append(self._unknown(since))
            since = next(name for name in reversed(trained) if not self.replay.blocked(name))
        if since == self.replay.stages[0] and self.job.loaded.fresh:
            notes.append("The head is a random one there: what it has right it has by chance.")
        measured = self.report.metrics.get("ood", {}) if self.report else {}
        if gone := [name for name in measured if f"ood_{name}" not in splits]:
            notes.append(f"The run was measured on {', '.join(gone)} too: name it again with --ood NAME=PATH.")
        before, after = (self._logits(model, splits) for model in (self.replay.at(since), self.after))
        told = zip(before, after, map(self.job.targets, splits), strict=True)
        found = forgetting.study(dict(zip(splits, told, strict=True)), since=since, general=general, notes=notes)
        title = f"What was forgotten and learned since the start of {since!r}"
        return Study("forgetting", title, found.to_dict(), tuple(found.lines()), found.plot())

    @property
    def _held(self) -> str:
        return "test" if "test" in self.job.encoded else "validation"

    def _unknown(self, stage: str) -> str:
        why = f"{self.replay.blocked(stage)!r} trains, and its end was not kept"
        return f"The model before {stage!r} is not known: {why}. luthier fit --keep-stages keeps it."

    def _logits(self, model: nn.Module, splits: Sequence[str]) -> list[Any]:
        placement, pad = Placement(), self.job.pad_id
        model.to(placement.device)
        found = [logits(model, self.job.encoded[name], pad_id=pad, placement=placement) for name in splits]
        model.to("cpu")
        return found

    def _batches(self, split: str, rows: int, *, size: int = 16) -> list[dict[str, Tensor]]:
        encoded = self.job.encoded[split]
        return list(_cut(encoded, min(rows, len(encoded)), size, self.job.pad_id))


def _count(batches: Sequence[Mapping[str, Tensor]]) -> int:
    return sum(len(batch["labels"]) for batch in batches)


def _cut(encoded: Any, rows: int, size: int, pad: int) -> Iterator[dict[str, Tensor]]:
    for at in range(0, rows, size):
        yield collate(encoded, range(at, min(at + size, rows)), pad_id=pad)
