"""luthier study: on a finished run, on a model before a run, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import luthier
from luthier.errors import LuthierError
from luthier.narrate import Silent
from luthier.recipe.text import build
from tests.little import recipe, same, sentences, weights
from tests.tinyfolder import tiny_folder


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("studied")
    sentences().to_csv(out / "data.csv", index=False)
    made = recipe(["adamw"], probe=True, steps=12, lr=1e-2)
    luthier.fit(made, model=str(tiny_model), data=str(out / "data.csv"), out=out / "run")
    return out / "run"


def test_a_run_is_looked_at_and_its_page_tells(run):
    before = weights(run)
    found = {one.kind: one for one in luthier.study(run, rows=6)}
    assert set(found) == {"ntk", "drift", "clusters", "forgetting"}
    assert same(before, weights(run))
    assert {path.name for path in (run / "study").iterdir()} == {f"{kind}.json" for kind in found}
    told = json.loads((run / "study" / "drift.json").read_text())
    assert told["lines"] == list(found["drift"].lines)
    page = (run / "report.html").read_text()
    assert "Inside the model" in page and "How the features of 6 rows of test moved" in page
    assert page.count('class="plot"') >= 4


def test_the_kernel_is_that_of_the_start_of_the_stage(run):
    """At the start of fine-tuning after a probe the head is the solved one, the body the pretrained one."""
    at_last = luthier.study(run, kinds=["ntk"], rows=6)[0].found
    at_first = luthier.study(run, kinds=["ntk"], rows=6, stage="probe")[0].found
    assert at_last["head_norm"] != pytest.approx(at_first["head_norm"])
    # F grows with the head, P does not know it
    assert at_last["parts"]["P"]["trace"] == pytest.approx(at_first["parts"]["P"]["trace"])
    assert at_last["parts"]["F"]["trace"] != pytest.approx(at_first["parts"]["F"]["trace"])


def test_drift_is_between_the_start_and_the_end(run):
    (found,) = luthier.study(run, kinds=["drift"], rows=6)
    moved = [layer["diff"] for layer in found.found["layers"]]
    assert len(moved) == 3 and all(np.isfinite(moved)) and min(moved) > 0


def test_drift_is_told_for_each_stage_a_probe_moving_only_the_head(run):
    (found,) = luthier.study(run, kinds=["drift"], rows=6)
    probe, finetune = found.found["stages"]
    assert [probe["stage"], finetune["stage"]] == ["probe", "finetune"]
    assert all(layer["diff"] == 0 for layer in probe["layers"])
    assert probe["head_norm_before"] == found.found["head_norm_before"] != probe["head_norm_after"]
    assert finetune["head_norm_before"] == probe["head_norm_after"]
    assert finetune["head_norm_after"] == found.found["head_norm_after"]
    assert finetune["layers"] == found.found["layers"]
    assert found.found["hidden"] == []
    assert {"no feature moved", "the features as in finetune"} <= set(found.lines)


TWO = [
    {"name": name, "steps": 4, "lr": 1e-2, "batch_size": 8, "ingredients": ["adamw"]} for name in ("first", "second")
]


@pytest.fixture(scope="module", params=[True, False], ids=["kept", "not kept"])
def trained_twice(request, tiny_model, tmp_path_factory) -> tuple[bool, Path]:
    """A run of two stages that train, and whether it kept what was between them."""
    out = tmp_path_factory.mktemp("twice")
    sentences().to_csv(out / "data.csv", index=False)
    made = build({"name": "two", "max_length": 16, "stages": TWO}, inside="a test")
    data = str(out / "data.csv")
    luthier.fit(made, model=str(tiny_model), data=data, out=out / "run", keep_stages=request.param)
    return request.param, out / "run"


def test_between_stages_that_train_the_model_is_known_only_where_it_was_kept(trained_twice):
    kept, folder = trained_twice
    (found,) = luthier.study(folder, kinds=["drift"], rows=6)
    stages = found.found["stages"]
    if kept:
        assert [one["stage"] for one in stages] == ["first", "second"]
        assert all(layer["diff"] > 0 for one in stages for layer in one["layers"])
        assert stages[0]["head_norm_after"] == stages[1]["head_norm_before"]
        assert found.found["hidden"] == []
    else:
        assert [one["stage"] for one in stages] == ["first + second"]
        assert stages[0]["layers"] == found.found["layers"]
        told = " ".join(found.lines)
        assert "The model before 'second' is not known: 'first' trains, and its end was not kept." in told
        assert "luthier fit --keep-stages keeps it." in told
    assert max(map(len, found.lines)) <= 80


def test_without_a_kind_named_what_cannot_be_had_is_left_out_and_told(trained_twice):
    kept, folder = trained_twice

    class Says(Silent):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def line(self, text: str = "") -> None:
            self.lines.append(text)

    say = Says()
    found = {one.kind for one in luthier.study(folder, rows=6, narrator=say)}
    assert found == {"drift", "clusters", "forgetting"} | ({"ntk"} if kept else set())
    assert any(line.startswith("ntk is left out: ") and "--keep-stages" in line for line in say.lines) != kept


def test_the_kernel_after_a_stage_that_trains_is_seen_where_it_was_kept(trained_twice):
    kept, folder = trained_twice
    if not kept:
        with pytest.raises(LuthierError, match="the start of 'second'  must be known: 'first' trains before it"):
            luthier.study(folder, kinds=["ntk"], rows=6)
        return
    norms = [
        luthier.study(folder, kinds=["ntk"], rows=6, stage=name)[0].found["head_norm"] for name in ("first", "second")
    ]
    told = luthier.study(folder, kinds=["drift"], rows=6)[0].found["stages"]
    assert norms == pytest.approx([told[0]["head_norm_before"], told[0]["head_norm_after"]], rel=1e-6)


@pytest.fixture(scope="module")
def shifted(tiny_model, tmp_path_factory) -> Path:
    """A probe and fine-tuning, measured on a shifted test in the data's folder and on one that was named besides."""
    out = tmp_path_factory.mktemp("shifted")
    (out / "data").mkdir()
    sentences(80).to_csv(out / "data" / "train.csv", index=False)
    sentences(30, seed=3).to_csv(out / "data" / "test.csv", index=False)
    sentences(40, seed=5).to_csv(out / "data" / "ood_far.csv", index=False)
    sentences(20, seed=7).to_csv(out / "named.csv", index=False)
    made = recipe(["adamw", "temperature"], probe=True, steps=12, lr=1e-2)
    ood = {"named": str(out / "named.csv")}
    luthier.fit(made, model=str(tiny_model), data=str(out / "data"), ood=ood, out=out / "run")
    alone = dataclasses.replace(made, stages=made.stages[:1])
    luthier.fit(alone, model=str(tiny_model), data=str(out / "data"), ood=ood, out=out / "probe")
    return out


