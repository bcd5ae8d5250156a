"""compare from end to end on a tiny model: what is run, what is not run again, what is refused, what is told."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import luthier
from luthier.comparison import Comparison
from luthier.errors import LuthierError
from luthier.narrate import Silent
from luthier.outputs import keep, kept
from luthier.statistics.exact import mcnemar
from luthier.trials import comparing
from luthier.trials import gather as gathering
from luthier.trials import work as workshop
from luthier.trials.comparing import compare, designed
from luthier.trials.design import Design
from luthier.trials.desk import Desk
from luthier.trials.gather import gather
from luthier.trials.watch import Watch
from tests.little import recipe, same, sentences, weights
from tests.tinyfolder import tiny_folder

BASE = [{"anneal": {"warmup": 0.2}}, "adamw", "clip"]
FT = dataclasses.replace(recipe(BASE, steps=6), name="ft")
LP_FT = dataclasses.replace(recipe([*BASE, "temperature"], steps=6, probe=True), name="lp-ft")
LP = dataclasses.replace(recipe(BASE, steps=1, probe=True), name="lp")


class Says(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str = "") -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows") / "data"
    folder.mkdir()
    rows = sentences(160)
    rows[:100].to_csv(folder / "train.csv", index=False)
    rows[100:120].to_csv(folder / "validation.csv", index=False)
    rows[120:].to_csv(folder / "test.csv", index=False)
    sentences(30, seed=7).to_csv(folder / "ood_other.csv", index=False)
    return str(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model, data):
    out = tmp_path_factory.mktemp("compared") / "out"
    say = Says()
    return out, compare([FT, LP_FT, LP], model=tiny_model, data=data, out=out, seeds=3, narrator=say), say


def test_each_run_is_what_fit_makes_of_the_same_recipe_and_seed(made, tiny_model, data, tmp_path):
    out, _, _ = made
    for part in (FT, LP_FT):
        luthier.fit(part, model=tiny_model, data=data, seed=2, out=tmp_path / part.name)
        assert same(weights(tmp_path / part.name), weights(out / "runs" / f"{part.name}-seed2"))
        ours = luthier.Report.load(out / "runs" / f"{part.name}-seed2")
        assert ours.metrics == luthier.Report.load(tmp_path / part.name).metrics
        assert ours.recipe_digest == dataclasses.replace(part, seed=2).digest


def test_what_is_told_is_what_the_runs_say(made):
    out, found, _ = made
    accuracy = {
        (name, seed): luthier.Report.load(out / "runs" / f"{name}-seed{seed}").metrics["test"]["accuracy"]
        for name in found.recipes
        for seed in range(3)
    }
    level = next(one for one in found.levels if (one.recipe, one.split) == ("lp-ft", "test"))
    scores = [accuracy["lp-ft", seed] for seed in range(3)]
    assert level.mean == pytest.approx(np.mean(scores)) and level.sd == pytest.approx(np.std(scores, ddof=1))
    assert (level.worst, level.best, level.seeds) == (min(scores), max(scores), 3)
    pair = next(one for one in found.versus if (one.one, one.other, one.split) == ("lp-ft", "ft", "test"))
    assert pair.by_seed == pytest.approx([accuracy["lp-ft", seed] - accuracy["ft", seed] for seed in range(3)])
    assert pair.value == pytest.approx(np.mean(pair.by_seed)) and pair.low <= pair.value <= pair.high
    on = {(one.one, one.other, one.split) for one in found.versus}
    assert on == {
        (one, other, split)
        for one, other in (("lp-ft", "ft"), ("lp", "ft"), ("lp", "lp-ft"))
        for split in ("test", "ood_other")
    }
    assert all(one.comparisons == 3 for one in found.versus)  # test by itself; here there is one shifted test
    assert len(found.outcome) == 6
    assert [one["n"] for one in found.best_of["data"]["ft"]] == [1, 2, 3]
    assert sum(bin["count"] for bin in found.reliability["data"]["lp-ft"]["after"]) == 3 * 40
    assert found.reliability["data"]["ft"]["after"] == []  # it does not calibrate


def test_the_files_and_the_lines(made):
    out, found, say = made
    assert Comparison.load(out) == dataclasses.replace(found)
    assert "lp-ft" in (out / "compare.html").read_text()
    told = [line for line in say.lines if line[0].isdigit()]
    assert [line.split()[0] for line in told] == [f"{number}/9" for number in range(1, 10)]
    assert "accuracy" in told[0] and "left" in told[0] and "left" not in told[-1]
    assert max(map(len, found.summary().splitlines()[:-1])) <= 80


def drawn(watch: Watch) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(watch.table())
    return console.export_text()


def test_the_live_table_is_read_from_the_folder(made, tmp_path):
    out, _, _ = made
    watch = Watch(Desk(out), Design.load(out))
    assert [line.split(":")[0].split()[0] for line in watch.news()][-1] == "9/9"
    lines = drawn(watch).splitlines()
    assert lines[0].strip() == "9 of 9 runs" and lines[1].split() == ["seed", "0", "seed", "1", "seed", "2"]
    assert [line.split()[0] for line in lines[2:5]] == ["ft", "lp-ft", "lp"]
    scores = [luthier.Report.load(out / "runs" / f"lp-seed{seed}").metrics["test"]["accuracy"] for seed in range(3)]
    assert lines[4].split()[1:] == [f"{score:.4f}" for score in scores]
    more = dataclasses.replace(Design.load(out), seeds=tuple({"seed": number} for number in range(12)))
    lines = drawn(Watch(Desk(out), more)).splitlines()
    assert lines[1].split() == ["done", "failed", "running", "open"]
    assert lines[2].split() == ["ft", "3", "0", "0", "9"]


def test_called_again_it_runs_nothing_and_tells_the_same(made, tiny_model, data, monkeypatch):
    out, found, _ = made
    monkeypatch.setattr(workshop, "fit", lambda *a, **k: pytest.fail("nothing was left to run"))
    say = Says()
    again = compare([FT, LP_FT, LP], model=tiny_model, data=data, out=out, seeds=3, narrator=say)
    assert again == found
    assert "9 of 9 runs are done already" in say.lines


def test_it_goes_on_and_grows_and_tries_failed_runs_again(tiny_model, data, tmp_path, monkeypatch):
    real, begun = workshop.fit, []

    def fit(made, **more):
        begun.append(more["out"].name)
        if len(begun) == 2:
            raise RuntimeError("the disk is full\nor so")
        return real(made, **more)

    monkeypatch.setattr(workshop, "fit", fit)
    out = tmp_path / "out"
    first = compare([FT], model=tiny_model, data=data, out=out, seeds=2)
    assert begun == ["ft-seed0", "ft-seed1"]
    assert [one.state for one in first.trials] == ["done", "failed"]
    assert "ft-seed1 ended with an error: or so" in first.notes[0]
    assert 0 < Desk(out).lost(Design.load(out).trials()[1]) < 60
    grown = compare([FT, LP], model=tiny_model, data=data, out=out, seeds=3)
    assert begun[2:] == ["lp-seed0", "ft-seed1", "lp-seed1", "ft-seed2", "lp-seed2"]
    assert all(one.state == "done" for one in grown.trials)
    fewer = compare([LP], model=tiny_model, data=data, out=out, seeds=1)
    assert len(begun) == 7 and fewer.recipes == ("ft", "lp")  # nothing that was run is lost


def test_another_recipe_of_the_same_name_or_other_data_is_refused(made, tiny_model, data, tmp_path):
    out, _, _ = made
    other = dataclasses.replace(FT, max_length=12)
    with pytest.raises(LuthierError, match="ft  must be the recipe it was when this comparison began"):
        compare([other], model=tiny_model, data=data, out=out, seeds=3)
    rows = tmp_path / "rows.csv"
    sentences(90).to_csv(rows, index=False)
    with pytest.raises(LuthierError, match="data and model  must be what it was"):
        compare([FT], model=tiny_model, data=str(rows), out=out, seeds=3)
    with pytest.raises(LuthierError, match="--vary  must be what it was"):
        compare([FT], model=tiny_model, data=data, out=out, seeds=3, vary=["head", "order"])


def test_faults_of_all_recipes_are_told_at_once_before_any_run(tiny_model, data, tmp_path):
    bad = dataclasses.replace(recipe(["mixout", {"reinit": {"top": 1}}]), name="bad")
    worse = dataclasses.replace(recipe([{"freeze": {"keep": ["top:9"]}}]), name="worse")
    with pytest.raises(LuthierError) as told:
        compare([FT, bad, worse], model=tiny_model, data=data, out=tmp_path / "out")
    wheres = [fault.where for fault in told.value.faults]
    assert any(where.startswith("bad: ") for where in wheres) and any(where.startswith("worse: ") for where in wheres)
    assert not (tmp_path / "out").exists()
    with pytest.raises(LuthierError) as told:
        compare(["ft", "ft", "nosuch"], model=tiny_model, data=data, out=tmp_path / "out", sets=["fy:seed=3", "zz=1"])
    wheres = " ".join(fault.where for fault in told.value.faults)
    assert "--set fy:seed=3" in wheres and "nosuch" in wheres and "ft" in wheres
    with pytest.raises(LuthierError, match="accuracy"):
        compare([FT], model=tiny_model, data=data, out=tmp_path / "out", metric="acuracy")
    with pytest.raises(LuthierError, match="--against"):
        compare([FT], model=tiny_model, data=data, out=tmp_path / "out", against="lp")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    with pytest.raises(LuthierError, match="holds no comparison"):
        compare([FT], model=tiny_model, data=data, out=tmp_path / "full")
    assert (tmp_path / "full" / "mine.txt").read_text() == "precious"


def test_names_and_changes_of_one_recipe(tiny_model, data, tmp_path):
    sets = ["short:stages.finetune.steps=1", "max_length=12", "long:stages.finetune.steps=2", "stages.finetune.lr=1e-3"]
    told = {"short": "ft", "long": "ft"}
    found = compare(told, model=tiny_model, data=data, out=tmp_path / "out", seeds=1, sets=sets)
    steps = {
        one.recipe: luthier.Report.load(tmp_path / "out" / "runs" / one.name).stages[0].steps for one in found.trials
    }
    assert steps == {"short": 1, "long": 2}
    report = luthier.Report.load(tmp_path / "out" / "runs" / "short-seed0")
    assert report.recipe == "short" and report.model["max_length"] == 12


def test_one_seed_claims_nothing_of_recipes(tiny_model, data, tmp_path):
    found = compare([FT, LP], model=tiny_model, data=data, out=tmp_path / "out", seeds=[4])
    one, other = (kept(tmp_path / "out" / "runs" / f"{name}-seed4")["test"] for name in ("lp", "ft"))
    right = [out.logits.argmax(axis=1) == out.targets for out in (one, other)]
    pair = next(one for one in found.versus if one.split == "test")
    assert pair.p == mcnemar(*right).p and pair.test == "McNemar" and not pair.claimed
    assert "one seed cannot separate lp from ft on test" in pair.sentence
    assert next(level for level in found.levels).sd is None


def test_against_one_recipe_there_are_fewer_pairs(made, tiny_model, data):
    out, _, _ = made
    found = compare([FT, LP_FT, LP], model=tiny_model, data=data, out=out, seeds=3, against="ft")
    assert {(one.one, one.other) for one in found.versus} == {("lp-ft", "ft"), ("lp", "ft")}
    assert {one.comparisons for one in found.versus} == {2}


@pytest.mark.parametrize("metric", ["nll", "f1_macro", "mcc", "auroc", "ece"])
def test_any_metric_is_compared_larger_difference_is_better(metric, made, tiny_model, data):
    out, _, _ = made
    found = compare([FT, LP_FT, LP], model=tiny_model, data=data, out=out, seeds=3, metric=metric)
    scores = {
        (name, seed): luthier.Report.load(out / "runs" / f"{name}-seed{seed}").metrics["test"][metric]
        for name in ("ft", "lp")
        for seed in range(3)
    }
    sign = 1 if metric in ("f1_macro", "mcc", "auroc") else -1
    pair = next(one for one in found.versus if (one.one, one.other, one.split) == ("lp", "ft", "test"))
    assert pair.by_seed == pytest.approx(
        [sign * (scores["lp", seed] - scores["ft", seed]) for seed in range(3)], abs=1e-6
    )


def test_a_regression_is_compared_by_its_error(tiny_model, tmp_path):
    rows = sentences(120)
    rows["label"] = [
        len(text.split()) / 7 + (label == "good") for text, label in zip(rows["text"], rows["label"], strict=True)
    ]
    found = compare([FT, LP], model=tiny_model, data=rows, out=tmp_path / "out", seeds=2)
    assert (found.metric, found.higher_is_better, found.unit["name"]) == ("rmse", False, "")
    assert not found.settings[0].majority and found.reliability == {"data": {}}
    assert "RMSE" in (tmp_path / "out" / "compare.html").read_text()


def test_a_regression_no_better_than_the_training_mean_has_failed_and_another_metric_is_told(tiny_model, tmp_path):
    rows = sentences(80)
    rows["label"] = [100 + len(text.split()) / 7 for text in rows["text"]]
    out = tmp_path / "out"
    found = compare([FT], model=tiny_model, data=rows, out=out, seeds=2)
    level = next(one for one in found.levels if one.split == "test")
    assert level.failed == ("ft-seed0", "ft-seed1")  # six steps do not come near 100
    constant = luthier.Report.load(out / "runs" / "ft-seed0").data["constant"]["test"]
    assert f"RMSE at or over {constant:.4g}, that of the mean of the training labels" == level.why
    assert f"ft failed in 2 of 2 runs on test (ft-seed0, ft-seed1): {level.why}" in found.notes
    assert gather(out, metric="mae").metric == "mae" and gather(out).metric == "rmse"
    chosen = dataclasses.replace(Design.load(out), more={"early": {}})
    with pytest.raises(LuthierError, match="--metric  must be rmse, as runs were chosen by it; got mae"):
        gathering._metric(chosen, "mae", luthier.Report.load(out / "runs" / "ft-seed0"))


def test_a_constant_regression_leaves_its_pair_unclaimed_and_all_else_is_told(tiny_model, tmp_path):
    rows = sentences(120)
    rows["label"] = [len(text.split()) / 7 + (label == "good") for text, label in rows.itertuples(index=False)]
    out = tmp_path / "out"
    asked = {"model": tiny_model, "data": rows, "out": out, "seeds": 2, "metric": "pearson"}
    found = compare([FT, LP], **asked)
    assert len(found.levels) == 4 and np.isfinite(found.versus[0].value)
    run = out / "runs" / "lp-seed1"
    constant = {
        name: dataclasses.replace(one, logits=np.ones_like(one.logits)) if name == "test" else one
        for name, one in kept(run).items()
    }
    keep(run, constant)
    report = json.loads((run / "report.json").read_text())
    report["metrics"]["test"] |= {"pearson": None, "spearman": None}
    (run / "report.json").write_text(json.dumps(report))
    found = compare([FT, LP], **asked)
    assert np.isnan(found.versus[0].value) and not found.versus[0].claimed
    assert "pearson is not defined for 1 of 2 runs of lp" in found.outcome[0]
    assert {(one.recipe, one.split): one.seeds for one in found.levels}["lp", "test"] == 1
    assert len(found.levels) == 4
    assert "not defined for 1 of 2 runs of lp" in (out / "compare.html").read_text()
    assert np.isnan(Comparison.load(out).versus[0].high)


def test_a_metric_of_another_task_and_data_of_two_tasks_are_refused_before_any_run(tiny_model, data, tmp_path):
    with pytest.raises(LuthierError, match="--metric  must be a metric of classification; got 'rmse'"):
        compare([FT, LP], model=tiny_model, data=data, out=tmp_path / "out", metric="rmse")
    rows = sentences(60)
    rows["label"] = [len(text) / 7 for text in rows["text"]]
    rows.to_csv(tmp_path / "numbers.csv", index=False)
    both = [data, str(tmp_path / "numbers.csv")]
    with pytest.raises(LuthierError, match="the data  must be of one task.* as classification, .*numbers.csv as regr"):
        compare([FT, LP], model=tiny_model, data=both, out=tmp_path / "out", metric="accuracy")
    assert not (tmp_path / "out").exists()


def test_rows_and_models_in_memory_are_written_beside_the_runs(tiny_model, tmp_path):
    pair = (
        AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2),
        AutoTokenizer.from_pretrained(tiny_model),
    )
    rows = sentences(80)
    found = compare([LP], model=pair, data={"train": rows[:60], "test": rows[60:]}, out=tmp_path / "out", seeds=1)
    assert found.trials[0].state == "done"
    assert pd.read_json(tmp_path / "out" / "data" / "train.jsonl", lines=True)["text"].tolist() == list(
        rows["text"][:60]
    )
    with pytest.raises(LuthierError, match="must be the data this comparison began with"):
        compare([LP], model=pair, data={"train": rows[:50], "test": rows[60:]}, out=tmp_path / "out", seeds=1)
    asked = {"data": {"train": rows[:60], "test": rows[60:]}, "out": tmp_path / "out", "seeds": 1}
    assert compare([LP], model=pair, **asked) == found
    other = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)  # with another head
    with pytest.raises(LuthierError, match="must be the model this comparison began with"):
        compare([LP], model=(other, pair[1]), **asked)


def test_what_is_wrong_is_told_at_once_and_nothing_is_left_behind(tiny_model, tmp_path):
    rows = sentences(60)
    with pytest.raises(LuthierError) as told:
        compare(
            ["ft", "lpft"],
            model=tiny_model,
            data=rows,
            out=tmp_path / "out",
            vary=["size"],
            metric="acc",
            early="start=2,share=3,keep=5",
            budget=3,
        )
    wheres = [fault.where for fault in told.value.faults]
    assert [any(word in where for where in wheres) for word in ("lpft", "--vary", "--metric", "share", "--budget")] == [
        True
    ] * 5
    assert not (tmp_path / "out").exists()
    bad = dataclasses.replace(recipe([{"freeze": {"keep": ["top:9"]}}]), name="bad")
    with pytest.raises(LuthierError, match="bad"):  # found with the data in hand, which had to be written first
        compare([bad], model=tiny_model, data=rows, out=tmp_path / "out", seeds=1)
    assert not (tmp_path / "out").exists()
    compare([LP], model=tiny_model, data=rows, out=tmp_path / "out", seeds=1)
    there = sorted(path.name for path in (tmp_path / "out").iterdir())
    with pytest.raises(LuthierError, match="bad"):
        compare([bad], model=tiny_model, data=rows, out=tmp_path / "out", seeds=1)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == there


def test_several_data_sets_are_settings_of_their_own(tiny_model, data, tmp_path):
    other = tmp_path / "other.csv"
    sentences(80, seed=3).to_csv(other, index=False)
    found = compare([FT, LP], model=tiny_model, data=[data, str(other)], out=tmp_path / "out", seeds=2)
    assert [setting.name for setting in found.settings] == ["data", "other"]
    assert (tmp_path / "out" / "runs" / "other" / "lp-seed1" / "report.json").is_file()
    assert len(found.trials) == 8 and all(one.startswith(("other: ", "data: ")) for one in found.outcome)


def test_settings_are_added_where_there_were_several(tiny_model, data, tmp_path, monkeypatch):
    files = []
    for at in range(3):
        files.append(str(tmp_path / f"d{at}.csv"))
        sentences(60, seed=at).to_csv(files[-1], index=False)
    out = tmp_path / "out"
    compare([LP], model=tiny_model, data=files[:2], out=out, seeds=1)
    real, begun = workshop.fit, []
    monkeypatch.setattr(workshop, "fit", lambda *a, **k: begun.append(str(k["out"])) or real(*a, **k))
    grown = compare([LP], model=tiny_model, data=files, out=out, seeds=1)
    assert [path.split("runs/")[1] for path in begun] == ["d2/lp-seed0"]
    assert [setting.name for setting in grown.settings] == ["d0", "d1", "d2"]
    again = compare([LP], model=tiny_model, data=files[1:], out=out, seeds=1)
    assert len(begun) == 1 and again.settings == grown.settings


def test_a_comparison_on_one_model_and_data_grows_by_others_and_keeps_its_runs(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "more").mkdir()
    files = [str(tmp_path / "rows.csv"), str(tmp_path / "more" / "rows.csv"), str(tmp_path / "third.csv")]
    for at, file in enumerate(files):
        sentences(60, seed=at).to_csv(file, index=False)
    other = tiny_folder(tmp_path / "other", dropout=0.0)
    out, asked = (
        tmp_path / "out",
        {"seeds": 1, "search": ["stages.finetune.lr=one:1e-3,2e-3"], "budget": 2, "metric": "nll"},
    )
    real, begun = workshop.fit, []
    monkeypatch.setattr(workshop, "fit", lambda *a, **k: begun.append(str(k["out"])) or real(*a, **k))
    compare([FT], model=tiny_model, data=files[0], out=out, **asked)
    assert len(begun) == 3  # two of the search
    for slip in (files[1], files[1:]):
        with pytest.raises(LuthierError, match="data and model  must be"):
            compare([FT], model=tiny_model, data=slip, out=out, **asked)
    grown = compare([FT], model=[tiny_model, other], data=files[:2], out=out, **asked)
    assert len(begun) == 12 and len(list(out.rglob("report.json"))) == 12
    assert grown.settings[0].name == "rows" and len({one.name for one in grown.settings}) == 4
    assert (out / "runs" / "ft-seed0" / "report.json").is_file() and (out / "search" / "ft.json").is_file()
    again = compare([FT], model=other, data=files[2], out=out, **asked)
    assert len(begun) == 15 and len(again.settings) == 5
    compare([FT], model=tiny_model, data=files[0], out=out, **asked)
    assert len(begun) == 15


def test_two_calls_at_once_lose_nothing_of_each_other(tiny_model, data, tmp_path, monkeypatch):
    out, real = tmp_path / "out", comparing.check

    def check(design: Design, *rest) -> dict[str, int]:
        kept = real(design, *rest)
        monkeypatch.setattr(comparing, "check", real)  # while this one checks, another call comes and goes
        designed([LP], model=tiny_model, data=data, out=out, seeds=2)
        return kept

    monkeypatch.setattr(comparing, "check", check)
    asked = designed([FT], model=tiny_model, data=data, out=out, seeds=[0, 7])
    assert asked == Design.load(out) and list(asked.recipes) == ["lp", "ft"]
    assert asked.seeds == ({"seed": 0}, {"seed": 1}, {"seed": 7})
    monkeypatch.setattr(comparing, "check", lambda design, *rest: check(design, *rest))
    again = dataclasses.replace(FT, max_length=12, name="lp")
    with pytest.raises(LuthierError, match="lp  must be the recipe it was"):
        designed([again], model=tiny_model, data=data, out=out)
    assert Design.load(out) == asked


def test_nothing_is_claimed_on_the_split_that_a_recipe_chose_by(tiny_model, tmp_path):
    rows = sentences(120)
    apart = {"train": rows[:80], "validation": rows[80:]}
    bad = dataclasses.replace(recipe(BASE, steps=1, lr=1e-6), name="bad")
    good = dataclasses.replace(recipe([*BASE, {"best": {"every": 40}}], steps=150, lr=3e-3), name="good")
    plain = dataclasses.replace(recipe(BASE, steps=150, lr=3e-3), name="plain")
    found = compare([bad, plain], model=tiny_model, data=apart, out=tmp_path / "out", seeds=3)
    assert found.settings[0].shown == "validation" and found.versus[0].claimed
    found = compare([bad, plain, good], model=tiny_model, data=apart, out=tmp_path / "out", seeds=3)
    assert found.settings[0].chosen_on == "validation"
    assert not any(one.claimed for one in found.versus)
    assert "nothing is claimed on validation, by which some recipe chose" in found.versus[0].sentence


def test_a_recipe_without_data_is_refused_before_any_run_beside_one_that_names_its_own(tiny_model, data, tmp_path):
    own = dataclasses.replace(FT, name="own", data={"in": data})
    with pytest.raises(LuthierError, match=r"ft  --data must be given, or data: {in: PATH} in the recipe\.$"):
        compare([own, FT], model=tiny_model, out=tmp_path / "out", seeds=1)
    assert not (tmp_path / "out").exists()


def test_recipes_that_would_be_measured_on_other_rows_are_refused_before_any_run(tiny_model, tmp_path):
    for name, seed in (("mine", 0), ("yours", 1)):
        sentences(seed=seed).to_csv(tmp_path / f"{name}.csv", index=False)
    mine, yours = (
        dataclasses.replace(FT, name=name, data={"in": str(tmp_path / f"{name}.csv")}) for name in ("mine", "yours")
    )
    with pytest.raises(LuthierError, match=r"yours  must be measured on the rows of mine, as runs are paired by row"):
        compare([mine, yours], model=tiny_model, out=tmp_path / "out", seeds=1)
    other = dataclasses.replace(mine, name="other-split", seeds={"split": 1})
    with pytest.raises(LuthierError, match=r"other-split  must be measured on the rows of mine"):
        compare([mine, other], model=tiny_model, out=tmp_path / "out", seeds=1, vary=["head"])
    assert not (tmp_path / "out").exists()


def report_of(runs, seeds) -> luthier.Report:
    return luthier.Report.load(runs / f"ft-head{seeds[0]}-order{seeds[1]}")


def test_streams_vary_apart(tiny_model, data, tmp_path, monkeypatch):
    asked = {"seeds": 2, "vary": ["head", "order"], "metric": "nll"}
    found = compare([LP, FT], model=tiny_model, data=data, out=tmp_path / "out", **asked)
    assert [one.seeds for one in found.trials if one.recipe == "ft"] == [
        {"head": 0, "order": 0},
        {"head": 0, "order": 1},
        {"head": 1, "order": 0},
        {"head": 1, "order": 1},
    ]
    runs = tmp_path / "out" / "runs"
    first = [
        json.loads((runs / f"ft-head{h}-order{o}" / "log.jsonl").read_text().splitlines()[0])["loss"]
        for h in (0, 1)
        for o in (0, 1)
    ]
    assert len(set(first)) == 4  # other heads, or other rows in the first step
    parts = found.variance["data"]["ft"]["shares"]
    assert sum(parts.values()) == pytest.approx(1.0) or sum(parts.values()) == 0.0
    scores = {seeds: report_of(runs, seeds).metrics for seeds in ((0, 0), (0, 1), (1, 0), (1, 1))}
    level = next(one for one in found.levels if (one.recipe, one.split) == ("ft", "test"))
    test = {seeds: told["test"]["nll"] for seeds, told in scores.items()}
    assert (level.seeds, level.mean) == (4, pytest.approx(np.mean(list(test.values()))))
    alone = np.std([test[0, 0], test[1, 1]], ddof=1)  # the other two share something with both
    assert level.sd == pytest.approx(alone) != pytest.approx(np.std(list(test.values()), ddof=1))
    best = [scores[at, at]["validation"]["nll"] for at in (0, 1)]
    assert [one["n"] for one in found.best_of["data"]["ft"]] == [1, 2]
    assert found.best_of["data"]["ft"][0]["expected"] == pytest.approx(np.mean(best))
    assert all(len(one.by_seed) == 2 for one in found.versus)
    assert any(note.startswith("head and order vary apart: means are of all runs") for note in found.notes)
    monkeypatch.setattr("luthier.statistics.runs.majority_share", lambda targets: 0.999)
    level = next(one for one in gather(tmp_path / "out").levels if (one.recipe, one.split) == ("ft", "test"))
    assert level.failed == tuple(f"ft-head{h}-order{o}" for h, o in test)
    assert level.why == "accuracy at or under 0.999, the share of the majority class"
    more = designed([LP], model=tiny_model, data=data, out=tmp_path / "out", **{**asked, "seeds": [0, 5]})
    pairs = [tuple(one.values()) for one in more.seeds]
    assert set(pairs) == {(head, order) for head in (0, 1, 5) for order in (0, 1, 5)}  # a full grid still
    assert pairs[:4] == [(0, 0), (0, 1), (1, 0), (1, 1)] and len(pairs) == 9
    solved = [luthier.Report.load(runs / f"lp-head{h}-order0").metrics["test"] for h in (0, 1)]
    assert solved[0]["n"] == solved[1]["n"]
