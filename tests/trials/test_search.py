"""Searches: of runs whose scores are written by hand, and of real runs of a tiny model."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
from collections import Counter

import pytest

import luthier
from luthier import cli
from luthier.call import Call
from luthier.errors import LuthierError, MissingExtra
from luthier.narrate import Silent
from luthier.recipe.text import read
from luthier.trials import proposals
from luthier.trials import work as workshop
from luthier.trials.comparing import compare, designed
from luthier.trials.design import Asked, Design
from luthier.trials.desk import Desk
from luthier.trials.search import SEED, Search
from luthier.trials.searched import chosen, progress, refuse_under_way, resolved, searches, waiting
from luthier.trials.work import work
from tests.little import KillsItself, in_a_child, recipe, sentences

FT = dataclasses.replace(recipe(["adamw"], steps=4), name="ft")
LP = dataclasses.replace(recipe(["adamw"], steps=1, probe=True), name="lp")
RATE = "stages.finetune.lr"


def written(folder, budget, *, metric="accuracy", space="log:1e-5:1e-2", settings=1):
    """A search of FT's rate whose runs nobody makes."""
    names = ["data", "other"][:settings]
    more = {"search": {"spaces": {"ft": {RATE: space}}, "budget": budget}}
    design = Design(
        {"ft": FT.to_dict()},
        tuple(Asked(name, Call(), name if len(names) > 1 else "") for name in names),
        ({"seed": 0},),
        metric,
        None,
        more,
    )
    design.save(folder)
    return Search(Desk(folder), design, "data", "ft")


def scored(search, score, *, test=0.5, seconds=60.0, lost=0.0):
    """Does a run by writing its report: ``score`` of (number, rate) on validation; None fails it after ``lost`` seconds."""

    def do(trial, design):
        rate = design.recipe(trial).stages[0].learning_rate
        value = score(int(trial.name.rpartition("search")[2]), rate)
        if value is None:
            return search.desk.fail(trial, "by hand", lost)
        metrics = {"validation": {search.design.metric: value}, "test": {search.design.metric: test - value}}
        search.desk.run(trial).mkdir(parents=True)
        told = {"metric": "f1_macro", "metrics": metrics, "seconds": seconds}
        (search.desk.run(trial) / "report.json").write_text(json.dumps(told))

    return do


def to_the_end(search, do):
    steps = 0
    while search.step(do):
        steps += 1
    assert search.over
    return steps


def test_the_best_on_validation_wins_whatever_the_test_says_and_the_first_of_equals(tmp_path):
    search = written(tmp_path, {"runs": 4})
    scores = [0.5, 0.75, 0.75, 0.25]
    assert to_the_end(search, scored(search, lambda number, rate: scores[number])) == 4
    found = search.winner
    assert (found["trial"], found["validation"], found["tried"], found["failed"]) == (1, 0.75, 4, 0)
    assert found["seconds"] == 240.0 and [one["score"] for one in found["trials"]] == scores
    assert found["values"] == search.told()[1]["values"] and 1e-5 <= found["values"][RATE] <= 1e-2
    assert len({one["values"][RATE] for one in found["trials"]}) == 4
    fewer_is_better = written(tmp_path / "nll", {"runs": 4}, metric="nll")
    to_the_end(fewer_is_better, scored(fewer_is_better, lambda number, rate: scores[number]))
    assert fewer_is_better.winner["trial"] == 3
    assert progress(search.desk, search.design) == {"ft": "search ft 4/4: best accuracy 0.7500 on validation"}


def test_optuna_goes_by_the_scores_and_draws_the_same_in_any_process(tmp_path):
    first, again = written(tmp_path / "a", {"runs": 16}), written(tmp_path / "b", {"runs": 16})
    towards = lambda number, rate: 1.0 - abs(rate - 1e-2)  # noqa: E731
    to_the_end(first, scored(first, towards))
    code = in_a_child(lambda: to_the_end(again, scored(again, towards)))
    assert code == 0 and [one["values"] for one in again.told()] == [one["values"] for one in first.told()]
    rates = [one["values"][RATE] for one in first.told()]
    assert statistics.median(rates[proposals.FIRST :]) > 10 * statistics.median(rates[: proposals.FIRST])