def test_forgetting_is_from_the_end_of_the_probe_to_the_end_of_the_run(shifted):
    """Before: what a run of the probe alone reports; after: what the run reports, both before calibration."""
    (study,) = luthier.study(shifted / "run", kinds=["forgetting"], rows=2)
    assert study.found["since"] == "finetune"
    assert study.found["general"] == ["ood_far", "ood_named"]
    before, after = (luthier.Report.load(shifted / name).splits for name in ("probe", "run"))
    assert {one["split"] for one in study.found["splits"]} == {"validation", "test", "ood_far", "ood_named"}
    for one in study.found["splits"]:
        for when, scores in (("before", before[one["split"]]), ("after", after[one["split"]])):
            assert one["rows"] == scores["n"]
            assert one[f"accuracy_{when}"] == scores["accuracy"]
            assert one[f"nll_{when}"] == pytest.approx(scores["nll"], rel=1e-6)
    assert any(one["forgotten"] or one["learned"] for one in study.found["splits"])


def test_a_shifted_test_that_was_named_is_the_general_one_when_asked_for_and_missed_when_it_has_gone(shifted):
    (study,) = luthier.study(shifted / "run", kinds=["forgetting"], general="named")
    assert study.found["general"] == ["ood_named"] and study.found["notes"] == []
    first = study.found["splits"][0]
    assert (first["split"], first["rows"]) == ("ood_named", 20)
    assert first["accuracy_after"] == luthier.Report.load(shifted / "run").splits["ood_named"]["accuracy"]
    moved = (shifted / "named.csv").rename(shifted / "elsewhere.csv")
    try:
        (study,) = luthier.study(shifted / "run", kinds=["forgetting"])
        assert "The run was measured on named too: name it again with --ood NAME=PATH." in " ".join(study.lines)
        (again,) = luthier.study(shifted / "run", kinds=["forgetting"], ood={"named": str(moved)}, general="named")
        assert again.found["splits"][0] == first and again.found["notes"] == []
    finally:
        moved.rename(shifted / "named.csv")
    with pytest.raises(LuthierError, match="must be a split that is held out; got nmed"):
        luthier.study(shifted / "run", kinds=["forgetting"], general="nmed")


