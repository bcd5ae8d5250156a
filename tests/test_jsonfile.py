"""Files that are written whole or not at all, whatever a killed process left beside them."""

from __future__ import annotations

import os

import pytest

from luthier.errors import RunError
from luthier.jsonfile import atomically, write_whole


@pytest.mark.parametrize("left", ["a folder", "a file"])
@pytest.mark.parametrize("made", ["a folder", "a file"])
def test_what_a_killed_process_with_this_number_left_is_written_anew(left, made, tmp_path):
    beside = tmp_path / f".model.{os.getpid()}.tmp"
    if left == "a folder":
        beside.mkdir()
        (beside / "half").write_text("old")
    else:
        beside.write_text("old, and longer")

    def folder(path):
        path.mkdir()
        (path / "whole").write_text("new")

    atomically(tmp_path / "model", folder if made == "a folder" else lambda path: path.open("a").write("new"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    if made == "a folder":
        assert [path.name for path in (tmp_path / "model").iterdir()] == ["whole"]
    else:
        assert (tmp_path / "model").read_text() == "new"


def test_a_name_that_is_too_long_is_told_as_what_it_is(tmp_path):
    with pytest.raises(RunError, match="cannot write .*: File name too long"):
        write_whole(tmp_path / ("a" * 300), "text")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_tidied_up_does_not_hide_what_went_wrong(tmp_path, monkeypatch):
    """Nor does it hide that it went well."""
    import shutil

    def full(path):
        path.mkdir()
        raise OSError(28, "No space left on device")

    def stuck(path):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(shutil, "rmtree", stuck)
    with pytest.raises(RunError, match="No space left on device"):
        atomically(tmp_path / "model", full)
    write_whole(tmp_path / "text", "whole")
    assert (tmp_path / "text").read_text() == "whole"
