"""Start many, stop early, continue some: who pauses, who goes on, what it cost, and when an early look is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

import luthier
from luthier.call import Call
from luthier.errors import LuthierError
from luthier.narrate import Silent
from luthier.recipe.text import build
from luthier.training.stages import Paused, pause_step
from luthier.trials import early, work
from luthier.trials.comparing import compare
from luthier.trials.design import Asked, Design, Trial
from luthier.trials.desk import Desk
from luthier.trials.early import Early
from luthier.trials.spared import cost
from luthier.trials.watch import Watch
from tests.little import KillsItself, ended, forked, in_a_child, recipe, same, sentences, weights

BASE = [{"anneal": {"warmup": 0.1}}, "adamw", "clip"]
FT = dataclasses.replace(recipe(BASE, steps=6), name="ft")
LP_FT = dataclasses.replace(recipe(BASE, steps=6, probe=True), name="lp-ft")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("rows") / "data"
    folder.mkdir()
    rows = sentences(120)
    rows[:60].to_csv(folder / "train.csv", index=False)
    rows[60:80].to_csv(folder / "validation.csv", index=False)
    rows[80:].to_csv(folder / "test.csv", index=False)
    return str(folder)


# -- a run that pauses


def two_stages(*more, first: int = 4, second: int = 6, **of_first):
    one = {"name": "one", "steps": first, "lr": 1e-3, "batch_size": 8, "ingredients": ["adamw"], **of_first}
    two = {"name": "two", "steps": second, "lr": 1e-3, "batch_size": 8, "ingredients": ["adamw", *more]}
    return build({"name": "two", "max_length": 16, "stages": [one, two]}, inside="a test")


KINDS = {
    "inside the second stage of lp-ft": (LP_FT, 0.4),
    "with an average, which is looked at": (recipe([*BASE, {"swa": {"start": 0.2}}], steps=6), 0.5),
    "with the best of its evaluations": (recipe([*BASE, {"best": {"every": 1}}], steps=6), 0.5),
    "with lora": (recipe([{"lora": {"r": 2, "dropout": 0.1}}, *BASE], steps=6), 0.5),
    "inside the second of two trained stages": (two_stages("clip"), 0.7),
    "at the very end of the first of two trained stages": (two_stages("clip"), 0.4),
    "in the middle of an epoch, as in the end of one": (recipe(BASE, steps=20), 0.4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_paused_and_goes_on_is_to_the_bit_the_one_that_never_did(kind, tiny_model, data, tmp_path):
    """Dropout is 0.1 in the tiny model; adamw's moments and every curve are the same too."""
    made, share = KINDS[kind]
    whole = luthier.fit(made, model=tiny_model, data=data, out=tmp_path / "whole")
    with pytest.raises(Paused) as told:
        luthier.fit(made, model=tiny_model, data=data, out=tmp_path / "paused", pause_at=share)
    again = luthier.fit(made, model=tiny_model, data=data, out=tmp_path / "paused", resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "paused"))
    assert again.metrics == whole.metrics and again.curves == whole.curves
    assert [(one.steps, one.notes) for one in again.stages] == [(one.steps, one.notes) for one in whole.stages]
    written = json.loads((tmp_path / "paused" / "paused.json").read_text())
    steps = sum(one.steps for one in whole.stages)
    assert (
        (written["steps"], written["of"]) == (told.value.steps, told.value.whole) == (pause_step(share, steps), steps)
    )
    assert written["scores"] == told.value.score and written["share"] == share and written["seconds"] > 0


def test_the_score_of_a_pause_is_that_of_the_weights_it_stopped_with(tiny_model, data, tmp_path):
    """20 steps of 8 rows of 60: an epoch ends with step 8, which validates by itself."""
    with pytest.raises(Paused) as told:
        luthier.fit(recipe(BASE, steps=20), model=tiny_model, data=data, out=tmp_path / "run", pause_at=0.4)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 9))
    assert {f"validation_{name}": value for name, value in told.value.score.items()}.items() <= log[-1].items()


def test_a_run_killed_before_its_pause_was_written_down_does_not_take_a_step_more(tiny_model, data, tmp_path):
    for name in ("plain", "torn"):
        with pytest.raises(Paused):
            luthier.fit(LP_FT, model=tiny_model, data=data, out=tmp_path / name, pause_at=0.5)
    (tmp_path / "torn" / "paused.json").unlink()
    with pytest.raises(Paused):
        luthier.fit(LP_FT, model=tiny_model, data=data, out=tmp_path / "torn", pause_at=0.5, resume=True)
    one, other = (json.loads((tmp_path / name / "paused.json").read_text()) for name in ("plain", "torn"))
    assert one | {"seconds": 0} == other | {"seconds": 0} and one["steps"] == 3


