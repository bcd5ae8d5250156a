"""Where a run cannot be written it says so before anything is loaded."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest

from luthier.errors import LuthierError
from luthier.folder import RunFolder, refuse


def test_a_folder_inside_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(LuthierError, match="is a file"):
        refuse(tmp_path / "file" / "run", resume=False)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture
def run(tmp_path):
    """A run that began."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "environment.json").write_text(json.dumps({"identity": {"data": "these"}}))
    return tmp_path / "run"


def test_a_lock_on_a_file_that_was_removed_meanwhile_keeps_no_one_out_and_is_taken_anew(run, monkeypatch):
    """Between opening and locking the old holder lets go, and a third process takes the folder."""
    real, third = fcntl.flock, []

    def late(file, how):
        if not third:
            (run / ".lock").unlink()
            third.append((run / ".lock").open("w"))
            real(third[0], fcntl.LOCK_EX)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(LuthierError, match="is being written by another process"):
        RunFolder(run, resume=True, identity={"data": "these"})
    third[0].close()
    RunFolder(run, resume=True, identity={"data": "these"}).close()


def test_a_lock_file_is_removed_while_it_is_still_held(run, monkeypatch):
    """Else it could be the next holder's."""
    real, held = Path.unlink, []

    def unlink(path, missing_ok=False):
        with path.open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.append(path.name)
        real(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    RunFolder(run, resume=True, identity={"data": "these"}).close()
    assert held == [".lock"] and not (run / ".lock").exists()


def test_a_run_that_another_process_began_while_this_one_came_to_the_lock_is_not_taken_for_a_new_one(
    tmp_path, monkeypatch
):
    real = fcntl.flock

    def late(file, how):
        real(file, how)
        (tmp_path / "run" / "environment.json").write_text(json.dumps({"identity": {"data": "others"}}))

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(LuthierError, match="holds another run"):
        RunFolder(tmp_path / "run", resume=True, identity={"data": "these"})
    assert "others" in (tmp_path / "run" / "environment.json").read_text()
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_disk_without_locks_is_told_of(run, monkeypatch):
    def none(file, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(LuthierError, match="cannot be written to: No locks available"):
        RunFolder(run, resume=True, identity={"data": "these"})
