"""A comparison whose data, runs or questions changed since it began."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import luthier
from luthier.errors import LuthierError
from luthier.trials import comparing
from luthier.trials.comparing import compare, designed, gather
from luthier.trials.design import Design
from luthier.trials.pairs import couples
from luthier.trials.ray_jobs import shares
from tests.little import recipe, sentences

ONE = replace(recipe(["adamw"], steps=3), name="one")
TWO = replace(recipe(["adamw"], steps=4), name="two")


@pytest.fixture(scope="module")
def begun(tmp_path_factory, tiny_model):
    """A comparison of one recipe over two seeds, and its data: one file, of which test is drawn."""
    place = tmp_path_factory.mktemp("begun")
    sentences(80).to_csv(place / "rows.csv", index=False)
    compare([ONE], model=tiny_model, data=str(place / "rows.csv"), out=place / "out", seeds=2)
    return place


@pytest.fixture
def there(begun, tmp_path):
    """The same at another place, to be changed; its design still names the first one's data."""
    shutil.copytree(begun / "out", tmp_path / "out")
    return tmp_path / "out"


def test_runs_made_of_other_rows_are_refused_before_another_is_made(begun, there, tiny_model):
    rows, kept = begun / "rows.csv", (begun / "rows.csv").read_text()
    try:
        with rows.open("a") as file:
            file.write("a row that is new,good\n")
        with pytest.raises(LuthierError, match=r"runs/one-seed0  must be of the data .* got other rows in") as told:
            compare([ONE, TWO], model=tiny_model, data=str(rows), out=there)
        assert [fault.where for fault in told.value.faults] == ["runs/one-seed0", "runs/one-seed1"]
    finally:
        rows.write_text(kept)
    assert not list((there / "runs").glob("two*"))


def test_runs_measured_on_other_rows_are_not_paired(there):
    file = there / "runs" / "one-seed1" / "report.json"
    told = json.loads(file.read_text())
    told["data"]["digests"]["test"] = "other"
    file.write_text(json.dumps(told))
    with pytest.raises(
        LuthierError, match=r"runs/one-seed1  must be measured on the rows of runs/one-seed0; got other rows in test"
    ):
        gather(there)


def test_where_the_one_that_all_are_compared_with_has_no_run_nothing_is_compared(there):
    assert couples(["a", "b", "c"], "gone") == []
    design = replace(Design.load(there), against="gone")
    found = gather(there, design)
    assert found.versus == ()
    assert any("all are compared with gone, of which no run on rows has ended" in note for note in found.notes)


def test_what_is_not_said_again_is_as_it_was(begun, there, tiny_model):
    given = {"model": tiny_model, "data": str(begun / "rows.csv"), "out": there}
    designed([ONE], **given, metric="mcc", against="one")
    again = designed([TWO], **given)
    assert (again.metric, again.against, list(again.recipes)) == ("mcc", "one", ["one", "two"])
    with pytest.raises(LuthierError, match="--against  must be of two; got three"):
        designed([TWO], **given, against="three")


def test_words_about_a_recipe_are_no_other_recipe(begun, there, tiny_model):
    given = {"model": tiny_model, "data": str(begun / "rows.csv"), "out": there}
    told = designed([replace(ONE, description="three steps")], **given)
    assert told.recipes["one"]["description"] == "three steps"


def test_stopped_while_all_is_checked_it_leaves_nothing_behind(tiny_model, tmp_path, monkeypatch):
    def asked(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparing, "check", asked)
    with pytest.raises(KeyboardInterrupt):
        designed([ONE], model=tiny_model, data=sentences(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_recipes_that_lead_with_different_metrics_need_one(begun, tiny_model, tmp_path):
    both = [replace(ONE, metric="nll"), replace(TWO, metric="mcc")]
    given = {"model": tiny_model, "data": str(begun / "rows.csv"), "out": tmp_path / "out"}
    with pytest.raises(
        LuthierError, match=r"must be compared by one metric; got mcc, nll of their own\.  Say --metric"
    ):
        designed(both, **given)
    assert designed(both, **given, metric="nll").metric == "nll"


def test_who_always_says_the_only_class_is_no_baseline(begun, there):
    report = luthier.Report.load(Path(there) / "runs" / "one-seed0")
    one_class = replace(report, confusion={"test": [[8, 0], [0, 0]]})
    assert report.baseline("test") is not None
    assert one_class.baseline("test") is None and not one_class.no_better("test")


@pytest.mark.parametrize("workers", [3, 6, 7, 11])
def test_shares_of_a_gpu_are_no_more_than_the_gpu(workers):
    node = {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}}
    assert shares([node], workers)[1] * workers <= 1.0