def test_a_run_that_ends_before_its_pause_is_left_alone(tiny_model, data, tmp_path):
    made = recipe([*BASE, {"best": {"every": 1, "patience": 1}}], steps=20, lr=1e-12)  # never better than at first
    report = luthier.fit(made, model=tiny_model, data=data, out=tmp_path / "run", pause_at=0.5)
    assert report.stages[0].steps == 2 and not (tmp_path / "run" / "paused.json").exists()
    assert luthier.fit(made, model=tiny_model, data=data, out=tmp_path / "run", pause_at=0.05, resume=True).path


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_a_share_that_is_none_and_a_pause_without_a_folder_are_refused(share, tiny_model, data, tmp_path):
    with pytest.raises(LuthierError, match=r"pause_at must be in \(0, 1\)"):
        luthier.fit(FT, model=tiny_model, data=data, out=tmp_path / "run", pause_at=share)
    with pytest.raises(LuthierError, match="with out"):
        luthier.fit(FT, model=tiny_model, data=data, pause_at=0.5)
    assert not (tmp_path / "run").exists()


# -- who goes on: files alone decide


def a_design(*, start: int, share: float, keep: int, recipes=("ft",), metric: str | None = None) -> Design:
    more = {"early": {"start": start, "share": share, "keep": keep}}
    plain = {name: FT.to_dict() for name in recipes}
    seeds = tuple({"seed": number} for number in range(start))
    return Design(plain, (Asked("data", Call(model="m", data="d")),), seeds, metric, None, more)


def put(desk: Desk, trial: Trial, kind: str, value: float | None = None, **more) -> None:
    folder = desk.run(trial)
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "paused":
        told = {"share": 0.5, "steps": 3, "of": 6, "metric": "accuracy", "scores": {"accuracy": value, **more}}
        (folder / "paused.json").write_text(json.dumps(told))
    elif kind == "done":
        told = {"metric": "accuracy", "metrics": {"validation": {"accuracy": value}}, "seconds": 1.0}
        (folder / "report.json").write_text(json.dumps(told))
    else:
        desk.fail(trial, "it broke")


def names(turns) -> list[tuple[str, float | None]]:
    return [(trial.name, share) for trial, share in turns]


def test_every_run_is_brought_to_its_pause_before_one_goes_on(tmp_path):
    desk, design = Desk(tmp_path), a_design(start=3, share=0.5, keep=1)
    trials = design.trials()
    assert names(early.turns(desk, design)) == [("ft-seed0", 0.5), ("ft-seed1", 0.5), ("ft-seed2", 0.5)]
    put(desk, trials[0], "paused", 0.9)
    put(desk, trials[1], "paused", 0.8)
    assert names(early.turns(desk, design)) == [("ft-seed2", 0.5)]
    assert not early.stopped(desk, design) and not early.picked(desk, design)
    put(desk, trials[2], "paused", 0.7)
    assert names(early.turns(desk, design)) == [("ft-seed0", None)]
    assert early.stopped(desk, design) == set(trials[1:]) and early.picked(desk, design) == {trials[0]}
    put(desk, trials[0], "done", 0.5)  # worse than the others were: they stay stopped
    assert early.turns(desk, design) == [] and early.stopped(desk, design) == set(trials[1:])


def test_a_recipe_does_not_wait_for_another_recipe(tmp_path):
    desk, design = Desk(tmp_path), a_design(start=2, share=0.5, keep=1, recipes=("ft", "lora"))
    by = {trial.name: trial for trial in design.trials()}
    put(desk, by["ft-seed0"], "paused", 0.6)
    put(desk, by["ft-seed1"], "paused", 0.7)
    put(desk, by["lora-seed0"], "paused", 0.9)
    assert names(early.turns(desk, design)) == [("ft-seed1", None), ("lora-seed1", 0.5)]


def test_ties_go_to_the_lowest_seed_and_what_is_no_number_never_goes_on(tmp_path):
    """Accuracies .5, nan, .7, .7, .7 and a failed run; two of the three equal ones go on."""
    desk, design = Desk(tmp_path), a_design(start=6, share=0.5, keep=2)
    for trial, value in zip(design.trials(), [0.5, None, 0.7, 0.7, 0.7], strict=False):
        put(desk, trial, "paused", value)
    put(desk, design.trials()[5], "failed")
    assert names(early.turns(desk, design)) == [("ft-seed2", None), ("ft-seed3", None)]
    least = a_design(start=6, share=0.5, keep=6)  # one that asks for all gets all that have a score
    assert [name for name, _ in names(early.turns(desk, least))] == [f"ft-seed{seed}" for seed in (0, 2, 3, 4)]


