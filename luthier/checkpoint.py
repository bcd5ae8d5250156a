"""Checkpoints that are whole or not there: written beside, flushed to disk, renamed; torn ones are seen and passed over.

A checkpoint is a folder ``stage-1-step-000120`` with ``state.pt`` and ``manifest.json`` (sizes and sha256). A ``stage-1-start`` holds
the weights with which stage 1 began; it stays until the run is done, because surgery and reference weights start from it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from luthier.jsonfile import atomically, flush

_NAME = re.compile(r"stage-(\d+)-(?:step-(\d+)|start)")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk. ``step`` is None for a stage's start."""

    path: Path
    stage: int
    step: int | None

    def load(self) -> dict[str, Any]:
        """What was saved, on the CPU."""
        state: dict[str, Any] = torch.load(self.path / "state.pt", map_location="cpu", weights_only=True)
        return state


def save(folder: Path, state: Mapping[str, Any], *, stage: int, step: int | None, keep: int = 2) -> Checkpoint:
    """Saves ``state`` (tensors and plain values) and forgets all but the ``keep`` newest step checkpoints.

    Raises:
        RunError: it cannot be written; earlier checkpoints are untouched.
    """
    name = f"stage-{stage}-start" if step is None else f"stage-{stage}-step-{step:08d}"
    path = folder / name

    def write(beside: Path) -> None:
        beside.mkdir(parents=True)
        try:
            torch.save(dict(state), beside / "state.pt")
        except RuntimeError as error:  # torch's own writer says so of a full disk
            raise OSError(str(error).splitlines()[0]) from error
        size, digest = _digest(beside / "state.pt")
        (beside / "manifest.json").write_text(json.dumps({"state.pt": {"bytes": size, "sha256": digest}}))
        for item in beside.iterdir():
            flush(item)

    atomically(path, write)
    steps = [found for found in _listed(folder) if found.step is not None]
    for old in steps[:-keep]:
        shutil.rmtree(old.path, ignore_errors=True)
    for start in _listed(folder):
        if start.step is None and start.stage < stage:
            shutil.rmtree(start.path, ignore_errors=True)
    return Checkpoint(path, stage, step)


def latest(
    folder: Path, *, say: Callable[[str], None] = lambda text: None
) -> tuple[Checkpoint | None, Checkpoint | None]:
    """The newest whole checkpoint to go on from, as (the start of its stage, the step in it).

    Either may be None: no start means that the stage began from the source model; no step means that the stage has just begun. A torn
    checkpoint is named through ``say`` and the one before it is used.
    """
    whole = []
    for found in _listed(folder):
        fault = _torn(found.path)
        if fault:
            say(f"checkpoint {found.path.name} is torn ({fault}); the one before it is used")
        else:
            whole.append(found)
    starts = {found.stage: found for found in whole if found.step is None}
    for found in reversed(whole):
        if found.step is None:
            return found, None
        if found.stage == 0 or found.stage in starts:
            return starts.get(found.stage), found
    return None, None


def clear(folder: Path) -> None:
    """Removes every checkpoint: the run is done and its model is saved."""
    for found in _listed(folder):
        shutil.rmtree(found.path, ignore_errors=True)


def _listed(folder: Path) -> list[Checkpoint]:
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append(Checkpoint(path, int(match[1]), int(match[2]) if match[2] else None))
    return sorted(found, key=lambda item: (item.stage, -1 if item.step is None else item.step))


def _torn(path: Path) -> str:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        size, digest = _digest(path / "state.pt")
    except (OSError, ValueError) as error:
        return str(error)
    said = manifest.get("state.pt", {})
    if said.get("bytes") != size:
        return f"{size} bytes of {said.get('bytes')}"
    return "" if said.get("sha256") == digest else "its contents changed"


def _digest(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
