"""Runs beyond this process: on Ray and through submitit, both on this machine, and what is refused before they begin."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

import luthier
from luthier.errors import LuthierError, MissingExtra
from luthier.trials.comparing import compare
from luthier.trials.places import Place, parameters
from luthier.trials.ray_jobs import shares
from luthier.trials.slurm_jobs import Jobs, Worker, prefixed
from tests.little import recipe, same, sentences, weights

BASE = [{"anneal": {"warmup": 0.2}}, "adamw", "clip"]
LONG = dataclasses.replace(recipe(BASE, steps=150), name="long")


@pytest.fixture
def data(tmp_path):
    sentences(80).to_csv(tmp_path / "rows.csv", index=False)
    return str(tmp_path / "rows.csv")


def strike(out: Path, name: str, number: int) -> threading.Thread:
    """Sends the signal ``number`` to the process that has the run ``name``, once it has saved some steps; the lock file names it."""

    def wait() -> None:
        saved, latest = out / "runs" / name / "checkpoints", time.monotonic() + 60
        while time.monotonic() < latest and not list(saved.glob("stage-0-step-*[5-9]")):
            time.sleep(0.005)
        os.kill(int((out / "locks" / f"{name}.lock").read_text().splitlines()[-1].split()[1]), number)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def steps_of(run: Path) -> list[int]:
    return [one["step"] for one in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "loss" in one]


@pytest.mark.slow
def test_on_ray_a_killed_worker_is_started_again_and_every_run_ends_on_the_same_bits(
    tiny_model, data, tmp_path, monkeypatch
):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False)
    out = tmp_path / "out"
    try:
        struck = strike(out, "long-seed0", signal.SIGKILL)
        found = compare([LONG], model=tiny_model, data=data, out=out, seeds=2, workers=1, on="ray", save_every=1)
        struck.join()
        assert ray.is_initialized()  # what was there before stays
    finally:
        ray.shutdown()
    assert [row.state for row in found.trials] == ["done", "done"]
    lock = (out / "locks" / "long-seed0.lock").read_text().splitlines()
    assert len(lock) == 1 and lock[0].endswith(" nothing")  # the start of the one that was killed, and no other
    for seed in range(2):
        run = out / "runs" / f"long-seed{seed}"
        luthier.fit(LONG, model=tiny_model, data=data, out=tmp_path / f"whole{seed}", seed=seed)
        assert same(weights(run), weights(tmp_path / f"whole{seed}"))
        assert steps_of(run) == list(range(1, 151))


@pytest.mark.slow
def test_on_ray_ctrl_c_asks_the_workers_to_save_and_goes_on_in_any_other_place(tiny_model, data, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ray.init(num_cpus=1, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False)
    out, longer = tmp_path / "out", dataclasses.replace(recipe(BASE, steps=1500), name="longer")
    log = out / "runs" / "longer-seed0" / "log.jsonl"

    def interrupt() -> None:
        while not log.exists() or log.read_bytes().count(b'"learning_rate"') < 20:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(luthier.training.stages.Stopped, match="the same command goes on from there"):
            compare([longer], model=tiny_model, data=data, out=out, seeds=1, on="ray")
    finally:
        ray.shutdown()
    taken = steps_of(log.parent)
    assert 20 <= len(taken) < 1500
    assert (log.parent / "checkpoints" / f"stage-0-step-{len(taken):08d}").is_dir()  # nothing is lost
    assert (out / "locks" / "longer-seed0.lock").read_text() == ""


@pytest.mark.slow
def test_a_job_of_submitit_that_is_preempted_is_queued_again_and_goes_on_to_the_same_bits(
    tiny_model, data, tmp_path, monkeypatch
):
    pytest.importorskip("submitit")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "out"
    struck = strike(out, "long-seed0", signal.SIGUSR2)  # what Slurm sends before a time limit
    place = {"cluster": "local", "timeout_min": 5}
    found = compare([LONG], model=tiny_model, data=data, out=out, seeds=1, on="slurm", slurm=place, save_every=1)
    struck.join()
    assert [row.state for row in found.trials] == ["done"]
    assert (out / "locks" / "long-seed0.lock").read_text() == ""  # it let go of the run by itself
    said = "".join(file.read_text() for file in (out / "slurm").glob("*_log.*"))
    assert "Requeued job" in said
    run = out / "runs" / "long-seed0"
    assert steps_of(run) == list(range(1, 151))
    luthier.fit(LONG, model=tiny_model, data=data, out=tmp_path / "whole", seed=0)
    assert same(weights(run), weights(tmp_path / "whole"))


def test_a_worker_of_ray_gets_a_share_that_fits_on_one_node():
    big, small = ({"Alive": True, "Resources": {"CPU": cpus, "GPU": 2.0}} for cpus in (16.0, 4.0))
    dead = {"Alive": False, "Resources": {"CPU": 1.0}}
    head = {"Alive": True, "Resources": {}}  # a node that does no work
    assert shares([big, small, dead, head], 2) == (4, 1.0)  # 20 / 2 = 10 would not fit on the small one
    assert shares([big, small], 8) == (2, 0.5)  # 20 / 8 = 2.5
    assert shares([small], 9) == (1, round(2 / 9, 4))  # five of them wait
    assert shares([{"Alive": True, "Resources": {"CPU": 2.0}}], 1) == (2, 0.0)


def test_a_job_is_told_again_what_it_was_told():
    pytest.importorskip("submitit")
    worker = Worker("a/folder", 7)
    again = worker.checkpoint()
    assert again.function == worker == pickle.loads(pickle.dumps(worker)) and again.args == ()


def test_parameters_of_a_job_have_the_names_that_submitit_has_for_them(tmp_path):
    submitit = pytest.importorskip("submitit")
    told = parameters(
        ["partition=gpu", "timeout_min=90", "gpus_per_node=1", "exclude=node1", 'setup=["module load x"]']
    )
    named = prefixed(told)
    assert named == {
        "slurm_partition": "gpu", "timeout_min": 90, "gpus_per_node": 1, "slurm_exclude": "node1", "slurm_setup": ["module load x"],
    }  # fmt: skip
    submitit.AutoExecutor(tmp_path, cluster="local").update_parameters(**named)  # refuses none of them
    with pytest.raises(LuthierError, match="Unknown argument 'colour' for executor 'slurm'"):
        Jobs(tmp_path / "out", Place("slurm", slurm={"cluster": "local", "colour": "red"}))
    with pytest.raises(LuthierError, match="timeout_min"):
        Jobs(tmp_path / "out", Place("slurm", slurm={"cluster": "local", "timeout_min": "long"}))
    with pytest.raises(LuthierError, match="--slurm partition: must be KEY=VALUE"):
        parameters(["partition"])


@pytest.mark.parametrize(("on", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_package_that_is_missing_is_named_before_anything_is_written(on, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf'--on {on} needs {package}.  pip install "luthier\[{on}\]"'):
        compare(["ft"], model="nowhere", data="nothing.csv", out=tmp_path / "out", on=on)
    assert not (tmp_path / "out").exists()


def test_places_that_are_none_are_refused_at_once(tmp_path, monkeypatch):
    with pytest.raises(LuthierError) as caught:
        compare(["ft"], model="no", out=tmp_path / "out", on="slrm", workers=0, slurm={"partition": "gpu"})  # type: ignore[arg-type]
    told = str(caught.value)
    assert "--on  must be of local, ray, slurm; got slrm.  Did you mean 'slurm'?" in told
    assert "--workers  must be 1 or more; got 0." in told and "--slurm  needs --on slurm; got partition." in told
    pytest.importorskip("submitit")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(LuthierError, match="needs sbatch"):
        Place("slurm").check()
    Place("slurm", slurm={"cluster": "local"}).check()
    assert not (tmp_path / "out").exists()