def test_of_a_metric_that_should_be_small_the_smallest_go_on(tmp_path):
    desk, design = Desk(tmp_path), a_design(start=3, share=0.5, keep=2, metric="nll")
    for trial, nll in zip(design.trials(), [0.4, 0.9, 0.3], strict=True):
        put(desk, trial, "paused", 0.5, nll=nll)
    assert names(early.turns(desk, design)) == [("ft-seed0", None), ("ft-seed2", None)]


def test_one_that_fails_after_its_pause_keeps_its_place_and_one_that_ended_before_it_counts(tmp_path):
    desk, design = Desk(tmp_path), a_design(start=4, share=0.5, keep=2)
    trials = design.trials()
    put(desk, trials[0], "paused", 0.9)
    put(desk, trials[0], "failed")
    put(desk, trials[1], "paused", 0.7)
    put(desk, trials[2], "done", 0.8)
    put(desk, trials[3], "paused", 0.6)
    assert early.turns(desk, design) == []
    assert early.picked(desk, design) == {trials[0], trials[2]} and early.stopped(desk, design) == {
        trials[1],
        trials[3],
    }


def test_without_early_stopping_every_run_goes_to_its_end(tmp_path):
    desk, design = Desk(tmp_path), dataclasses.replace(a_design(start=3, share=0.5, keep=1), more={})
    trials = design.trials()
    put(desk, trials[0], "paused", 0.1)  # by hand, with fit
    put(desk, trials[1], "done", 0.1)
    put(desk, trials[2], "failed")
    assert names(early.turns(desk, design)) == [("ft-seed0", None)]
    assert not early.stopped(desk, design) and early.picked(desk, design) == set(trials) and cost(desk, design) == {}


# -- a whole comparison


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model, data):
    out = tmp_path_factory.mktemp("early") / "out"
    return out, compare([FT, LP_FT], model=tiny_model, data=data, out=out, early="start=4,share=0.5,keep=2")


def best_two(out: Path, name: str) -> list[str]:
    """By the files that the pauses left, counted here once more."""
    scores = {
        f"{name}-seed{seed}": json.loads((out / "runs" / f"{name}-seed{seed}" / "paused.json").read_text())
        for seed in range(4)
    }
    return sorted(scores, key=lambda run: -scores[run]["scores"]["accuracy"])[:2]


def test_the_best_go_on_and_only_they_and_end_as_if_they_had_never_paused(made, tiny_model, data, tmp_path):
    out, found = made
    for part in (FT, LP_FT):
        kept = best_two(out, part.name)
        rows = [row for row in found.trials if row.recipe == part.name]
        assert {row.name for row in rows if row.state == "done"} == set(kept)
        assert {row.state for row in rows if row.name not in kept} == {"stopped"}
        assert all(row.seconds > 0 and not row.scores for row in rows if row.state == "stopped")
        for row in rows:
            held = list((out / "runs" / row.name / "checkpoints").glob("stage-*"))
            assert bool(held) is (row.state == "stopped")  # from which fit --resume can finish it
        seed = int(kept[0][-1])
        luthier.fit(part, model=tiny_model, data=data, seed=seed, out=tmp_path / part.name)
        assert same(weights(tmp_path / part.name), weights(out / "runs" / kept[0]))


def test_a_stopped_run_can_be_finished_by_hand(made, tiny_model, data, tmp_path):
    out, found = made
    row = next(row for row in found.trials if row.state == "stopped" and row.recipe == "lp-ft")
    shutil.copytree(out / "runs" / row.name, tmp_path / "run")
    luthier.fit(LP_FT, model=tiny_model, data=data, seed=row.seeds["seed"], out=tmp_path / "run", resume=True)
    luthier.fit(LP_FT, model=tiny_model, data=data, seed=row.seeds["seed"], out=tmp_path / "whole")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_cost_is_counted_from_what_was_done(made):
    """4 start, 3 of 6 steps each, 2 go on for 3 more: 4 x 3 + 2 x 3 = 18 of 24 steps, 3 full runs = 4 x .5 + 2 x .5."""
    _, found = made
    wanted = {
        "started": 4,
        "share": 0.5,
        "kept": 2,
        "steps_taken": 18,
        "steps_full": 24,
        "saved": 0.25,
        "runs_equivalent": 3.0,
    }
    assert found.early == {"ft": wanted, "lp-ft": wanted}