def test_forgetting_since_an_earlier_stage_says_that_its_head_is_random(shifted):
    (study,) = luthier.study(shifted / "run", kinds=["forgetting"], stage="probe")
    assert study.found["since"] == "probe"
    assert any("The head is a random one there" in line for line in study.lines)


def test_forgetting_goes_back_to_the_last_start_that_is_known_and_says_so(trained_twice):
    kept, folder = trained_twice
    (study,) = luthier.study(folder, kinds=["forgetting"])
    assert study.found["since"] == ("second" if kept else "first")
    assert any("The model before 'second' is not known" in note for note in study.found["notes"]) is not kept
    if not kept:
        with pytest.raises(LuthierError, match="the start of 'second'  must be known"):
            luthier.study(folder, kinds=["forgetting"], stage="second")


def test_a_run_of_numbers_forgets_nothing_that_could_be_counted(tiny_model, tmp_path):
    rows = sentences()
    rows["label"] = [len(text.split()) + 0.5 for text in rows["text"]]
    rows.to_csv(tmp_path / "data.csv", index=False)
    luthier.fit(
        recipe(["adamw"], steps=2), model=str(tiny_model), data=str(tmp_path / "data.csv"), out=tmp_path / "run"
    )
    assert [one.kind for one in luthier.study(tmp_path / "run", kinds=["drift", "forgetting"], rows=6)] == ["drift"]


def test_a_model_before_a_run_has_a_kernel_and_clusters_and_no_drift(tiny_model, tmp_path):
    sentences().to_csv(tmp_path / "data.csv", index=False)
    found = luthier.study(str(tiny_model), recipe="lora", data=str(tmp_path / "data.csv"), rows=6)
    assert [one.kind for one in found] == ["ntk", "clusters"]
    assert "weights" in found[0].found
    assert not (tmp_path / "study").exists()


def test_too_few_rows_for_a_kernel_regression_leave_the_kernel(tiny_model, tmp_path):
    sentences().to_csv(tmp_path / "data.csv", index=False)
    (found,) = luthier.study(str(tiny_model), kinds=["ntk"], recipe="ft", data=str(tmp_path / "data.csv"), rows=4)
    assert found.found["rows"] == 4 and found.found["kernel_regression"] == []
    assert found.lines[-1] == "No kernel regression: it takes at least five training rows."


def test_lora_has_a_kernel_of_its_own_weights(tiny_model, tmp_path):
    sentences().to_csv(tmp_path / "data.csv", index=False)
    sizes = [
        luthier.study(str(tiny_model), kinds=["ntk"], recipe=name, data=str(tmp_path / "data.csv"), rows=6)[0].found
        for name in ("ft", "lora")
    ]
    assert sizes[1]["weights"] < sizes[0]["weights"] / 5
    assert sizes[1]["parts"]["F"]["trace"] < sizes[0]["parts"]["F"]["trace"]


