"""What a model says of a split: logits, and the scores made of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from luthier import evaluate
from luthier.core.calibration import through_logits
from luthier.core.ingredient import Findings, Outputs
from luthier.core.modes import paused
from luthier.errors import Fault, LuthierError
from luthier.jsonfile import atomically
from luthier.placement import Placement
from luthier.sources.tasks import Task
from luthier.sources.text import Encoded, collate

BATCH = 64  # rows in one forward pass of an evaluation


def logits(
    model: nn.Module,
    encoded: Encoded,
    *,
    pad_id: int,
    placement: Placement | None = None,
    size: int = BATCH,
    tick: Any = lambda rows: None,
) -> np.ndarray[Any, Any]:
    """The model's outputs in eval mode, shape (rows, outputs), float32, in the rows' order. Every module's mode comes back.

    Rows go in order of length, so that little is padded; with several processes each takes its share of the batches.
    """
    device = placement.device if placement else next(model.parameters()).device
    rank, many = (placement.rank, placement.processes) if placement else (0, 1)
    order = sorted(range(len(encoded)), key=lambda row: encoded.lengths[row])
    batches = [order[at : at + size] for at in range(0, len(order), size)]
    each = -(-len(batches) // many)
    mine: list[tuple[list[int], np.ndarray[Any, Any]]] = []
    with paused(model), torch.no_grad():
        for turn in range(each):
            rows = batches[min(turn * many + rank, len(batches) - 1)]  # all processes take the same number of turns
            batch = collate(encoded, rows, pad_id=pad_id, device=device)
            batch.pop("labels", None)
            out = model(**batch).logits
            mine.append((rows, out.float().cpu().numpy()))
            tick(len(rows) * many)
    everyone = placement.gathered(mine) if placement else mine
    found = np.empty((len(encoded), everyone[0][1].shape[1]), dtype=np.float32)
    for rows, part in everyone:
        found[rows] = part
    return found


def keep(folder: Path, outputs: Mapping[str, Outputs]) -> None:
    """Writes outputs.npz: of each split the model's outputs before calibration, and what there was to predict."""

    def write(beside: Path) -> None:
        arrays: dict[str, Any] = {}
        for name, out in outputs.items():
            arrays |= {f"{name}/logits": out.logits, f"{name}/targets": out.targets}
        with beside.open("wb") as file:
            np.savez(file, **arrays)

    atomically(folder / "outputs.npz", write)


def kept(folder: Path) -> dict[str, Outputs]:
    """The outputs of a run that has ended, by split.

    Raises:
        LuthierError: the run is of a version that did not keep them.
    """
    file = folder / "outputs.npz"
    if not file.is_file():
        raise LuthierError.of(
            [Fault(str(file), "must be there", do="Run it again: an old run did not keep it.")], "the run"
        )
    with np.load(file) as held:
        names = dict.fromkeys(name.rsplit("/", 1)[0] for name in held.files)
        return {name: Outputs(held[f"{name}/logits"], held[f"{name}/targets"]) for name in names}


def scores(task: Task, out: Outputs) -> dict[str, Any]:
    """The metrics of one split."""
    if task.kind == "classification":
        return evaluate.classification(out.logits, out.targets)
    return evaluate.regression(out.logits[:, 0], out.targets)


def adjusted(out: Outputs, findings: Findings) -> Outputs:
    """The same outputs with a calibration's scale, shift and table."""
    changed = out.logits.astype(np.float64)
    if findings.scale is not None:
        changed = changed * np.asarray(findings.scale)
    if findings.shift is not None:
        changed = changed + np.asarray(findings.shift)
    if findings.table is not None:
        changed = through_logits(findings.table, changed)
    return Outputs(changed, out.targets)


def by_split(values: Mapping[str, Any]) -> dict[str, Any]:
    """``validation`` and ``test`` as they are, ``ood_NAME`` under ``ood``."""
    told = {name: value for name, value in values.items() if not name.startswith("ood_")}
    shifted = {name.removeprefix("ood_"): value for name, value in values.items() if name.startswith("ood_")}
    return {**told, "ood": shifted}