def test_failed_runs_count_and_where_all_fail_there_is_no_winner_until_they_are_tried_again(tmp_path):
    search = written(tmp_path / "some", {"runs": 3})
    to_the_end(search, scored(search, lambda number, rate: [None, float("nan"), 0.5][number]))
    assert (search.winner["tried"], search.winner["failed"], search.winner["trial"]) == (3, 2, 2)
    search = written(tmp_path / "all", {"runs": 3})
    to_the_end(search, scored(search, lambda number, rate: None))
    design = resolved(search.desk, search.design)
    with pytest.raises(LuthierError, match="none of the settings"):
        design.recipe(design.trials()[0])
    before = [one["values"] for one in search.told()]
    search.again()
    assert not search.over
    assert to_the_end(search, scored(search, lambda number, rate: 0.5)) == 3
    assert [one["values"] for one in search.told()] == before and search.winner["trial"] == 0


def test_a_budget_of_minutes_counts_training_and_ends_where_nothing_works(tmp_path):
    search = written(tmp_path / "a", {"minutes": 2.5})
    assert to_the_end(search, scored(search, lambda number, rate: 0.5)) == 3
    assert progress(search.desk, search.design)["ft"].startswith("search ft 3, 3.0/2.5 min: best")
    hopeless = written(tmp_path / "b", {"minutes": 2.5})
    assert to_the_end(hopeless, scored(hopeless, lambda number, rate: None)) == 10


def test_runs_that_failed_count_by_their_minutes_whoever_looks_at_them(tmp_path):
    search = written(tmp_path, {"minutes": 2.5})
    do = scored(search, lambda number, rate: None if number == 0 else 0.5, lost=90.0)
    assert to_the_end(search, do) == 2  # 90 and 60 seconds by the folder, not by the clock of who settles them
    assert [one["seconds"] for one in search.told()] == [90.0, 60.0]


def test_settings_that_can_be_counted_are_tried_once_each(tmp_path):
    search = written(tmp_path, {"runs": 10}, space="one:0.1,0.2,0.3")
    assert to_the_end(search, scored(search, lambda number, rate: rate)) == 3
    assert sorted(one["values"][RATE] for one in search.told()) == [0.1, 0.2, 0.3]
    assert search.winner["values"] == {RATE: 0.3} and search.winner["tried"] == 3


def test_whoever_is_killed_while_asking_leaves_nothing_behind(tmp_path, monkeypatch):
    search = written(tmp_path, {"runs": 3})
    do = scored(search, lambda number, rate: 0.5)
    assert search.step(do)
    with monkeypatch.context() as patched:
        patched.setattr(Search, "_keep", lambda self, one: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            search.step(do)  # Optuna knows of the trial; no file does
    with (tmp_path / "search" / "ft.log").open("ab") as log:
        log.write(b'{"op_code": 4, "trial_')  # the power went
    assert to_the_end(search, do) == 2
    assert [one["optuna"] for one in search.told()] == [0, 2, 3]  # 1 was never run


def test_more_budget_goes_on_and_runs_with_other_settings_are_put_aside(tmp_path):
    for name, score, moved in (
        ("better", lambda number, rate: number / 10, True),
        ("worse", lambda number, rate: -number, False),
    ):
        search = written(tmp_path / name, {"runs": 2})
        to_the_end(search, scored(search, score))
        final = search.design.trials()[0]
        run = search.desk.run(final)
        run.mkdir()
        (run / "report.json").write_text("{}")
        more = written(tmp_path / name, {"runs": 5})
        assert waiting(more.desk, more.design) == {("data", "ft")} and not more.over
        assert to_the_end(more, scored(more, score)) == 3
        assert more.winner["tried"] == 5 and more.winner["trial"] == (4 if moved else 0)
        assert run.exists() is not moved
        assert (tmp_path / name / "earlier" / "ft-seed0-search1" / "report.json").exists() is moved
        assert waiting(more.desk, more.design) == set()


def test_runs_that_were_made_without_the_search_are_put_aside_when_it_has_a_winner(tmp_path):
    search = written(tmp_path, {"runs": 2})
    run = search.desk.run(search.design.trials()[0])
    run.mkdir(parents=True)
    (run / "report.json").write_text("{}")
    to_the_end(search, scored(search, lambda number, rate: 0.5))
    assert not run.exists() and (tmp_path / "earlier" / "ft-seed0-unsearched" / "report.json").exists()


def test_no_more_search_while_runs_with_the_earlier_settings_are_under_way(tmp_path):
    search = written(tmp_path, {"runs": 2})
    more = dataclasses.replace(search.design, more={"search": {**search.design.more["search"], "budget": {"runs": 3}}})
    refuse_under_way(search.desk, search.design, more)
    with search.desk.claimed(search.design.trials()[0]):
        refuse_under_way(search.desk, search.design, search.design)
        with pytest.raises(LuthierError, match="ft-seed0 under way"):
            refuse_under_way(search.desk, search.design, more)


def test_each_setting_has_a_search_of_its_own(tmp_path):
    search = written(tmp_path, {"runs": 2}, settings=2)
    for one in searches(search.desk, search.design):
        sign = 1 if one.setting == "data" else -1
        to_the_end(one, scored(one, lambda number, rate, sign=sign: sign * number))
    found = chosen(search.desk, search.design)
    assert {name: one["trial"] for name, one in found.items()} == {"ft on data": 1, "ft on other": 0}
    design = resolved(search.desk, search.design)
    rates = {trial.setting: design.recipe(trial).stages[0].learning_rate for trial in design.trials()}
    assert rates == {one.setting: one.winner["values"][RATE] for one in searches(search.desk, search.design)}
    assert Design.load(tmp_path) == search.design and design.chosen  # what was found is not in design.json


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows") / "data"
    folder.mkdir()
    rows = sentences(100)
    rows[:50].to_csv(folder / "train.csv", index=False)
    rows[50:70].to_csv(folder / "validation.csv", index=False)
    rows[70:].to_csv(folder / "test.csv", index=False)
    return str(folder)


ASKED = {"seeds": 2, "metric": "nll", "search": [f"ft:{RATE}=log:1e-4:1e-1"], "budget": 3}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model, data):
    out = tmp_path_factory.mktemp("searched") / "out"
    return out, compare([FT, LP], model=tiny_model, data=data, out=out, **ASKED)