def test_what_is_not_there_is_told(run, tiny_model, tmp_path):
    with pytest.raises(LuthierError, match="must be a stage of the recipe; got finetun"):
        luthier.study(run, kinds=["ntk"], stage="finetun")
    trained = recipe(["adamw"], steps=2)
    luthier.fit(trained, model=tiny_model, data=sentences(), out=tmp_path / "memory")
    with pytest.raises(LuthierError, match="must name where its model and data came from"):
        luthier.study(tmp_path / "memory")


def test_data_or_weights_that_have_changed_since_the_run_are_refused(tiny_model, tmp_path):
    data, model = tmp_path / "data.csv", shutil.copytree(tiny_model, tmp_path / "model")
    sentences().to_csv(data, index=False)
    luthier.fit(recipe(["adamw"], steps=1), model=str(model), data=str(data), out=tmp_path / "run")
    sentences(70).to_csv(data, index=False)
    tiny_folder(model, seed=4)
    with pytest.raises(LuthierError) as told:
        luthier.study(tmp_path / "run", kinds=["clusters"])
    assert "data.csv  must hold what it held" in str(told.value) and "must hold the weights that" in str(told.value)
    assert not (tmp_path / "run" / "study").exists()
    tiny_folder(model)
    assert luthier.study(tmp_path / "run", kinds=["clusters"], data=str(data))  # other data, on purpose


def test_no_picture_shows_unread_mathematics(run):
    for one in luthier.study(run, rows=6):
        assert "mathdefault" not in one.svg and "$" not in one.svg


def test_a_run_is_looked_at_from_another_folder_as_it_is_repeated_there(tiny_model, tmp_path, monkeypatch):
    """Its data are two files by split, its shifted test lies in the home folder, and all but that is named by relative paths."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("here", "home", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(tiny_model, "model")
    for seed, name in enumerate(("d.csv", "t.csv", str(tmp_path / "home" / "far.csv"))):
        sentences(30, seed=seed).to_csv(name, index=False)
    data = {"train": "d.csv", "test": "t.csv"}
    luthier.fit(recipe(["adamw"], steps=2), model="model", data=data, ood={"far": "~/far.csv"}, out="run")
    here = luthier.study("run", kinds=["forgetting", "clusters"], rows=6)
    assert here[0].found["general"] == ["ood_far"] and here[0].found["notes"][1:] == []
    monkeypatch.chdir(tmp_path / "there")
    there = luthier.study(tmp_path / "here" / "run", kinds=["forgetting", "clusters"], rows=6)
    assert [one.found for one in there] == [one.found for one in here]


def test_a_shifted_test_that_was_never_a_path_is_asked_for_and_not_dropped(tiny_model, tmp_path, monkeypatch):
    for seed, name in enumerate(("data", "far")):
        sentences(30 + 30 * (not seed), seed=seed).to_csv(tmp_path / f"{name}.csv", index=False)
    data, ood = str(tmp_path / "data.csv"), {"far": str(tmp_path / "far.csv")}
    luthier.fit(recipe(["adamw"], steps=1), model=str(tiny_model), data=data, ood=ood, out=tmp_path / "run")
    call = json.loads((tmp_path / "run" / "call.json").read_text())
    call["paths"].pop(call["ood"]["far"])
    call["ood"]["far"] = "org/far"
    (tmp_path / "run" / "call.json").write_text(json.dumps(call))
    asked = []

    def asks(*args, **named):
        asked.append(named["ood"])
        raise LuthierError("enough")

    monkeypatch.setattr("luthier.finished.studying.prepare", asks)
    with pytest.raises(LuthierError, match="enough"):
        luthier.study(tmp_path / "run")
    assert asked == [{"far": "org/far"}]
