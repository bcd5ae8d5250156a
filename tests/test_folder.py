"""Where a run cannot be written it says so before anything is loaded."""

from __future__ import annotations

import fcntl
import json
import shlex
from pathlib import Path

import pytest

from luthier.errors import LuthierError, RunError
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


def lets_go(run):
    """Whether no one holds the run's lock, in this process or another."""
    with (run / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (run / ".lock").unlink()
    return True


def test_a_full_disk_at_the_log_is_told_and_lets_go_of_the_folder(run):
    (run / "log.jsonl").symlink_to("/dev/full")
    folder = RunFolder(run, resume=True, identity={"data": "these"})
    lock = folder._lock
    with pytest.raises(RunError, match="cannot write .*log.jsonl: No space left on device.  When") as caught:
        folder.log({"step": 1})
    assert f"make room), luthier fit --out {shlex.quote(str(run))} --resume goes on" in str(caught.value)
    assert caught.value.exit_code == 1
    log = folder._log
    folder.close()  # what is still to be written to the log cannot be, and was told
    assert lock is not None and lock.closed and log is not None and log.closed
    assert lets_go(run)


def test_a_log_that_cannot_be_opened_is_told(run):
    (run / "log.jsonl").mkdir()
    folder = RunFolder(run, resume=True, identity={"data": "these"})
    with pytest.raises(RunError, match="cannot write .*log.jsonl: Is a directory"):
        folder.log({"step": 1})
    folder.close()


def test_a_full_disk_when_a_run_begins_lets_go_of_the_folder(tmp_path, monkeypatch):
    def full(path, text):
        raise RunError(f"cannot write {path}: No space left on device.")

    monkeypatch.setattr("luthier.folder.write_whole", full)
    with pytest.raises(RunError, match="No space left") as caught:
        RunFolder(tmp_path / "run", resume=False, identity={})
    assert caught.value.exit_code == 1  # while the error, and with it the folder's object, is still alive
    assert lets_go(tmp_path / "run")


def test_a_folder_in_which_a_run_was_killed_as_it_began_can_be_begun_again(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".environment.json.4711.tmp").write_text('{"iden')
    refuse(tmp_path, resume=False)
    (tmp_path / ".bashrc").touch()
    with pytest.raises(LuthierError, match="is not empty and holds no run"):
        refuse(tmp_path, resume=False)