def test_of_runs_that_were_chosen_nothing_is_claimed(made):
    out, found = made
    assert {level.seeds for level in found.levels} == {2}
    common = {run[-1] for run in best_two(out, "ft")} & {run[-1] for run in best_two(out, "lp-ft")}
    assert len(found.versus) == (1 if len(common) == 2 else 0)
    assert not any(pair.claimed for pair in found.versus)
    told = "nothing is claimed of lp-ft and ft" if len(common) == 2 else "lp-ft and ft cannot be paired"
    assert len(found.outcome) == 1 and found.outcome[0].startswith(told)
    assert found.notes[0].startswith(
        "levels are of the best 2 of 4 runs of each recipe by accuracy on validation at 50 %"
    )
    assert {one.chosen_on for one in found.settings} == {"validation"}
    assert found.best_of == {"data": {}} and "no random sample" in found.summary()
    assert (out / "compare.html").is_file()


def test_a_second_call_does_nothing_more_and_another_early_stop_is_refused(made, tiny_model, data, monkeypatch):
    out, found = made
    monkeypatch.setattr(work, "fit", None)
    again = compare([FT, LP_FT], model=tiny_model, data=data, out=out, early="start=4,share=0.5,keep=2")
    assert dataclasses.asdict(again) == dataclasses.asdict(found)
    for other in ({"early": "start=4,share=0.5,keep=3"}, {"seeds": 4}):
        with pytest.raises(LuthierError, match="must be what it was when this comparison began"):
            compare([FT, LP_FT], model=tiny_model, data=data, out=out, **other)
    with pytest.raises(LuthierError, match="--metric  must be what it was"):  # by which other runs would go on
        compare([FT, LP_FT], model=tiny_model, data=data, out=out, early="start=4,share=0.5,keep=2", metric="nll")


def scripted(monkeypatch, values: dict[int, float]) -> None:
    """Runs pause with the accuracies of ``values`` by seed, whatever they learned."""
    plain = work.fit

    def fit(part, **told):
        try:
            return plain(part, **told)
        finally:
            file = Path(told["out"]) / "paused.json"
            if told["pause_at"] is not None and file.is_file():
                written = json.loads(file.read_text())
                written["scores"]["accuracy"] = values[part.seed]
                file.write_text(json.dumps(written))

    monkeypatch.setattr(work, "fit", fit)


def test_validation_chooses_and_recipes_with_the_same_seeds_are_told_side_by_side(
    tiny_model, data, tmp_path, monkeypatch
):
    """By .2 .9 .4 .8 seeds 1 and 3 go on, of both recipes: a difference over two seeds, of which nothing is claimed."""
    scripted(monkeypatch, {0: 0.2, 1: 0.9, 2: 0.4, 3: 0.8})
    more = {"model": tiny_model, "data": data, "out": tmp_path / "out", "early": "start=4,share=0.34,keep=2"}
    found = compare([FT, LP_FT], **more)
    assert [row.name for row in found.trials if row.state == "done"] == [
        "ft-seed1",
        "lp-ft-seed1",
        "ft-seed3",
        "lp-ft-seed3",
    ]
    (pair,) = found.versus
    scores = {row.name: row.scores["test"]["accuracy"] for row in found.trials if row.state == "done"}
    apart = [scores[f"lp-ft-seed{seed}"] - scores[f"ft-seed{seed}"] for seed in (1, 3)]
    assert pair.by_seed == pytest.approx(apart) and pair.value == pytest.approx(sum(apart) / 2)
    assert not pair.claimed and (pair.p, pair.test, pair.low, pair.high) == (1.0, "none", pair.value, pair.value)
    assert "over the 2 seeds that both kept" in pair.sentence and "no random sample of seeds" in pair.sentence
    assert found.early["ft"]["steps_taken"] == 4 * 3 + 2 * 3  # .34 of 6 steps is over with the third


def test_one_seed_in_common_is_no_pair(tiny_model, data, tmp_path, monkeypatch):
    scripted(monkeypatch, {0: 0.2, 1: 0.9})
    found = compare([FT, LP_FT], model=tiny_model, data=data, out=tmp_path / "out", early="start=2,share=0.5,keep=1")
    assert found.versus == ()
    assert found.outcome == ("lp-ft and ft cannot be paired: the runs that they kept have 1 seed in common",)


