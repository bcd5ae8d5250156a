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

    @property
    def at(self) -> tuple[int, int]:
        """Its place in the run: a stage's start comes before its steps."""
        return self.stage, -1 if self.step is None else self.step

    def load(self) -> dict[str, Any]:
        """What was saved, on the CPU."""
        state: dict[str, Any] = torch.load(self.path / "state.pt", map_location="cpu", weights_only=True)
        return state


def save(folder: Path, state: Mapping[str, Any], *, stage: int, step: int | None, keep: int = 2) -> Checkpoint:
    """Saves ``state`` (tensors and plain values) and forgets all but the ``keep`` newest step checkpoints up to this one.

    Those after it, if there are any, were gone back from, and are no newer. No other process may be saving here: the half-written ones
    of processes that were killed are removed first.

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

    _sweep(folder)
    atomically(path, write)
    saved = Checkpoint(path, stage, step)
    steps = [found for found in _listed(folder) if found.step is not None and found.at <= saved.at]
    for old in steps[:-keep]:
        shutil.rmtree(old.path, ignore_errors=True)
    for start in _listed(folder):
        if start.step is None and start.stage < stage:
            shutil.rmtree(start.path, ignore_errors=True)
    return saved


def latest(
    folder: Path, *, say: Callable[[str], None] = lambda text: None, forget: bool = False
) -> tuple[Checkpoint | None, Checkpoint | None]:
    """The newest whole checkpoint to go on from, as (the start of its stage, the step in it).

    Either may be None: no start means that the stage began from the source model; no step means that the stage has just begun. A torn
    checkpoint is named through ``say`` and the one before it is used.

    Args:
        forget: whether the run goes on from what is given. Then the torn are removed, and the steps whose stage's start is torn or not
            there: no run can use them, and they would be taken for newer than what is saved next. One that only cannot be read now
            (a disk that does not answer) stays, with its stage's steps.
    """
    whole, gone, unread = [], [], set()
    for found in _listed(folder):
        fault, lost = _torn(found.path)
        if fault:
            say(f"checkpoint {found.path.name} is torn ({fault}); the one before it is used")
        if not fault:
            whole.append(found)
        elif lost:
            gone.append(found)
        else:
            unread.add(found.at)
    starts = {found.stage: found for found in whole if found.step is None}
    usable = [found for found in whole if found.stage == 0 or found.stage in starts]
    if forget:
        gone += [found for found in whole if found not in usable and (found.stage, -1) not in unread]
        for found in gone:
            shutil.rmtree(found.path, ignore_errors=True)
    if not usable:
        return None, None
    newest = usable[-1]
    return starts.get(newest.stage), None if newest.step is None else newest


def clear(folder: Path) -> None:
    """Removes every checkpoint: the run is done and its model is saved."""
    _sweep(folder)
    for found in _listed(folder):
        shutil.rmtree(found.path, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Removes what processes that were killed left half-written."""
    for half in folder.glob(".stage-*.tmp"):
        shutil.rmtree(half, ignore_errors=True)


def _listed(folder: Path) -> list[Checkpoint]:
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append(Checkpoint(path, int(match[1]), int(match[2]) if match[2] else None))
    return sorted(found, key=lambda item: item.at)


def _torn(path: Path) -> tuple[str, bool]:
    """Why a checkpoint cannot be used, empty where it can; and whether that is for good."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        size, digest = _digest(path / "state.pt")
    except (FileNotFoundError, ValueError) as error:
        return str(error), True
    except OSError as error:
        return str(error), False
    said = manifest.get("state.pt", {})
    if said.get("bytes") != size:
        return f"{size} bytes of {said.get('bytes')}", True
    return ("", False) if said.get("sha256") == digest else ("its contents changed", True)


def _digest(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
