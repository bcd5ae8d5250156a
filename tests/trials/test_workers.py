"""Many processes on one folder: no run is done twice, none is lost, and who is killed or asked to stop loses next to nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

import luthier
from luthier import checkpoint
from luthier.errors import LuthierError
from luthier.folder import RunFolder
from luthier.narrate import Silent
from luthier.training.stages import Stopped
from luthier.trials.comparing import compare, designed, finish, gather, jobs
from luthier.trials.design import Asked, Design, Trial
from luthier.trials.desk import MOST_STARTS, Desk
from luthier.trials.places import Place
from luthier.trials.watch import Watch
from luthier.trials.work import work
from luthier.trials.workers import led
from tests.little import KillsItself, in_a_child, recipe, same, sentences, weights

BASE = [{"anneal": {"warmup": 0.2}}, "adamw", "clip"]
FT = dataclasses.replace(recipe(BASE, steps=6), name="ft")
LP_FT = dataclasses.replace(recipe(BASE, steps=6, probe=True), name="lp-ft")
LONG = dataclasses.replace(recipe(BASE, steps=300), name="long")


def trial(name: str) -> Trial:
    return Trial("data", name, (("seed", 0),), f"{name}-seed0")


@pytest.fixture
def data(tmp_path):
    sentences(80).to_csv(tmp_path / "rows.csv", index=False)
    return str(tmp_path / "rows.csv")


def forked(many: int, do: Callable[[int], Any]) -> list[int]:
    """``do(number)`` in ``many`` processes at once; how each ended: 0, or less where a signal ended it."""
    children = []
    for number in range(many):
        child = os.fork()
        if child == 0:
            try:
                do(number)
            except BaseException:
                os._exit(3)
            os._exit(0)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@contextlib.contextmanager
def by_itself(place: Path):
    """Leaves ``place``.two where another process is inside for the same ``place``."""
    try:
        place.touch(exist_ok=False)
    except FileExistsError:
        place.with_name(f"{place.name}.two").touch()
    time.sleep(0.001)
    yield
    place.unlink()


def test_of_many_processes_each_run_has_one_and_is_done_once_also_when_some_are_killed(tmp_path):
    """Twelve runs, eight processes that let go of a run twice before it is done, two of them killed with one, and a looker-on."""
    desk, runs = Desk(tmp_path), [trial(f"run{number}") for number in range(12)]
    (tmp_path / "inside").mkdir()

    def do(number: int) -> None:
        draw = Random(number)
        while any(not desk.done(one) for one in runs):
            one = draw.choice(runs)
            if number == 8:  # only looks
                desk.state(one)
                continue
            with desk.claimed(one) as mine:
                if not mine:
                    continue
                if number < 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                with by_itself(tmp_path / "inside" / one.name):
                    with (tmp_path / f"{one.name}.turns").open("a") as turns:
                        turns.write(f"{number}\n")
                    if (tmp_path / f"{one.name}.turns").read_text().count("\n") == 3:
                        desk.run(one).mkdir(parents=True)
                        (desk.run(one) / "report.json").write_text("{}")

    assert forked(9, do) == [-signal.SIGKILL, -signal.SIGKILL, *[0] * 7]
    assert not list((tmp_path / "inside").glob("*.two"))
    assert [(tmp_path / f"{one.name}.turns").read_text().count("\n") for one in runs] == [3] * 12
    assert all(desk.state(one) == "done" for one in runs) and not (tmp_path / "failures").exists()


def test_a_run_folder_that_many_processes_open_and_close_never_has_two(tmp_path):
    """Who closes a folder removes its lock file, which another may have opened just before."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "environment.json").write_text(json.dumps({"identity": {}}))

    def do(number: int) -> None:
        taken = 0
        while taken < 60:
            try:
                folder = RunFolder(tmp_path / "run", resume=True, identity={})
            except LuthierError:
                continue
            with by_itself(tmp_path / "inside"):
                taken += 1
            folder.close()

    assert forked(5, do) == [0] * 5
    assert not list(tmp_path.glob("*.two"))
    assert sorted(one.name for one in (tmp_path / "run").iterdir()) == ["environment.json"]