def begun(folder: Path, tiny_model, data, spec: str = "start=4,share=0.5,keep=2") -> Desk:
    """A comparison that is designed and not done."""
    from luthier.trials.comparing import designed

    designed([FT], model=str(tiny_model), data=data, out=folder, early=spec)
    return Desk(folder)


def test_two_processes_that_share_the_folder_finish_the_same_runs(tiny_model, data, tmp_path):
    alone, shared = begun(tmp_path / "alone", tiny_model, data), begun(tmp_path / "shared", tiny_model, data)
    work.work(alone.path)
    other = forked(lambda: work.work(shared.path))
    work.work(shared.path)
    assert ended(other) == 0
    design = Design.load(shared.path)
    assert early.stopped(shared, design) == early.stopped(alone, design) and len(early.stopped(alone, design)) == 2
    for trial in early.picked(alone, design):
        assert same(weights(alone.run(trial)), weights(shared.run(trial)))


def test_a_comparison_killed_while_the_best_go_on_goes_on_with_them(tiny_model, data, tmp_path):
    whole, killed = begun(tmp_path / "whole", tiny_model, data), begun(tmp_path / "killed", tiny_model, data)
    work.work(whole.path)
    design = Design.load(killed.path)

    def says(trial: Trial) -> Silent:
        return KillsItself(2) if killed.paused(trial) else Silent()

    assert in_a_child(lambda: work.work(killed.path, narrator=says)) == 9
    assert len(early.picked(killed, design)) == 2 and not any(killed.done(trial) for trial in design.trials())
    assert work.work(killed.path) == 2
    assert early.stopped(killed, design) == early.stopped(whole, design)
    for trial in early.picked(whole, design):
        assert same(weights(whole.run(trial)), weights(killed.run(trial)))
    assert cost(killed, design) == cost(whole, design)


def test_a_watch_tells_that_runs_were_stopped_and_then_that_all_is_over(tiny_model, data, tmp_path):
    desk = begun(tmp_path / "out", tiny_model, data, "start=2,share=0.5,keep=1")
    watch = Watch(desk, Design.load(desk.path))
    work.work(desk.path)
    lines = list(watch.news())
    assert len(lines) == 2 and sum("stopped early" in line for line in lines) == 1 and watch.over


def test_off_by_default_and_then_nothing_is_different(tiny_model, data, tmp_path):
    found = compare([FT], model=tiny_model, data=data, out=tmp_path / "out", seeds=2)
    assert Design.load(tmp_path / "out").more == {} and found.early == {}
    assert [row.state for row in found.trials] == ["done", "done"]
    assert not list((tmp_path / "out").rglob("paused.json"))
    assert len(found.best_of["data"]["ft"]) == 2 and not any("random sample" in note for note in found.notes)


# -- what is refused, before the first run


@pytest.mark.parametrize(
    ("told", "wrong"),
    [
        ("start=4,share=0.5,keep=5", ["keep"]),
        ("start=4,share=1,keep=2", ["share"]),
        ("start=0,share=0,keep=0", ["start", "share", "keep"]),
        ("start=4,share=0.5", ["keep"]),
        ("start=four,share=inf,keep=1.5,stop=2", ["stop", "start", "share", "keep"]),
    ],
)
def test_numbers_that_cannot_be_are_told_all_at_once(told, wrong):
    with pytest.raises(LuthierError) as error:
        Early.read(told)
    assert [fault.where for fault in error.value.faults] == wrong


def test_a_search_other_seeds_and_streams_that_vary_cannot_be_beside_it(tiny_model, data, tmp_path):
    spec = {"model": tiny_model, "data": data, "out": tmp_path / "out", "early": "start=4,share=0.5,keep=2"}
    with pytest.raises(LuthierError, match="3 faults") as error:
        compare([FT], seeds=5, vary=["head"], search=["stages.finetune.lr=log:1e-5:1e-3"], **spec)
    assert [fault.where for fault in error.value.faults] == ["--search", "--vary", "--seeds"]
    assert not (tmp_path / "out").exists()


def rows_of(part, share: float, tiny_model, data) -> list[str]:
    """Why runs of ``part`` cannot be chosen among at ``share``."""
    from luthier.training.job import prepare
    from luthier.trials.misleading import misleads

    faults = misleads(prepare(part, model=str(tiny_model), data_source=data).plan, share)
    assert all(fault.do for fault in faults)
    return [fault.must for fault in faults]


