"""The end of a run: scores on every split, calibration, the saved model and its check, the report."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from luthier import evaluate
from luthier.core.claims import Place
from luthier.core.context import Progress, Shelf
from luthier.core.ingredient import Findings, Outputs
from luthier.errors import RunError
from luthier.folder import RunFolder, environment
from luthier.narrate import Narrator
from luthier.outputs import adjusted, by_split, keep, logits, scores
from luthier.placement import Placement
from luthier.report import Movement, Report, StageReport
from luthier.sources.data import digests
from luthier.training.job import Job
from luthier.training.trace import Trace

MOST_MISTAKES = 20
MOST_POINTS = 500


def conclude(
    job: Job,
    trace: Trace,
    placement: Placement,
    folder: RunFolder | None,
    notes: list[str],
    say: Narrator,
    seconds: float,
) -> Report:
    """Measures the trained model on every split, saves it, checks what was saved, and writes the report."""
    model = job.loaded.model.to(placement.device)
    held_out = {name: encoded for name, encoded in job.encoded.items() if name not in ("train", "out_domain")}
    with say.bar("measuring", sum(map(len, held_out.values()))) as bar:
        outputs = {
            name: Outputs(
                logits(model, encoded, pad_id=job.pad_id, placement=placement, tick=bar.advance), job.targets(name)
            )
            for name, encoded in held_out.items()
        }
    findings, told = _measured(job, outputs)
    notes = [*notes, *told]
    after = {name: adjusted(out, findings) for name, out in outputs.items()} if findings and findings.changes else {}
    if folder and placement.main:
        notes += _saved(job, folder.path, outputs)
        keep(folder.path, outputs)
    report = Report(
        recipe=job.recipe.name,
        recipe_digest=job.recipe.digest,
        seed=job.recipe.seed,
        task=job.task.kind,
        labels=job.task.label_names,
        metric=job.metric,
        metrics=by_split({name: scores(job.task, out) for name, out in outputs.items()}),
        calibrated=by_split({name: scores(job.task, out) for name, out in after.items()}) if after else {},
        calibration=_calibration(findings),
        stages=tuple(StageReport(**{**stage, "notes": tuple(stage["notes"])}) for stage in trace.stages),
        movement=tuple(Movement(**row) for row in trace.movement),
        curves={
            "loss": trace.loss,
            "learning_rate": trace.rate,
            "validation": trace.validation,
            "stage_starts": trace.starts,
        },
        data={
            "source": job.data.source,
            "digest": job.data.digest,
            "digests": digests(job.data.splits),
            "notes": list(job.data.notes),
            "sizes": {name: len(split) for name, split in job.data.splits.items()},
            "columns": asdict(job.data.columns),
            "constant": _constant(job, outputs),
        },
        model={
            "source": job.loaded.source,
            "digest": job.loaded.digest,
            "pretrained": job.loaded.pretrained,
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "max_length": job.loaded.max_length,
        },
        plan=job.plan.to_json(),
        warnings=tuple(dict.fromkeys(notes)),
        seconds=seconds,
        path=str(folder.path) if folder else None,
        chosen_on="validation" if _chooses(job) else "",
        environment={**placement.described(), **environment()},
        **_pictures(job, outputs, after),
    )
    if folder and placement.main:
        from luthier import page

        page.save(report, folder.path)
        report.save(folder.path)  # last: a folder with report.json holds a run that has ended
    return report


def _measured(job: Job, outputs: Mapping[str, Outputs]) -> tuple[Findings | None, list[str]]:
    """What the last stage's ingredients find in the outputs."""
    plan = job.plan.stages[-1]
    found: Findings | None = None
    notes: list[str] = []
    for entry in plan.entries:
        ctx = plan.context(
            entry, seed=job.recipe.seed, progress=Progress(plan.steps, plan.steps), shelf=Shelf(), notes=notes
        )
        one = entry.ingredient.measure(outputs, ctx)
        if one is not None:
            notes += [note for note in one.notes if note not in notes]
            found = one if found is None else found.beside(one)
    return found, notes


def _constant(job: Job, outputs: Mapping[str, Outputs]) -> dict[str, float]:
    """By split, the RMSE of always answering the mean of the training labels; empty for a classification."""
    if job.task.kind != "regression":
        return {}
    mean = job.targets("train").mean(dtype=np.float64)
    return {name: float(np.sqrt(np.square(out.targets - mean).mean())) for name, out in outputs.items()}