def test_a_run_that_takes_down_its_process_again_and_again_has_failed_unless_it_gets_further(tmp_path):
    desk, stuck, moving = Desk(tmp_path), trial("stuck"), trial("moving")

    def dies(one: Trial) -> None:
        with desk.claimed(one) as mine:
            if mine:
                os.kill(os.getpid(), signal.SIGKILL)

    for turn in range(MOST_STARTS + 2):
        in_a_child(lambda: dies(stuck))
        assert in_a_child(lambda: dies(moving)) == signal.SIGKILL
        (desk.run(moving) / "checkpoints" / f"stage-0-step-{turn:08d}").mkdir(parents=True)
    assert desk.state(stuck) == "failed" and "ended from outside 3 times" in str(desk.failure(stuck))
    assert desk.state(moving) == "open"
    desk.forgive(stuck)
    with desk.claimed(stuck) as mine:
        assert mine
        held = (tmp_path / "locks" / "stuck-seed0.lock").read_text()
        desk.forgive(stuck)  # of a run that is under way nothing is forgotten
        assert (tmp_path / "locks" / "stuck-seed0.lock").read_text() == held != ""
    assert desk.state(stuck) == "open"


def test_two_processes_on_one_folder_do_all_runs_and_none_twice(tiny_model, data, tmp_path):
    design = designed([FT, LP_FT], model=tiny_model, data=data, out=tmp_path / "out", seeds=2)
    told = tmp_path / "told"
    told.mkdir()
    assert forked(2, lambda number: (told / str(number)).write_text(str(work(tmp_path / "out")))) == [0, 0]
    assert sum(int(each.read_text()) for each in told.iterdir()) == len(design.trials()) == 4
    found = gather(tmp_path / "out")
    assert {row.state for row in found.trials} == {"done"}
    for one in design.trials():
        lines = (tmp_path / "out" / "runs" / one.name / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert work(tmp_path / "out") == 0


def test_what_a_killed_worker_had_is_taken_up_with_one_step_lost_and_ends_on_the_same_bits(tiny_model, data, tmp_path):
    out = tmp_path / "out"
    designed([FT], model=tiny_model, data=data, out=out, seeds=1)
    luthier.fit(FT, model=tiny_model, data=data, out=tmp_path / "whole", seed=0)
    dying = KillsItself(10)
    assert in_a_child(lambda: work(out, narrator=lambda trial: dying, save_every=1)) == signal.SIGKILL
    run = out / "runs" / "ft-seed0"
    taken = sum("loss" in json.loads(line) for line in (run / "log.jsonl").read_text().splitlines())
    _, step = checkpoint.latest(run / "checkpoints")
    assert step is not None and step.step is not None and 1 < taken < 6
    assert taken - step.step == 1
    assert work(out) == 1
    assert same(weights(run), weights(tmp_path / "whole"))


def test_checkpoints_take_their_share_of_the_time_and_change_no_bit(tiny_model, data, tmp_path, monkeypatch):
    saved: list[int | None] = []
    real = checkpoint.save

    def counted(folder: Path, state: Any, *, stage: int, step: int | None) -> Any:
        saved.append(step)
        return real(folder, state, stage=stage, step=step)

    monkeypatch.setattr(checkpoint, "save", counted)
    for share, steps in ((1e9, [1, 2, 3, 4, 5]), (1e-9, [1]), (None, [])):  # all of the time, none of it, two minutes
        saved.clear()
        luthier.fit(FT, model=tiny_model, data=data, seed=0, out=tmp_path / str(share), save_share=share)
        assert saved == [*steps, None]
    assert same(weights(tmp_path / "1000000000.0"), weights(tmp_path / "None"))


class Says(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str = "") -> None:
        self.lines.append(text)


class FakeCrew:
    """Is interrupted, as by Ctrl-C, at its third look; again, if so told, while it is waited for."""

    every = 0.0

    def __init__(self, *, again: bool) -> None:
        self.did: list[str] = []
        self._again, self._looks = again, 0

    def start(self) -> None:
        self.did.append("start")

    def over(self) -> bool:
        self._looks += 1
        if self._looks == 3 or (self._again and self._looks == 5):
            signal.raise_signal(signal.SIGTERM if self._looks == 3 else signal.SIGINT)
        return self._looks > 6

    def ask(self) -> None:
        self.did.append("ask")

    def end(self) -> None:
        self.did.append("end")

    def said(self) -> str:
        return "nothing"


@pytest.mark.parametrize(("again", "error"), [(False, Stopped), (True, KeyboardInterrupt)])
def test_a_crew_is_asked_to_stop_once_and_ended_at_once_the_second_time(again, error, tmp_path):
    design = Design({"ft": {}}, (Asked("data", luthier.call.Call()),), ({"seed": 0},))
    crew, says = FakeCrew(again=again), Says()
    with pytest.raises(error) as caught:
        led(crew, Watch(Desk(tmp_path), design), says)
    assert crew.did == ["start", "ask", "end"]
    assert crew._looks == (5 if again else 7)  # it was waited for, or not
    assert says.lines == ["stopping: the workers save what they have (once more to stop at once)"]
    assert again or "the same command goes on from there" in str(caught.value)


def test_workers_that_end_with_runs_left_are_told_of(tmp_path):
    crew = FakeCrew(again=False)
    crew._looks = 6
    design = Design({"ft": {}}, (Asked("data", luthier.call.Call()),), ({"seed": 0}, {"seed": 1}))
    with pytest.raises(LuthierError, match="the workers ended with 2 runs left.  nothing"):
        led(crew, Watch(Desk(tmp_path), design), Silent())


def test_ctrl_c_in_this_process_saves_and_the_same_call_goes_on_to_the_same_bits(tiny_model, data, tmp_path):
    out, say = tmp_path / "out", Says()
    design = designed([LONG], model=tiny_model, data=data, out=out, seeds=1)

    def interrupt() -> None:
        log = out / "runs" / "long-seed0" / "log.jsonl"
        while not log.exists() or log.read_bytes().count(b"\n") < 5:
            time.sleep(0.01)
        os.kill(os.getppid(), signal.SIGINT)

    child = os.fork()
    if child == 0:
        interrupt()
        os._exit(0)
    with pytest.raises(Stopped, match="the same command goes on from there"):
        finish(Desk(out), design, say, Place())
    os.waitpid(child, 0)
    assert any(line.startswith("stopping after this step") for line in say.lines)
    assert Desk(out).state(design.trials()[0]) == "open"
    assert (out / "locks" / "long-seed0.lock").read_text() == ""  # it was asked, not killed
    compare([LONG], model=tiny_model, data=data, out=out, seeds=1)
    luthier.fit(LONG, model=tiny_model, data=data, out=tmp_path / "whole", seed=0)
    assert same(weights(out / "runs" / "long-seed0"), weights(tmp_path / "whole"))


def shell(line: str, **more: Any) -> subprocess.Popen[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    told = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, shell=True, text=True, stdout=-1, stderr=-1, env=told, **more)


@pytest.mark.slow
def test_printed_jobs_run_by_a_shell_do_each_run_once(tiny_model, data, tmp_path):
    (tmp_path / "ft.yaml").write_text(luthier.recipe.text.write(FT))
    out = tmp_path / "a folder"
    asked = shell(
        f"luthier compare -r '{tmp_path}/ft.yaml' -m '{tiny_model}' -d '{data}' --seeds 2 --out '{out}' --print-jobs"
    )
    printed, said = asked.communicate(timeout=120)
    assert asked.returncode == 0, said
    assert printed.splitlines() == [f"luthier work '{out}' ft-seed{seed}" for seed in range(2)]
    assert f"luthier gather '{out}'" in said and not (out / "runs").exists()
    all_at_once = [shell(line) for line in [*printed.splitlines(), printed.splitlines()[0]]]
    answers = [one.communicate(timeout=120) for one in all_at_once]
    assert [one.returncode for one in all_at_once] == [0, 0, 0], answers
    done = [int(re.match(r"(\d) runs done here", answer[0])[1]) for answer in answers]  # type: ignore[index]
    assert sum(done) == 2 and done[1] == 1
    told = shell(f"luthier gather '{out}'")
    page, _ = told.communicate(timeout=120)
    assert told.returncode == 0 and "compare.html" in page and (out / "comparison.json").is_file()
    assert jobs(out, Design.load(out)) == []


@pytest.mark.slow
def test_ctrl_c_of_a_parent_with_workers_saves_their_runs_and_the_same_command_goes_on(tiny_model, data, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "long.yaml").write_text(luthier.recipe.text.write(LONG))
    parent = shell(
        f"exec luthier compare -r '{tmp_path}/long.yaml' -m '{tiny_model}' -d '{data}' --seeds 2 --out '{out}' --workers 2",
        start_new_session=True,
    )
    logs = [out / "runs" / f"long-seed{seed}" / "log.jsonl" for seed in range(2)]
    latest = time.monotonic() + 120
    while not all(log.exists() and log.read_bytes().count(b"\n") > 5 for log in logs) and time.monotonic() < latest:
        time.sleep(0.01)
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal does
    said = parent.communicate(timeout=120)
    assert parent.returncode == 1, said
    assert "once more to stop at once" in said[0] and "the same command goes on from there" in said[1]
    desk = Desk(out)
    for one in Design.load(out).trials():
        assert desk.state(one) == "open"
        taken = sum("loss" in json.loads(line) for line in (desk.run(one) / "log.jsonl").read_text().splitlines())
        _, step = checkpoint.latest(desk.run(one) / "checkpoints")
        assert step is not None and step.step == taken  # nothing is lost
    compare([LONG], model=tiny_model, data=data, out=out, seeds=2)
    luthier.fit(LONG, model=tiny_model, data=data, out=tmp_path / "whole", seed=1)
    assert same(weights(out / "runs" / "long-seed1"), weights(tmp_path / "whole"))