RISES, SLEEPS = "past the rise of its rate", "all its weights awake"
AVERAGES, GONE, SHORT = "begun its average", "a stage whose weights go on", "needs steps after the pause"
PLANS = {
    "a warm-up that is over": (recipe(BASE, steps=20), 0.2, []),
    "a warm-up that is not": (recipe([{"anneal": {"warmup": 0.3}}, "adamw"], steps=20), 0.2, [RISES]),
    "a warm-up whose highest rate is the next step's": (recipe(BASE, steps=20), 0.1, [RISES]),
    "a warm-up whose highest rate was the last step's": (recipe(BASE, steps=20), 0.15, []),
    "one-cycle, still rising": (recipe([{"anneal": {"shape": "one-cycle"}}], steps=20), 0.3, [RISES]),
    "one-cycle, past its rise": (recipe([{"anneal": {"shape": "one-cycle"}}], steps=20), 0.35, []),
    "slanted, still rising": (recipe([{"anneal": {"shape": "slanted"}}], steps=40), 0.05, [RISES]),
    "a constant rate": (recipe(["adamw"], steps=20), 0.05, []),
    "gradual unfreezing under way": (recipe([{"thaw": {"bands": 2, "restart": False}}], steps=20), 0.3, [SLEEPS]),
    "gradual unfreezing over": (recipe([{"thaw": {"bands": 2, "restart": False}}], steps=20), 0.6, []),
    "chain-thaw just before all learn": (
        recipe([{"thaw": {"order": "chain", "bands": 2, "restart": False}}], steps=20), 0.5, [SLEEPS],
    ),
    "blocks that take turns": (recipe([{"lisa": {"layers": 1, "every": 2}}], steps=20), 0.25, []),
    "an average that begins after the pause": (recipe([{"swa": {"start": 0.5}}], steps=20), 0.4, [AVERAGES]),
    "an average whose first snapshot is the pause's": (recipe([{"swa": {"start": 0.5}}], steps=20), 0.55, []),
    "an average over the whole stage": (recipe([{"ema": {"decay": 0.5}}], steps=20), 0.1, []),
    "an average of rare snapshots": (recipe([{"ema": {"every": 5}}], steps=20), 0.2, [AVERAGES]),
    "an average in a later stage": (two_stages("ema"), 0.3, [AVERAGES]),
    "a stage whose weights do not go on": (two_stages(carry=["head"]), 0.3, [GONE]),
    "the stage after one whose weights do not go on": (two_stages(carry=["head"]), 0.5, []),
    "a stage before more weights learn": (
        two_stages(ingredients=[{"freeze": {"keep": ["head"]}}, "adamw"]), 0.3, [SLEEPS],
    ),
    "two stages that train all": (two_stages(), 0.3, []),
    "a probe, which takes no steps, and a pause after it": (recipe(BASE, steps=20, probe=True), 0.2, []),
    "a run of too few steps": (recipe(["adamw"], steps=2), 0.7, [SHORT]),
}  # fmt: skip


@pytest.mark.parametrize("plan", PLANS)
def test_where_an_early_look_misleads_it_is_refused_and_else_not(plan, tiny_model, data):
    part, share, wanted = PLANS[plan]
    told = rows_of(part, share, tiny_model, data)
    assert len(told) == len(wanted), told
    assert all(word in one for word, one in zip(wanted, told, strict=True))


def test_every_recipe_that_misleads_is_named_before_the_first_run(tiny_model, data, tmp_path):
    slow = dataclasses.replace(recipe([{"anneal": {"warmup": 0.9}}, {"swa": {"start": 0.9}}], steps=6), name="slow")
    lone = build({"name": "lp", "max_length": 16, "stages": [LP_FT.to_dict()["stages"][0]]}, inside="a test")
    with pytest.raises(LuthierError, match="3 faults") as error:
        compare([FT, slow, lone], model=tiny_model, data=data, out=tmp_path / "out", early="start=3,share=0.5,keep=1")
    assert [fault.where.partition(":")[0] for fault in error.value.faults] == ["slow", "slow", "lp"]
    assert not (tmp_path / "out" / "runs").exists() and not (tmp_path / "out" / "design.json").exists()


def test_without_validation_rows_there_is_nothing_to_choose_by(tiny_model, data):
    from luthier.training.job import prepare
    from luthier.trials.misleading import misleads

    plan = prepare(FT, model=str(tiny_model), data_source=data).plan
    assert [fault.must for fault in misleads(plan, 0.5, validation=False)] == ["needs validation rows to choose by"]