def _chooses(job: Job) -> bool:
    """Whether a stage chooses weights, or a rate, by the validation rows."""
    entries = [entry for plan in job.plan.stages for entry in plan.entries]
    return any(claim.place == Place.VALIDATION for entry in entries for claim in entry.claims)


def _calibration(findings: Findings | None) -> dict[str, Any]:
    if findings is None:
        return {}
    sets = None if findings.sets is None else asdict(findings.sets)
    changes = {"scale": findings.scale, "shift": findings.shift, "table": findings.table}
    return {**findings.values, **changes, "sets": sets}


def _saved(job: Job, path: Path, outputs: Mapping[str, Outputs]) -> list[str]:
    """Saves model and tokenizer, loads them again as a stranger would, and compares the logits.

    Raises:
        RunError: they cannot be written, as where the disk is full.
    """
    from luthier.jsonfile import atomically
    from luthier.sources.models import reload, store

    model, tokenizer = job.loaded.model, job.loaded.tokenizer

    def write(beside: Path) -> None:
        beside.mkdir(parents=True)
        store(model.cpu(), tokenizer, beside)

    try:
        atomically(path / "model", write)
    except (SafetensorError, RunError) as error:
        command = f"luthier fit --out {shlex.quote(str(path))} --resume"
        do = f"When that is mended (a full disk: make room), {command} goes on."
        raise RunError(f"the model is not saved: {str(error).rstrip('.')}.  {do}") from error
    name = "validation" if "validation" in outputs else next(iter(outputs), None)
    if name is None:
        return []
    encoded = job.encoded[name].take(range(min(8, len(job.encoded[name]))))
    again = logits(reload(path / "model"), encoded, pad_id=job.pad_id)
    ours = logits(model, encoded, pad_id=job.pad_id)
    worst = float(np.abs(again - ours).max())
    if worst > 1e-4 * max(1.0, float(np.abs(ours).max())):
        return [f"the saved model, loaded again, gives other logits (by up to {worst:.2g})"]
    return []


def _pictures(job: Job, outputs: Mapping[str, Outputs], after: Mapping[str, Outputs]) -> dict[str, Any]:
    """What only the page shows: confusion, reliability, risk against coverage and mistakes, or the scatter of a regression."""
    shown = "test" if "test" in outputs else "validation"
    if job.task.kind == "regression":
        chosen = outputs.get(shown)
        points = np.stack([chosen.targets, chosen.logits[:, 0]], axis=1)[:MOST_POINTS].tolist() if chosen else []
        return {"confusion": {}, "reliability": {}, "mistakes": [], "scatter": points}
    bins = {
        name: {
            "before": [asdict(one) for one in evaluate.reliability(out.logits, out.targets)],
            "after": [asdict(one) for one in evaluate.reliability(after[name].logits, out.targets)]
            if name in after
            else [],
        }
        for name, out in outputs.items()
    }
    confusion = {name: evaluate.confusion(out.logits, out.targets).tolist() for name, out in outputs.items()}
    trust = {
        name: {
            "before": evaluate.trust(out.logits, out.targets),
            "after": evaluate.trust(after[name].logits, out.targets) if name in after else {},
        }
        for name, out in outputs.items()
    }
    selective = {
        name: {
            "before": evaluate.selective(out.logits, out.targets),
            "after": evaluate.selective(after[name].logits, out.targets) if name in after else [],
        }
        for name, out in outputs.items()
    }
    mistakes = _mistakes(job, shown, outputs, after)
    return {"confusion": confusion, "reliability": bins, "trust": trust, "selective": selective, "mistakes": mistakes}


def _mistakes(
    job: Job, name: str, outputs: Mapping[str, Outputs], after: Mapping[str, Outputs]
) -> list[dict[str, Any]]:
    if name not in outputs:
        return []
    out = after.get(name, outputs[name])
    split, likely = job.data.splits[name], job.task.probabilities(out.logits)
    return [
        {
            "split": name,
            "text": split.texts[row],
            "pair": split.pairs[row] if split.pairs else None,
            "label": job.task.label_names[int(out.targets[row])],
            "prediction": job.task.label_names[int(likely[row].argmax())],
            "confidence": float(likely[row].max()),
        }
        for row in evaluate.mistakes(out.logits, out.targets, most=MOST_MISTAKES)
    ]
