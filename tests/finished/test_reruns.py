"""luthier rerun: the same bits from the folder alone, what is told when they are not, and what is refused before training."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import luthier
from luthier import cli
from luthier.call import Call
from luthier.errors import LuthierError
from luthier.narrate import Silent
from luthier.sources import demo
from luthier.sources.data import read
from tests.little import KillsItself, in_a_child, recipe, same, sentences, weights

PARTS = ["adamw", "clip", "temperature"]


@pytest.fixture(scope="module")
def first(tiny_model, tmp_path_factory) -> Path:
    """A run called with relative paths, a column by name, a shifted test with a label map, and a change to the recipe."""
    place = tmp_path_factory.mktemp("first") / "here"
    shutil.copytree(tiny_model, place / "model")
    with contextlib.chdir(place):
        _made()
    shutil.copytree(place, place.parent / "kept")
    return place


@pytest.fixture
def made(first, monkeypatch) -> Path:
    """The same, where it was made and as it was made; the working directory."""
    for place in (first, first.parent / "there"):
        shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(first.parent / "kept", first)
    monkeypatch.chdir(first)
    return first


def _made() -> None:
    sentences().rename(columns={"label": "says"}).to_csv("reviews.csv", index=False)
    sentences(12, seed=9).replace({"label": {"good": "+"}}).rename(columns={"label": "says"}).to_csv("far.csv")
    luthier.fit(
        recipe(PARTS),
        model="model",
        data=Path("reviews.csv"),
        text="text",
        label="says",
        ood={"far": "far.csv"},
        label_map={"far": {"+": "good"}},
        sets=["stages.0.lr=2e-3"],
        seed=3,
        out="run",
    )


def edited(path: Path, **values) -> None:
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | values))


def tampered(run: Path, name: str, by: float) -> None:
    """Adds ``by`` to the first number of one saved tensor."""
    file = run / "model" / "model.safetensors"
    state = load_file(file)
    state[name].view(-1)[0] += by
    save_file(state, file, metadata={"format": "pt"})


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_says_what_the_run_was_called_with(made):
    call = Call.load(made / "run")
    assert (call.model, call.data, call.text, call.label, call.text_pair) == (
        "model",
        "reviews.csv",
        "text",
        "says",
        None,
    )
    assert (call.ood, call.label_map, call.memory) == ({"far": "far.csv"}, {"far": {"+": "good"}}, ())
    assert call.paths == {name: str(made / name) for name in ("model", "reviews.csv", "far.csv")}


def test_a_rerun_from_another_folder_is_bit_equal_and_leaves_the_run_as_it_was(made, monkeypatch):
    before = everything(made / "run")
    monkeypatch.chdir(made.parent)
    found = luthier.rerun(Path("here") / "run")
    assert found.same and found.causes == ()
    assert Path(found.out) == Path("here") / "run-rerun"
    assert same(weights(made / "run"), weights(made / "run-rerun"))
    assert found.differences.parted is None and found.differences.scored_alike
    told = found.lines()
    assert told[0] == f"the weights are bit-equal: all {len(weights(made / 'run'))} tensors"
    assert {"recipe: the same", "data, start weights: the same", "environment: the same"} <= set(told)
    assert everything(made / "run") == before
    assert Path(luthier.rerun(made / "run").out).name == "run-rerun-2"


def test_a_rerun_of_a_rerun_is_the_same_run(made):
    luthier.rerun("run", out="second")
    found = luthier.rerun("second", out="third")
    assert found.same
    assert same(weights(made / "run"), weights(made / "third"))


def test_other_threads_and_versions_are_told_though_the_weights_are_equal(made):
    known = json.loads((made / "run" / "environment.json").read_text())
    edited(made / "run" / "environment.json", threads=7, versions=known["versions"] | {"torch": "1.0.0"})
    said: list[str] = []

    class Hears(Silent):
        def line(self, text: str = "") -> None:
            said.append(text)

    found = luthier.rerun("run", narrator=Hears())
    assert found.same
    assert "other than when the run was made: threads: 7 -> 1" in said
    assert {"  threads: 7 -> 1", f"  versions.torch: 1.0.0 -> {torch.__version__}"} <= set(found.lines())


def test_weights_that_were_changed_afterwards_are_found_and_the_cause_is_named(made):
    name = "bert.encoder.layer.1.output.dense.weight"
    tampered(made / "run", name, 0.5)
    report = json.loads((made / "run" / "report.json").read_text())
    edited(made / "run" / "report.json", environment=report["environment"] | {"threads": 9})
    found = luthier.rerun("run")
    assert not found.same
    compared = found.differences.weights
    assert (compared.tensors - compared.equal, compared.first) == (1, name)
    assert compared.largest == pytest.approx(0.5, abs=1e-6)
    assert [(one.part, one.distance > 0) for one in compared.parts if one.distance] == [("block 1", True)]
    assert found.causes == (
        f"{Path('run/model')} was changed after the run had ended: losses and scores are the same to the last digit",
        "the run itself was gone on with elsewhere: another thread count (threads: 1 -> 9)",
    )


def test_a_run_that_was_trained_otherwise_is_told_with_its_likeliest_cause(made):
    """The report of a run with another rate, as if another machine had given it."""
    luthier.fit(
        recipe(PARTS, lr=5e-3), model="model", data="reviews.csv", label="says", ood={"far": "far.csv"},
        label_map={"far": {"+": "good"}}, seed=3, out="other",
    )  # fmt: skip
    shutil.rmtree("run/model")
    shutil.copytree("other/model", "run/model")
    ours, theirs = (json.loads(Path(f"{name}/report.json").read_text()) for name in ("run", "other"))
    edited(made / "run" / "report.json", metrics=theirs["metrics"], curves=theirs["curves"])
    edited(made / "run" / "environment.json", processor="another", threads=7)
    edited(made / "run" / "report.json", environment=ours["environment"] | {"processor": "another", "threads": 7})
    found = luthier.rerun("run")
    assert not found.same
    assert found.differences.parted == 2  # the first loss is that of the start weights
    assert [cause.partition(" (")[0] for cause in found.causes] == ["another thread count", "another processor"]
    assert found.lines()[:2] == ["the weights differ", "  likely cause: another thread count (threads: 7 -> 1)"]
    assert max(map(len, found.lines())) <= 80


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("data changed", r"reviews.csv  must hold what it held when run was made; got other texts or labels"),
        ("data grew", r"got train 49, validation 6, test 6, ood_far 12 rows, and not train 48"),
        (
            "data gone",
            r"run: data  must be where it was when the run was made; got nothing at reviews.csv.  Give --data",
        ),
        ("ood gone", r"run: ood.far  must be where it was .*  Give --ood far=PATH"),
        ("ood changed", r"must hold what it held when run was made"),
        ("model gone", r"run: model  must be where it was .*  Give --model"),
        ("model changed", r"model  must hold the weights that run began with"),
        ("recipe changed", r"recipe.yaml  must be the recipe of the run"),
        ("call gone", r"call.json  must be there"),
        ("not ended", r"report.json  must be there"),
    ],
)
def test_what_is_not_what_it_was_is_refused_before_training(harm, said, made):
    what, how = harm.split()
    file = {
        "data": "reviews.csv",
        "ood": "far.csv",
        "model": "model",
        "call": "run/call.json",
        "not": "run/report.json",
    }
    path = Path(file.get(what, "run/recipe.yaml"))
    if how in ("gone", "ended"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif what == "model":
        state = load_file("model/model.safetensors")
        next(iter(state.values())).view(-1)[0] += 1
        save_file(state, "model/model.safetensors", metadata={"format": "pt"})
    elif how == "grew":
        path.write_text(path.read_text() + "a great film,good\n")
    else:
        path.write_text(path.read_text().replace("steps: 6", "steps: 5").replace("good", "fine", 1))
    with pytest.raises(LuthierError, match=said) as caught:
        luthier.rerun("run")
    assert caught.value.exit_code == 2
    assert not Path("run-rerun").exists()


def test_data_that_moved_may_be_given_in_another_format(made):
    pd.read_csv("reviews.csv").to_json("moved.jsonl", orient="records", lines=True)
    Path("reviews.csv").unlink()
    assert luthier.rerun("run", data="moved.jsonl").same


def test_a_whole_folder_that_moved_is_found_from_inside(made, monkeypatch):
    made.rename(made.parent / "there")
    monkeypatch.chdir(made.parent / "there")
    assert luthier.rerun("run").same


def test_what_was_in_memory_must_be_given_and_then_gives_the_same_bits(tiny_model, tmp_path):
    frames = {"train": sentences(40), "test": sentences(10, seed=1)}
    far = sentences(6, seed=2)
    luthier.fit(recipe(PARTS), model=tiny_model, data=frames, ood={"far": far}, out=tmp_path / "run")
    assert Call.load(tmp_path / "run").memory == ("data", "ood.far")
    with pytest.raises(LuthierError, match=r"(?s)2 faults.*data  must be given: it was in memory.*Give --ood far=PATH"):
        luthier.rerun(tmp_path / "run")
    assert luthier.rerun(tmp_path / "run", data=frames, ood={"far": far}).same


def test_data_given_split_by_split_is_found_split_by_split(tiny_model, tmp_path):
    for name, rows in {"a": sentences(40), "b": sentences(10, seed=1)}.items():
        rows.to_csv(tmp_path / f"{name}.csv", index=False)
    places = {"train": str(tmp_path / "a.csv"), "test": tmp_path / "b.csv"}
    luthier.fit(recipe(PARTS), model=tiny_model, data=places, out=tmp_path / "run")
    assert Call.load(tmp_path / "run").splits == {name: str(place) for name, place in places.items()}
    assert luthier.rerun(tmp_path / "run").same
    (tmp_path / "b.csv").unlink()
    with pytest.raises(LuthierError, match=r"data.test  must be where it was"):
        luthier.rerun(tmp_path / "run")


def test_data_that_the_recipe_names_is_in_the_call(tiny_model, tmp_path, monkeypatch):
    sentences().to_csv(tmp_path / "reviews.csv", index=False)
    from luthier.recipe.text import build

    made = build({**recipe(PARTS).to_dict(), "data": {"in": str(tmp_path / "reviews.csv")}}, inside="a test")
    luthier.fit(made, model=tiny_model, out=tmp_path / "run")
    assert Call.load(tmp_path / "run").data == str(tmp_path / "reviews.csv")
    assert luthier.rerun(tmp_path / "run").same


def test_a_run_that_was_killed_and_gone_on_with_keeps_its_call_and_is_repeated_to_the_bit(made):
    def go(**more):
        return luthier.fit(
            recipe(PARTS, steps=8), model="model", data="reviews.csv", label="says", out="killed", save_every=1, **more
        )

    assert in_a_child(lambda: go(narrator=KillsItself(14))) == signal.SIGKILL
    assert not Path("killed/report.json").exists()
    assert Call.load("killed").data == "reviews.csv"
    go(resume=True)
    assert Call.load("killed").label == "says"
    before = Path("killed/call.json").read_bytes()
    go(resume=True)
    assert Path("killed/call.json").read_bytes() == before
    assert luthier.rerun("killed").same


def test_a_call_is_read_back_as_it_was_saved_and_a_broken_one_is_named(tmp_path):
    (tmp_path / "a.csv").touch()
    call = Call.of(model="org/name", data=tmp_path / "a.csv", out_domain=sentences(4), label_map={"x": {"y": "z"}})
    call.save(tmp_path)
    assert Call.load(tmp_path) == call
    assert call.memory == ("out_domain",)
    assert call.arguments()["model"] == "org/name" and call.paths.keys() == {str(tmp_path / "a.csv")}
    edited(tmp_path / "call.json", model=3, colour="red")
    with pytest.raises(LuthierError, match=r"(?s)2 faults.*model.*colour"):
        Call.load(tmp_path)
    (tmp_path / "call.json").write_text("{}")
    with pytest.raises(LuthierError, match="must have schema 1"):
        Call.load(tmp_path)


def test_the_demo_goes_by_its_name_and_a_folder_of_that_name_does_not_count(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "rows", lambda limit_per_class: sentences(2 * limit_per_class))
    monkeypatch.setattr(demo, "PER_CLASS", 20)
    Path("demo").mkdir()
    call = Call.of(model="demo", data="demo")
    assert call.paths == {} and call.memory == ()
    assert (call.arguments()["model"], call.arguments()["data"]) == ("demo", "demo")
    found = read(call.arguments()["data"])
    assert (found.source, sum(map(len, found.splits.values()))) == ("demo", 40)
    assert any("./demo" in note for note in found.notes)
    folder = Call.of(model="demo", data=Path("demo")).arguments()["data"]
    assert folder != "demo" and Path(folder).resolve() == tmp_path / "demo"


def test_a_run_of_the_demo_is_repeated_with_nothing_given(tiny_model, tmp_path, monkeypatch):
    """The command line's ``--demo``, with the tiny model and sentences in place of the two wheels."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "rows", lambda limit_per_class: sentences(40))
    monkeypatch.setattr("luthier.sources.models.model_folder", lambda: tiny_model)
    words = ["--recipe", "lp-ft", "--set", "stages.1.steps=4", "--set", "max_length=16", "--out", "run"]
    assert called(monkeypatch, "fit", "--demo", *words) == 0
    assert (Call.load("run").model, Call.load("run").data) == ("demo", "demo")
    assert called(monkeypatch, "rerun", "run") == 0


def called(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["luthier", *map(str, words)])
    try:
        cli.main()
    except SystemExit as leave:
        return int(leave.code or 0)
    return 0


def test_the_command_leaves_with_0_when_bit_equal_1_when_not_and_2_when_refused(made, monkeypatch, capsys):
    assert called(monkeypatch, "rerun", "run", "--out", "again") == 0
    assert "the weights are bit-equal" in capsys.readouterr().out
    tampered(made / "run", "classifier.bias", 1e-3)
    assert called(monkeypatch, "rerun", "run", "--out", "third") == 1
    out = capsys.readouterr().out
    assert "the weights differ" in out and "first that differs: classifier.bias" in out
    before = everything(made / "third")
    assert called(monkeypatch, "rerun", "run", "--out", "third") == 2
    assert "third is not empty" in capsys.readouterr().err
    assert everything(made / "third") == before
    Path("reviews.csv").unlink()
    assert called(monkeypatch, "rerun", "run") == 2
    assert "Give --data" in capsys.readouterr().err
    assert called(monkeypatch, "rerun", "nowhere") == 2


def test_several_processes_are_refused(made, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LuthierError, match="repeated in one process"):
        luthier.rerun("run")