def test_the_runs_have_the_winners_values_and_seeds_of_their_own(made):
    out, found = made
    tried = [luthier.Report.load(out / "runs" / f"ft-search{number}") for number in range(3)]
    scores = [one.metrics["validation"]["nll"] for one in tried]
    recipes = [read(out / "runs" / f"ft-search{number}" / "recipe.yaml") for number in range(3)]
    assert {one.seed for one in recipes} == {SEED} and not (out / "runs" / "ft-search3").exists()
    best = recipes[scores.index(min(scores))]
    assert found.chosen["ft"]["values"] == {RATE: best.stages[0].learning_rate}
    assert (found.chosen["ft"]["validation"], found.chosen["ft"]["tried"]) == (min(scores), 3)
    for seed in range(2):
        assert (
            read(out / "runs" / f"ft-seed{seed}" / "recipe.yaml").digest == dataclasses.replace(best, seed=seed).digest
        )
        assert read(out / "runs" / f"lp-seed{seed}" / "recipe.yaml").digest == dataclasses.replace(LP, seed=seed).digest
    assert {row.name for row in found.trials} == {"ft-seed0", "ft-seed1", "lp-seed0", "lp-seed1"}
    level = next(one for one in found.levels if (one.recipe, one.split) == ("ft", "test"))
    finals = [luthier.Report.load(out / "runs" / f"ft-seed{seed}").metrics["test"]["nll"] for seed in range(2)]
    assert level.mean == pytest.approx(sum(finals) / 2)


def test_the_page_and_the_summary_say_how_many_were_tried(made):
    out, found = made
    told = " ".join(found.summary().split())
    assert "ft: its settings were chosen from 3 trials by validation" in told and "optimistic" in told
    assert found.settings[0].chosen_on == "validation" and set(found.chosen) == {"ft"}
    page = (out / "compare.html").read_text()
    assert "chosen from 3 trials" in page and "log:1e-4:1e-1" in page


def test_called_again_it_does_nothing_and_another_search_is_refused(made, tiny_model, data):
    out, found = made
    before = {file: file.stat().st_mtime_ns for file in (out / "runs").rglob("*")}
    again = compare([FT, LP], model=tiny_model, data=data, out=out, **ASKED)
    assert {file: file.stat().st_mtime_ns for file in (out / "runs").rglob("*")} == before
    assert again.levels == found.levels and again.chosen == found.chosen
    for other in (
        {"search": [f"ft:{RATE}=log:1e-4:1"]},
        {"search": ["stages.finetune.lr=log:1e-4:1e-1"]},
        {"budget": "3min"},
    ):
        with pytest.raises(LuthierError, match="--search"):
            compare([FT, LP], model=tiny_model, data=data, out=out, **{**ASKED, **other})
    with pytest.raises(LuthierError, match="--search"):
        compare([FT, LP], model=tiny_model, data=data, out=out, seeds=2, metric="nll")
    with pytest.raises(LuthierError, match=r"--metric  must be what it was .* got accuracy\.  It was nll"):
        compare([FT, LP], model=tiny_model, data=data, out=out, **{**ASKED, "metric": "accuracy", "budget": 5})
    assert designed([FT, LP], model=tiny_model, data=data, out=out, **{**ASKED, "metric": None}).metric == "nll"


