"""Which checkpoints are there after a save, and after going back over torn ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from luthier import checkpoint
from luthier.folder import RunFolder


def save(folder: Path, stage: int, step: int | None) -> checkpoint.Checkpoint:
    return checkpoint.save(folder, {"x": torch.zeros(4)}, stage=stage, step=step)


def tear(one: checkpoint.Checkpoint) -> None:
    state = one.path / "state.pt"
    state.write_bytes(state.read_bytes()[:-7])


def there(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def back(run: Path, *, main: bool = True) -> tuple[checkpoint.Checkpoint | None, checkpoint.Checkpoint | None]:
    """What a run goes on from."""
    folder = RunFolder(run, resume=True, identity={}, main=main)
    found = folder.latest(lambda text: None)
    folder.close()
    return found


@pytest.fixture
def run(tmp_path):
    RunFolder(tmp_path / "run", resume=False, identity={}).close()
    return tmp_path / "run"


@pytest.mark.parametrize("pid", [os.getpid(), 4194304], ids=["mine", "another"])
def test_half_written_ones_of_killed_processes_are_removed(pid, tmp_path):
    half = tmp_path / f".stage-0-step-00000010.{pid}.tmp"
    half.mkdir()
    (half / "state.pt").write_bytes(b"half")
    save(tmp_path, 0, 10)
    assert there(tmp_path) == ["stage-0-step-00000010"]
    assert checkpoint.latest(tmp_path)[1] is not None
    half.mkdir()
    checkpoint.clear(tmp_path)
    assert there(tmp_path) == []


def test_the_two_newest_steps_and_the_start_of_the_stage_are_kept(tmp_path):
    for stage, step in ((0, 10), (0, 20), (0, 30), (1, None), (1, 5), (1, 10), (1, 15)):
        save(tmp_path, stage, step)
        assert (tmp_path / f"stage-{stage}-{'start' if step is None else f'step-{step:08d}'}").is_dir()
    assert there(tmp_path) == ["stage-1-start", "stage-1-step-00000010", "stage-1-step-00000015"]


@pytest.mark.parametrize("forgotten", [True, False])
def test_after_torn_ones_the_new_ones_stay(forgotten, run):
    """Even where the torn ones could not be removed."""
    folder = run / "checkpoints"
    for step in (100, 120):
        tear(save(folder, 0, step))
    assert (back(run) if forgotten else checkpoint.latest(folder)) == (None, None)
    for step in (10, 20, 30):
        new = save(folder, 0, step)
        assert checkpoint.latest(folder) == (None, new)
    torn = [] if forgotten else ["stage-0-step-00000100", "stage-0-step-00000120"]
    assert there(folder) == ["stage-0-step-00000020", "stage-0-step-00000030", *torn]


@pytest.mark.parametrize("forgotten", [True, False])
def test_after_a_torn_start_the_new_ones_of_the_stage_before_stay(forgotten, run):
    folder = run / "checkpoints"
    start = save(folder, 1, None)
    for step in (5, 10):
        save(folder, 1, step)
    tear(start)
    assert (back(run) if forgotten else checkpoint.latest(folder)) == (None, None)
    for step in (10, 20, 30):
        new = save(folder, 0, step)
        assert checkpoint.latest(folder) == (None, new)
    later = [] if forgotten else ["stage-1-start", "stage-1-step-00000005", "stage-1-step-00000010"]
    assert there(folder) == ["stage-0-step-00000020", "stage-0-step-00000030", *later]


def test_what_the_run_can_go_on_from_stays(run):
    folder = run / "checkpoints"
    save(folder, 0, 10)
    start, one, two = save(folder, 1, None), save(folder, 1, 5), save(folder, 1, 10)
    assert back(run) == (start, two)
    assert there(folder) == ["stage-1-start", "stage-1-step-00000005", "stage-1-step-00000010"]
    tear(two)
    assert back(run) == (start, one)
    assert there(folder) == ["stage-1-start", "stage-1-step-00000005"]
    tear(one)
    assert back(run) == (start, None)
    assert there(folder) == ["stage-1-start"]


def test_who_only_looks_removes_nothing(run):
    folder = run / "checkpoints"
    for step in (10, 20):
        last = save(folder, 0, step)
    tear(last)
    before = there(folder)
    checkpoint.latest(folder)
    back(run, main=False)  # another process of the same run
    assert there(folder) == before


def test_what_only_cannot_be_read_now_stays(run, monkeypatch):
    folder = run / "checkpoints"
    start, step = save(folder, 1, None), save(folder, 1, 5)
    real = Path.open

    def unanswered(path, *args, **named):
        if path.parent == start.path and path.name == "state.pt":
            raise OSError(5, "Input/output error")
        return real(path, *args, **named)

    with monkeypatch.context() as for_a_while:
        for_a_while.setattr(Path, "open", unanswered)
        assert back(run) == (None, None)
    assert back(run) == (start, step)
