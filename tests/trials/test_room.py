"""The weights that a comparison's runs keep, or do not."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pandas as pd
import pytest

import luthier
from luthier.errors import LuthierError
from luthier.narrate import Silent
from luthier.trials import room as rooms
from luthier.trials.comparing import compare, designed
from luthier.trials.design import Design
from tests.little import recipe, sentences

ONE, TWO = (recipe([*more, "adamw"], steps=2) for more in ([{"lora": {"r": 2}}], []))


class Says(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str = "") -> None:
        self.lines.append(text)


@pytest.fixture
def disk(monkeypatch):
    """How many bytes the disk has left."""

    def left(free: int) -> None:
        monkeypatch.setattr(rooms.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))

    return left


def asked(tiny_model, tmp_path, **more):
    told = {"model": str(tiny_model), "data": str(tmp_path / "data.csv"), "out": tmp_path / "out", "seeds": 2}
    sentences(80).to_csv(tmp_path / "data.csv", index=False)
    return {"recipes": {"one": ONE, "two": TWO}, **told, **more}


def weigh(folder) -> int:
    """Bytes of the weights of a tiny model."""
    from transformers import AutoModel

    return sum(4 * one.numel() for one in AutoModel.from_pretrained(folder).parameters())


def test_runs_without_weights_say_the_same_and_are_refused_what_needs_weights(tiny_model, tmp_path):
    whole = compare(**asked(tiny_model, tmp_path))
    bare = compare(**asked(tiny_model, tmp_path, out=tmp_path / "bare", weights=False))
    assert bare.versus == whole.versus and bare.outcome == whole.outcome
    for folder, there in ((tmp_path / "out", True), (tmp_path / "bare", False)):
        for name in ("one-seed0", "one-seed1", "two-seed0", "two-seed1"):
            run = folder / "runs" / name
            assert (run / "model").is_dir() is there
            assert (run / "adapter").is_dir() is (there and name.startswith("one"))
            assert (run / "outputs.npz").is_file() and (run / "report.html").is_file()
    run = tmp_path / "bare" / "runs" / "two-seed0"
    other = tmp_path / "bare" / "runs" / "two-seed1"
    again = rf"must hold the run's weights; got nothing there\.  Make it again: luthier fit --recipe {run}/recipe\.yaml --model "
    for call in (
        lambda: luthier.predict(run, pd.DataFrame({"text": ["good film"]})),
        lambda: luthier.study(run, kinds=["clusters"]),
        lambda: luthier.rerun(run),
        lambda: luthier.soup([run, other], out=tmp_path / "soup"),
        lambda: luthier.diff(run, other),
    ):
        with pytest.raises(LuthierError, match=again):
            call()
    assert not (tmp_path / "soup").exists() and not run.with_name("two-seed0-rerun").exists()


def test_a_comparison_remembers_whether_weights_are_kept_until_it_is_told_otherwise(tiny_model, tmp_path):
    given = asked(tiny_model, tmp_path)
    assert Design.load(designed(**given) and tmp_path / "out").weights
    designed(**given, weights=False)
    assert not designed(**given).weights
    assert designed(**given, weights=True).weights


def test_runs_that_do_not_fit_on_the_disk_are_refused_and_nothing_is_left_behind(tiny_model, tmp_path, disk):
    given, needed = asked(tiny_model, tmp_path), 4 * (weigh(tiny_model) + 4 * (16 * 2 + 2))
    disk(needed - 1)
    with pytest.raises(LuthierError, match=r"must have room for the runs; got .* the weights of 4 runs\.  Make room"):
        designed(**given)
    assert not (tmp_path / "out").exists()
    designed(**given, weights=False)
    shutil.rmtree(tmp_path / "out")
    disk(needed)
    designed(**given)


def test_much_is_told_before_the_first_run(tiny_model, tmp_path, disk, monkeypatch):
    disk(10**10)
    for much, lines in ((10**9, 0), (1000, 1)):
        monkeypatch.setattr(rooms, "MUCH", much)
        say = Says()
        designed(**asked(tiny_model, tmp_path, narrator=say))
        told = [line for line in say.lines if "--no-weights keeps none" in line]
        assert len(told) == lines
    assert told[0].startswith("4 runs will keep ") and "(10.0 GB are free)" in told[0]
