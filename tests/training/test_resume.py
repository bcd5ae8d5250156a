"""A run that is killed at any moment and gone on with ends on the same bits as one that was left alone."""

from __future__ import annotations

import json
import random
import shutil
import signal
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

import luthier
from luthier import checkpoint
from luthier.errors import LuthierError, RunError
from luthier.recipe.text import build
from luthier.training.stages import Stopped
from tests.little import Asks, Counts, KillsItself, in_a_child, recipe, same, sentences, weights
from tests.tinyfolder import tiny_folder

BASE = [{"anneal": {"warmup": 0.2}}, "adamw", "clip"]
KINDS = {
    "anneal, adamw, clip, after a probe": (BASE, True),
    "freeze": ([{"freeze": {"keep": ["head", "top:1"]}}, *BASE], False),
    "llrd": ([{"llrd": {"decay": 0.8}}, *BASE], False),
    "swa": ([{"swa": {"start": 0.3}}, *BASE], True),
    "mixout": ([{"mixout": {"p": 0.5}}, *BASE], False),
    "mezo": ([{"mezo": {"eps": 1e-2}}], False),
    "lora": ([{"lora": {"r": 2, "dropout": 0.1}}, *BASE], True),
    "l2sp": ([{"l2sp": {"strength": 0.1}}, *BASE], True),
    "lengths": ([{"lengths": {"window": 2}}, *BASE], False),
    "temperature": ([*BASE, "temperature"], False),
    "vector and conformal": ([*BASE, "vector", "conformal"], False),
    "isotonic": ([*BASE, "isotonic"], False),
    "best, which ends the stage early": ([{"best": {"every": 1, "patience": 3}}, *BASE], True),
    "ema": ([{"ema": {"decay": 0.5}}, *BASE], False),
    "wise": ([{"wise": {"points": 3}}, *BASE], True),
    "reinit": ([{"reinit": {"top": 1}}, *BASE], False),
    "thaw": ([*BASE, {"thaw": {"bands": 2, "state": "reset"}}], True),
    "grouped_llrd": ([{"grouped_llrd": {"factors": [1.0, 2.0]}}, *BASE], False),
    "discriminative, whose rate is searched": (
        [{"discriminative": {"bands": 2, "rate": "search", "rates": [1e-3, 1e-2]}}, *BASE],
        True,
    ),
    "adamw without bias correction": ([{"adamw": {"bias_correction": False}}, "clip"], False),
    "child_tuning by chance": ([*BASE, {"child_tuning": {"mode": "free", "where": ["backbone"]}}], False),
    "child_tuning by data": ([*BASE, {"child_tuning": {"mode": "data", "rows": 16}}], True),
    "gmt": ([*BASE, {"gmt": {"strict": True}}], False),
    "head_scale": ([{"head_scale": {"norm": 2.0}}, *BASE], True),
    "noisy_tune": (["noisy_tune", *BASE], True),
    "neftune": (["neftune", *BASE], False),
    "isobn": (["isobn", *BASE], True),
    "label_smoothing": ([{"label_smoothing": {"eps": 0.1}}, *BASE], False),
    "emoe": ([{"emoe": {"experts": 4, "k": 2, "where": ["block:0"]}}, *BASE], False),
    "r_drop": (["r_drop", *BASE], False),
    "smart, with a teacher": ([{"smart": {"pull": 1.0}}, *BASE], False),
    "freelb": (["freelb", *BASE], False),
    "sam": (["sam", *BASE], False),
    "lisa": ([{"lisa": {"layers": 1, "every": 2}}, *BASE], False),
    "lora_plus": ([{"lora": {"r": 2}}, "lora_plus", *BASE], False),
    "prefix": ([{"prefix": {"vectors": 3}}, *BASE], False),
    "prior_decay": ([*BASE, "prior_decay"], True),
    "rec_adam": (["rec_adam", *BASE], True),
}


