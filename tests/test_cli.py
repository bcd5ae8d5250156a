"""The command line as a new user meets it: what it prints, what it writes, how it leaves."""

from __future__ import annotations

import csv
import json
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import luthier
from luthier import cli
from luthier.cli.options import mapped_of
from luthier.errors import LuthierError
from tests.little import sentences
from tests.training.test_resume import Asks

ROOT = Path(__file__).parents[1]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "reviews.csv"
    sentences(80).to_csv(path, index=False)
    return path


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the command line in this process, in an empty folder, without a network."""

    def refuse(*args, **named):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["luthier", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else 0 if leave.code is None else 1
        told = capsys.readouterr()
        return code, told.out, told.err

    return call


def written(folder: Path = Path()) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


SHORT = ("--set", "max_length=16", "--set", "stages.1.steps=6")


def fit(run, tiny_model, data, *more):
    return run("fit", "--recipe", "lp-ft", "--model", tiny_model, "--data", data, *SHORT, *more)


def test_fit_report_and_predict_from_end_to_end(run, tiny_model, data):
    code, out, err = fit(run, tiny_model, data, "--out", "first")
    assert code == 0, err
    assert "classification: 2 labels" in out
    assert "stage 2 'finetune': 6 steps of 16 rows" in out
    assert "luthier predict first" in out
    assert max(len(line) for line in out.splitlines() if not line.startswith(("  luthier", "warning"))) <= 80
    code, out, _ = run("report", "first")
    assert code == 0
    assert "accuracy" in out
    new = Path("new.csv")
    new.write_text('id,text,label\n1,"good film",x\n2,"bad, awful book",y\n', encoding="utf-8")
    code, _, err = run("predict", "first", "--data", new, "--out", "told.csv")
    assert code == 0, err
    rows = list(csv.DictReader(Path("told.csv").read_text().splitlines()))
    assert [row["id"] for row in rows] == ["1", "2"]
    assert all(abs(float(row["p_good"]) + float(row["p_bad"]) - 1) < 1e-9 for row in rows)
    assert all(row["prediction"] == max(("good", "bad"), key=lambda name: float(row[f"p_{name}"])) for row in rows)
    code, out, _ = run("predict", "first", "--data", new)
    assert out.splitlines()[0] == "id,text,label,prediction,p_bad,p_good"
    code, _, _ = run("predict", "first", "--data", new, "--out", "told.jsonl")
    assert json.loads(Path("told.jsonl").read_text().splitlines()[0])["prediction"] in ("good", "bad")
    code, _, err = run("predict", "first", "--data", new, "--out", "told.csv")
    assert code == 2
    assert "must not exist yet" in err


def test_what_is_suggested_next_names_the_data_of_the_recipe(run, tiny_model, data):
    told = {"name": "mine", "max_length": 16, "data": {"in": str(data)}, "stages": [{"steps": 1}]}
    Path("mine.yaml").write_text(json.dumps(told))
    code, out, err = run("fit", "--recipe", "mine.yaml", "--model", tiny_model, "--out", "first")
    assert code == 0, err
    assert f"  luthier fit --recipe llrd --model {tiny_model} --data {data}\n" in out


def test_what_is_suggested_next_is_the_same_experiment_quoted_for_a_shell(run, tiny_model, tmp_path):
    rows = sentences(80).rename(columns={"text": "the title", "label": "cls"})
    rows["other"] = rows["the title"].str[::-1]
    data, far = tmp_path / "my rows.csv", tmp_path / "far off.csv"
    rows.to_csv(data, index=False)
    rows.replace({"cls": {"good": "g"}}).to_csv(far, index=False)
    words = ["--data", data, "--text", "the title", "--text-pair", "other", "--label", "cls", "--ood", f"far={far}"]
    words += ["--map", "far:g=good", "--task", "classification", "--seed", 3, "--set", "max_length=16"]
    code, out, err = run(
        "fit", "--recipe", "ft", "--model", tiny_model, *words, "--set", "stages.0.steps=1", "--out", "a b"
    )
    assert code == 0, err
    assert "  luthier report 'a b'\n" in out
    told = shlex.split(out.splitlines()[-1])
    assert told == ["luthier", "fit", "--recipe", "llrd", "--model", str(tiny_model), *map(str, words)]
    code, _, err = run(*told[1:], "--set", "stages.0.steps=1")
    assert code == 0, err


def test_what_is_suggested_after_a_demo_on_other_rows_names_these(run, tiny_model, data):
    code, out, err = run("fit", "--demo", "--model", tiny_model, "--data", data, *SHORT, "--out", "first")
    assert code == 0, err
    assert (
        out.splitlines()[-1]
        == f"  luthier fit --recipe llrd --demo --model {tiny_model} --data {data} --set max_length=16"
    )


def test_a_run_that_was_stopped_goes_on_by_the_command_that_it_prints(run, tiny_model, tmp_path):
    rows = sentences(80).rename(columns={"label": "cls"})
    rows["other"] = rows["text"]
    rows.to_csv(tmp_path / "rows.csv", index=False)
    asked = {"model": str(tiny_model), "data": str(tmp_path / "rows.csv"), "text": "other", "label": "cls", "seed": 4}
    asked |= {"ood": {"far": str(tmp_path / "rows.csv")}, "sets": SHORT[1::2]}
    with pytest.raises(LuthierError, match="stopped on request at step 1") as caught:
        luthier.fit("ft", **asked | {"sets": ["max_length=16", "stages.0.steps=6"]}, out="a b", narrator=Asks())
    command = str(caught.value).partition("; ")[2].removesuffix(" goes on from there")
    assert command == "luthier fit --out 'a b' --resume"
    code, out, err = run(*shlex.split(command)[1:])
    assert code == 0, err
    assert "going on with stage" in out and luthier.Report.load("a b").seed == 4
    code, _, err = run("fit", "--out", "nothing", "--resume")
    assert code == 2 and "--model and --data must be given" in err


def test_a_run_of_rows_in_memory_goes_on_when_they_are_given(run, tiny_model, data):
    with pytest.raises(LuthierError, match="stopped on request"):
        luthier.fit(
            "ft",
            model=tiny_model,
            data=sentences(80),
            sets=["max_length=16", "stages.0.steps=6"],
            out="a",
            narrator=Asks(),
        )
    code, _, err = run("fit", "--out", "a", "--resume")
    assert code == 2 and "a: data  must be given: it was in memory when the run was made.  Give --data." in err


def test_the_help_names_the_folder_as_it_will_be(run, tiny_model, data):
    _, out, _ = run("fit", "--help")
    assert "runs/RECIPE-DATA if not given, with -seedN after --seed N" in " ".join(out.split())
    assert fit(run, tiny_model, data)[0] == 0
    assert [path.name for path in Path("runs").iterdir()] == ["lp-ft-reviews"]


def test_a_comparison_of_which_runs_failed_ends_with_1_and_grows_only_when_told(run, tiny_model, data, monkeypatch):
    from luthier.trials import work as workshop

    Path("few.yaml").write_text(json.dumps({"name": "few", "max_length": 16, "stages": [{"steps": 1}]}))
    words = ["compare", "--recipe", "few.yaml", "--model", tiny_model, "--data", data, "--out", "c"]
    real, bad = workshop.fit, {"few-seed0", "few-seed1"}

    def diverges(made, **more):
        if more["out"].name in bad:
            raise LuthierError("the loss must be a finite number " * 9)
        return real(made, **more)

    monkeypatch.setattr(workshop, "fit", diverges)
    code, out, err = run(*words, "--seeds", 2)
    assert code == 1 and "no run has ended" in err
    assert "failed: the loss must be a finite number" in out
    cut = [line.partition(" ...")[0].split()[-1] for line in out.splitlines() if "failed: " in line]
    assert len(cut) == 2 and set(cut) <= {"the", "loss", "must", "be", "a", "finite", "number"}
    bad.remove("few-seed0")
    code, out, err = run(*words)
    assert code == 1 and "1 of 2 runs failed: few-seed1" in err and "accuracy on reviews" in out
    bad.clear()
    code, out, err = run(*words)
    assert code == 0, err
    assert sorted(path.name for path in Path("c/runs").iterdir() if path.is_dir()) == ["few-seed0", "few-seed1"]
    monkeypatch.setattr(workshop, "fit", lambda *a, **k: pytest.fail("nothing is to be trained"))
    code, out, err = run("gather", "c", "--metric", "nll")
    assert code == 0, err
    assert "nll on reviews" in out and out.count("page: ") == 1
    assert json.loads(Path("c/comparison.json").read_text())["metric"] == "nll"
    code, out, _ = run("gather", "c")
    assert code == 0 and "accuracy on reviews" in out
    code, _, err = run("gather", "c", "--metric", "acuracy")
    assert code == 2 and "Did you mean 'accuracy'?" in err
    code, _, err = run("gather", "c", "--metric", "rmse")
    assert code == 2 and "--metric  must be of accuracy" in err


def test_without_out_runs_are_named_and_never_overwritten(run, tiny_model, data):
    assert fit(run, tiny_model, data, "--seed", 3)[0] == 0
    assert fit(run, tiny_model, data, "--seed", 3)[0] == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["lp-ft-reviews-seed3", "lp-ft-reviews-seed3-2"]


def test_a_second_run_in_the_same_folder_is_refused_and_resume_gives_the_report(run, tiny_model, data):
    assert fit(run, tiny_model, data, "--out", "a")[0] == 0
    before = written(Path("a"))
    code, _, err = fit(run, tiny_model, data, "--out", "a")
    assert code == 2
    assert "holds a finished run" in err
    assert fit(run, tiny_model, data, "--out", "a", "--resume")[0] == 0
    assert written(Path("a")) == before


def test_plan_trains_nothing_writes_nothing_and_forecasts(run, tiny_model, data):
    code, out, err = run("plan", "--recipe", "lp-ft", "--model", tiny_model, "--data", data, *SHORT)
    assert code == 0, err
    assert "memory forecast" in out
    assert "steps of" in out
    assert "training: about" in out
    assert written() == []
    code, out, _ = run("plan", "--recipe", "lp-ft", "--model", tiny_model, "--data", data, *SHORT, "--no-time")
    assert code == 0
    assert "training: about" not in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "nowhere.csv"], "nowhere.csv"),
        (["--model", "no/such/model"], "no/such/model"),
        (["--recipe", "lpft"], "Did you mean 'lp-ft'?"),
        (["--set", "stages.1.epoch=3"], "Did you mean 'epochs'?"),
        (["--label", "lable"], "Did you mean 'label'?"),
        (["--text", "nothing"], "nothing"),
        (["--task", "ranking"], "classification"),
        (["--set", "metric=accurcy"], "Did you mean 'accuracy'?"),
        (["--set", "stages.1.swa.start=2"], "there is no 'swa' here"),
        (["--ood", "far"], "must be NAME=PATH"),
        (["--resume"], "--resume needs --out"),
    ],
)
def test_a_mistake_gets_a_clear_line_exit_2_and_nothing_is_written(run, tiny_model, data, words, said):
    code, _, err = fit(run, tiny_model, data, *words)
    assert code == 2
    assert said in err
    assert "Traceback" not in err
    assert written() == []


def test_several_processes_must_be_told_their_folder(run, tiny_model, data, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = fit(run, tiny_model, data)
    assert code == 2
    assert "--out must be given when several processes run" in err
    assert written() == []


def test_a_mistyped_flag_is_refused_by_name(run, tiny_model, data):
    code, _, err = run("fit", "--modle", tiny_model, "--data", data)
    assert code == 2
    assert "--modle" in err


def test_model_and_data_must_be_given(run):
    code, _, err = run("fit")
    assert code == 2
    assert "--model and --data must be given, or --demo" in err


def test_init_writes_a_recipe_that_plans_and_never_overwrites(run, tiny_model, data):
    code, out, _ = run("init", "--data", data, "--out", "mine.yaml")
    assert code == 0
    assert "luthier plan --recipe mine.yaml" in out
    code, out, err = run(
        "plan", "--recipe", "mine.yaml", "--model", tiny_model, "--data", data, "--no-time", "--set", "max_length=32"
    )
    assert code == 0, err
    code, _, err = run("init", "--data", data, "--out", "mine.yaml")
    assert code == 2
    assert "exists" in err


def test_init_says_its_columns_in_the_command_that_comes_next(run, tmp_path):
    data = tmp_path / "my rows.csv"
    sentences(80).rename(columns={"text": "the title", "label": "cls"}).to_csv(data, index=False)
    code, out, err = run("init", "--data", data, "--text", "the title", "--label", "cls", "--out", "my own.yaml")
    assert code == 0, err
    command = f"luthier plan --recipe 'my own.yaml' --model MODEL --data '{data}' --text 'the title' --label cls"
    assert out.splitlines()[-1] == f"  {command}" and command in Path("my own.yaml").read_text()


def test_lists_cards_and_schema_are_told_in_80_columns(run):
    for words in (["recipes"], ["methods"], ["recipes", "lp-ft"]):
        code, out, _ = run(*words)
        assert code == 0
        assert max(map(len, out.splitlines())) <= 90
    assert "solver: exact" in out
    code, out, _ = run("card", "llrd")
    assert code == 0
    assert "scales the learning rate" in out
    code, _, err = run("card", "lldr")
    assert code == 2
    assert "Did you mean 'llrd'?" in err
    code, out, _ = run("schema")
    assert json.loads(out)["title"] == "Luthier recipe"
    code, out, _ = run("--version")
    assert (code, out.startswith("luthier ")) == (0, True)


def test_predicting_with_a_run_that_has_not_ended_is_refused(run, tmp_path):
    (tmp_path / "half").mkdir()
    code, _, err = run("predict", tmp_path / "half", "--data", "x.csv")
    assert code == 2
    assert "holds no finished run" in err


def test_exit_codes_and_messages_hold_for_the_installed_command(tmp_path):
    """Once through a real process: 0, and 2 with one message and no traceback."""
    done = subprocess.run([sys.executable, "-m", "luthier", "recipes"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, "lp-ft" in done.stdout) == (0, True)
    words = ["fit", "--model", str(tmp_path), "--data", str(tmp_path / "no.csv")]
    done = subprocess.run([sys.executable, "-m", "luthier", *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "no.csv" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_keeps_its_stages_is_studied_for_what_it_forgot(run, tiny_model, data):
    code, _, err = fit(run, tiny_model, data, "--out", "kept", "--keep-stages")
    assert code == 0, err
    assert Path("kept/stages/probe.safetensors").is_file()
    code, out, err = run("study", "kept", "--forgetting", "--general", "validation")
    assert code == 0, err
    assert "What was forgotten and learned since the start of 'finetune'" in out
    assert "validation *" in out and "test *" not in out
    assert [path.name for path in Path("kept/study").iterdir()] == ["forgetting.json"]
    code, _, err = run("study", "kept", "--forgetting", "--general", "tset")
    assert code == 2 and "--general" in err


def test_a_name_that_stands_twice_on_the_command_line_is_refused_with_both(run, tiny_model, data):
    code, _, err = fit(run, tiny_model, data, "--ood", "x=a.csv", "--ood", "y=c.csv", "--ood", "x=b.csv")
    assert code == 2 and "--ood x  must stand once; got a.csv and b.csv." in err
    code, _, err = fit(run, tiny_model, data, "--map", "x:+=good", "--map", "x:-=bad", "--map", "x:+=bad")
    assert code == 2 and "--map x:+  must stand once; got good and bad." in err
    assert mapped_of(["x:+=good", "x:-=bad", "y:+=bad"]) == {"x": {"+": "good", "-": "bad"}, "y": {"+": "bad"}}


def test_a_run_in_the_home_folder_is_made_and_shown(run, tiny_model, data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    code, _, err = fit(run, tiny_model, data, "--out", "~/first")
    assert code == 0, err
    for words in (["report", "~/first"], ["predict", "~/first", "--data", data, "--out", "~/told.csv"]):
        code, _, err = run(*words)
        assert code == 0, err
    assert run("init", "--data", data, "--out", "~/mine.yaml")[0] == 0
    assert {path.name for path in (tmp_path / "home").glob("[!.]*")} == {"first", "told.csv", "mine.yaml"}
    assert written() == []