def test_a_recipe_that_is_added_with_a_search_while_a_worker_runs_is_searched_by_it_first(
    tiny_model, data, tmp_path, monkeypatch
):
    asked = {"model": tiny_model, "data": data, "out": tmp_path / "out", "metric": "nll", "seeds": 2}
    designed([LP], **asked)
    real, begun = workshop.one, []

    def one(desk, design, trial, *rest):
        begun.append((trial.name, design.recipe(trial).stages[-1].learning_rate))
        if len(begun) == 1:
            designed([LP, FT], **asked, search=[f"ft:{RATE}=one:0.5,0.25"], budget=2)
        real(desk, design, trial, *rest)

    monkeypatch.setattr(workshop, "one", one)
    assert work(tmp_path / "out") == len(begun) == 6
    [search] = searches(Desk(tmp_path / "out"), Design.load(tmp_path / "out"))
    rates = dict(begun)
    assert {rates["ft-search0"], rates["ft-search1"]} == {0.5, 0.25}
    assert {rates["ft-seed0"], rates["ft-seed1"]} == {search.winner["values"][RATE]}
    assert not (tmp_path / "out" / "earlier").exists()


def test_two_processes_share_a_search_and_do_no_run_twice(tiny_model, data, tmp_path):
    designed([FT], model=tiny_model, data=data, out=tmp_path / "out", **{**ASKED, "budget": 5})

    def worker():
        def narrator(trial):
            with (tmp_path / "done.txt").open("a") as file:
                file.write(f"{os.getpid()} {trial.name}\n")
            return Silent()

        work(tmp_path / "out", narrator=narrator)

    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            try:
                worker()
            except BaseException:
                os._exit(3)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    lines = [line.split() for line in (tmp_path / "done.txt").read_text().splitlines()]
    every = [f"ft-search{number}" for number in range(5)] + ["ft-seed0", "ft-seed1"]
    assert Counter(name for _, name in lines) == Counter(every)
    assert len({process for process, name in lines if "search" in name}) == 2
    assert sorted(run.name for run in (tmp_path / "out" / "runs").iterdir()) == every


def test_a_search_that_was_killed_in_a_run_goes_on_with_that_run(tiny_model, data, tmp_path):
    out = tmp_path / "out"
    designed([FT], model=tiny_model, data=data, out=out, **ASKED)
    killer = lambda trial: KillsItself(3) if trial.name == "ft-search1" else Silent()  # noqa: E731
    assert in_a_child(lambda: work(out, narrator=killer)) == 9
    [search] = searches(Desk(out), Design.load(out))
    asked = [one["values"] for one in search.told()]
    assert len(asked) == 2 and ["score" in one for one in search.told()] == [True, False]
    assert work(out) == 2 + 2  # what was left of the search, and the runs
    assert search.winner["tried"] == 3 and search.winner["failed"] == 0
    assert [one["values"] for one in search.told()][:2] == asked
    assert work(out) == 0


def test_everything_that_is_wrong_is_told_before_the_first_run(tiny_model, data, tmp_path, monkeypatch, capsys):
    asked = {"model": tiny_model, "data": data, "out": tmp_path / "out"}
    with pytest.raises(LuthierError, match="--budget  must come with --search"):
        compare([FT], **asked, budget=3)
    with pytest.raises(LuthierError, match="--budget  must be runs"):
        compare([FT], **asked, search=[f"{RATE}=log:1e-4:1"], budget="soon")
    words = [
        "compare",
        "-r",
        "ft",
        "-m",
        tiny_model,
        "-d",
        data,
        "-o",
        tmp_path / "out",
        "--search",
        "ft:stages.0.lr=log:1:0",
    ]
    monkeypatch.setattr(sys, "argv", ["luthier", *map(str, words), "--budget", "3"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2 and "LOW below HIGH" in capsys.readouterr().err
    with pytest.raises(LuthierError, match="4 faults in the comparison"):
        compare([FT], **asked, search=["lr=log:0:1", f"{RATE}=log:0:1", "ft:seed=int:0:9"])
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtra, match=r"luthier\[search\]"):
        compare([FT], **asked, search=[f"{RATE}=log:1e-4:1"])
    assert not (tmp_path / "out").exists()