def fit(tiny_model: Path, out: Path, kind: str, **more):
    ingredients, probe = KINDS[kind]
    made = recipe(ingredients, probe=probe)
    if kind == "prefix":  # whose vectors stay behind
        after = {"name": "after", "steps": 2, "batch_size": 8}
        plain = made.to_dict()
        made = build({**plain, "stages": [{**plain["stages"][0], "carry": ["head"]}, after]}, inside="a test")
    return luthier.fit(made, model=tiny_model, data=sentences(), out=out, save_every=1, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_moments_and_resumed_ends_on_the_same_bits(kind, tiny_model, tmp_path):
    counts = Counts()
    whole = fit(tiny_model, tmp_path / "whole", kind, narrator=counts)
    draw = random.Random(kind)
    for turn in range(2):
        out = tmp_path / f"killed-{turn}"
        for most in (counts.said, counts.said // 2):  # killed, gone on with, killed again
            says = KillsItself(draw.randint(5, most - 1))
            assert in_a_child(lambda: fit(tiny_model, out, kind, resume=True, narrator=says)) == signal.SIGKILL  # noqa: B023
        again = fit(tiny_model, out, kind, resume=True)
        assert same(weights(tmp_path / "whole"), weights(out))
        assert again.metrics == whole.metrics
        assert again.curves["loss"] == whole.curves["loss"]
        assert [(stage.steps, stage.notes) for stage in again.stages] == [
            (stage.steps, stage.notes) for stage in whole.stages
        ]


@pytest.mark.parametrize("first", ["mixout", "lora"])
def test_a_stage_after_one_that_changed_the_modules_goes_on_to_the_same_bits(first, tiny_model, tmp_path):
    """The order of the weights, which optimizer state and norms depend on, must be what it was before the first stage."""
    stages = [
        {"name": "first", "steps": 3, "lr": 1e-3, "batch_size": 8, "ingredients": [KINDS[first][0][0], "adamw"]},
        {"name": "second", "steps": 4, "lr": 1e-3, "batch_size": 8, "ingredients": ["adamw", "clip"]},
    ]
    made = build({"name": "two", "max_length": 16, "stages": stages}, inside="a test")

    def run(out: Path, **more):
        return luthier.fit(made, model=tiny_model, data=sentences(), out=out, save_every=1, **more)

    counts = Counts()
    run(tmp_path / "whole", narrator=counts)
    for after in (counts.said - 12, counts.said - 9):
        out = tmp_path / f"killed-{after}"
        assert in_a_child(lambda: run(out, narrator=KillsItself(after))) == signal.SIGKILL  # noqa: B023
        run(out, resume=True)
        assert same(weights(tmp_path / "whole"), weights(out))


def test_a_log_of_a_resumed_run_has_every_step_once(tiny_model, tmp_path):
    kind = "anneal, adamw, clip, after a probe"
    in_a_child(lambda: fit(tiny_model, tmp_path / "run", kind, narrator=KillsItself(16)))
    fit(tiny_model, tmp_path / "run", kind, resume=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]


def saved(tmp_path: Path, steps: range) -> list[checkpoint.Checkpoint]:
    import torch

    return [
        checkpoint.save(tmp_path, {"x": torch.full((4,), float(step))}, stage=0, step=step, keep=9) for step in steps
    ]


@pytest.mark.parametrize("harm", ["cut", "changed", "no manifest", "no state"])
def test_a_torn_checkpoint_is_named_and_the_one_before_it_is_used(harm, tmp_path):
    before, last = saved(tmp_path, range(1, 3))
    state = last.path / "state.pt"
    if harm == "cut":
        state.write_bytes(state.read_bytes()[:-7])
    elif harm == "changed":
        data = bytearray(state.read_bytes())
        data[len(data) // 2] ^= 1
        state.write_bytes(bytes(data))
    else:
        (last.path / ("manifest.json" if harm == "no manifest" else "state.pt")).unlink()
    said: list[str] = []
    start, step = checkpoint.latest(tmp_path, say=said.append)
    assert (start, step) == (None, before)
    assert len(said) == 1 and last.path.name in said[0]


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    (one,) = saved(tmp_path, range(1, 2))
    shutil.copytree(one.path, tmp_path / ".stage-0-step-00000002.77.tmp")
    assert checkpoint.latest(tmp_path) == (None, one)


@pytest.mark.parametrize("torn", ["stage-1-step-*", "stage-1-start"])
def test_a_run_that_goes_back_over_torn_checkpoints_saves_new_ones_and_ends_on_the_same_bits(
    torn, tiny_model, tmp_path
):
    stages = [
        {"name": name, "steps": 4, "lr": 1e-3, "batch_size": 8, "ingredients": ["adamw"]} for name in ("one", "two")
    ]
    made = build({"name": "both", "max_length": 16, "stages": stages}, inside="a test")

    def run(out: Path, **more):
        return luthier.fit(made, model=tiny_model, data=sentences(), out=out, save_every=1, **more)

    whole, out = tmp_path / "whole", tmp_path / "run"
    run(whole)
    with pytest.raises(Stopped):
        run(out, narrator=Asks(7))  # the third step of the second stage
    for path in (out / "checkpoints").glob(torn):
        (path / "state.pt").write_bytes(b"torn")
    with pytest.raises(Stopped):
        run(out, resume=True, narrator=Asks(1))
    stage = int(torn.startswith("stage-1-step"))
    assert (out / "checkpoints" / f"stage-{stage}-step-00000001").is_dir()
    assert len(list((out / "checkpoints").glob("stage-1-*"))) == (2 if stage else 0)
    run(out, resume=True)
    assert same(weights(whole), weights(out))
    assert (out / "log.jsonl").read_bytes().count(b'"loss"') == 8


def test_a_full_disk_at_the_log_stops_the_run_and_it_goes_on(tiny_model, tmp_path):
    out, kind = tmp_path / "run", "temperature"
    with pytest.raises(Stopped):
        fit(tiny_model, out, kind, narrator=Asks(2))
    log = out / "log.jsonl"
    log.rename(tmp_path / "log")
    log.symlink_to("/dev/full")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("luthier.folder.RunFolder.rewind_log", lambda folder, size: None)  # a device has no size
        with pytest.raises(RunError, match="log.jsonl: No space left on device.  When"):
            fit(tiny_model, out, kind, resume=True)
    log.unlink()
    (tmp_path / "log").rename(log)
    fit(tiny_model, out, kind, resume=True)
    fit(tiny_model, tmp_path / "whole", kind)
    assert same(weights(out), weights(tmp_path / "whole"))
    assert log.read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(tiny_model, tmp_path, monkeypatch):
    kind = "anneal, adamw, clip, after a probe"
    whole = fit(tiny_model, tmp_path / "whole", kind)
    import torch

    real, calls = torch.save, []

    def full(*args, **named):
        calls.append(1)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return real(*args, **named)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(LuthierError, match="No space left on device") as caught:
        fit(tiny_model, tmp_path / "run", kind)
    assert caught.value.exit_code == 1
    monkeypatch.setattr(torch, "save", real)
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))
    fit(tiny_model, tmp_path / "run", kind, resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    assert whole.recipe_digest


def test_a_full_disk_when_the_model_is_saved_is_told_and_the_run_goes_on(tiny_model, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    from luthier.sources import models

    real = models.store

    def full(model, tokenizer, folder):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(models, "store", full)
    out = tmp_path / "a run"
    with pytest.raises(RunError, match="No space left on device .os error 28..  When") as caught:
        fit(tiny_model, out, "swa")
    assert f"make room), luthier fit --out '{out}' --resume goes on" in str(caught.value)
    monkeypatch.setattr(models, "store", real)
    fit(tiny_model, out, "swa", resume=True)
    assert weights(out)


def test_the_time_of_a_run_that_was_stopped_counts_in_its_report(tiny_model, tmp_path, monkeypatch):
    with monkeypatch.context() as slow:
        hours = count(step=3600)
        slow.setattr("luthier.training.fitting.time", SimpleNamespace(monotonic=lambda: next(hours)))
        with pytest.raises(LuthierError, match="stopped on request at step 1"):
            fit(tiny_model, tmp_path / "run", "swa", narrator=Asks())
    report = fit(tiny_model, tmp_path / "run", "swa", resume=True)
    assert 3600 < report.seconds < 100 * 3600


def test_asked_to_stop_it_stops_between_steps_and_goes_on_to_the_same_bits(tiny_model, tmp_path):
    kind = "swa"
    fit(tiny_model, tmp_path / "whole", kind)

    with pytest.raises(LuthierError, match="--resume goes on from there") as caught:
        fit(tiny_model, tmp_path / "run", kind, narrator=Asks())
    assert caught.value.exit_code == 1
    fit(tiny_model, tmp_path / "run", kind, resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_what_was_noted_in_a_step_is_in_the_report_of_a_run_that_went_on(tmp_path):
    tiny = tiny_folder(tmp_path / "tiny", dropout=0.0)  # of which r_drop takes note at the first step
    whole = fit(tiny, tmp_path / "whole", "r_drop")
    with pytest.raises(LuthierError, match="stopped on request at step 3"):
        fit(tiny, tmp_path / "run", "r_drop", narrator=Asks(3))
    again = fit(tiny, tmp_path / "run", "r_drop", resume=True)
    assert any("r_drop" in note for stage in whole.stages for note in stage.notes)
    assert [stage.notes for stage in again.stages] == [stage.notes for stage in whole.stages]


def test_a_run_folder_is_not_overwritten_and_not_gone_on_with_by_another_run(tiny_model, tmp_path):
    kind = "temperature"
    fit(tiny_model, tmp_path / "run", kind)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(LuthierError, match="holds a finished run"):
        fit(tiny_model, tmp_path / "run", kind)
    with pytest.raises(LuthierError, match="must be what the run began with"):
        fit(tiny_model, tmp_path / "run", "freeze", resume=True)
    with pytest.raises(LuthierError, match="seed"):
        fit(tiny_model, tmp_path / "run", kind, resume=True, seed=5)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_folder_with_other_things_in_it_is_left_alone(tiny_model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(LuthierError, match="holds no run"):
        fit(tiny_model, tmp_path, "temperature", resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_resuming_a_finished_run_gives_its_report_back(tiny_model, tmp_path):
    report = fit(tiny_model, tmp_path / "run", "temperature")
    again = fit(tiny_model, tmp_path / "run", "temperature", resume=True)
    assert again.metrics == report.metrics
    assert not list((tmp_path / "run" / "checkpoints").glob("stage-*"))
