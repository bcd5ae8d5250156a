"""Runs inside transformers.Trainer: what is refused, when a stage ends, going on from the Trainer's checkpoints, several processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import luthier
from luthier.errors import CheckpointError, ConflictError
from luthier.hosts import hf, saved
from luthier.run import Run
from tests.little import same
from tests.tiny import tiny

ROOT = Path(__file__).parents[2]
STEPS = 6  # of four an epoch, so that the last one ends no epoch
ROWS = [{"input_ids": torch.arange(3 + at, 11 + at), "labels": at % 3} for at in range(16)]


def begun(
    *ingredients: Any, steps: int = STEPS, start: int = 0, dropout: float = 0.1, **more: Any
) -> tuple[torch.nn.Module, Run]:
    """A tiny model whose weights are drawn from ``start``, and a run on it."""
    model = tiny("bert", seed=start, dropout=dropout)
    return model, luthier.begin(model, ingredients, learning_rate=1e-2, steps=steps, **more)


def arguments(out: Path, **more: Any) -> transformers.TrainingArguments:
    plain = {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "max_grad_norm": 0, "report_to": [], "use_cpu": True,
        "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    return transformers.TrainingArguments(str(out), **plain | more)


def trainer(model: torch.nn.Module, run: Run, out: Path, **more: Any) -> transformers.Trainer:
    args = arguments(out, **more)
    parts = hf.parts(run, args)
    return parts.Trainer(model, args, train_dataset=ROWS, optimizers=parts.optimizers, callbacks=parts.callbacks)


def ended(
    out: Path, *ingredients: Any, go_on: Any = None, start: int = 0, every: int = 3, **more: Any
) -> tuple[dict[str, torch.Tensor], Run]:
    """The weights at a run's end; it may go on from a checkpoint."""
    model, run = begun(*ingredients, start=start, **more)
    trainer(model, run, out, save_strategy="steps", save_steps=every).train(resume_from_checkpoint=go_on)
    run.finish()
    return dict(model.state_dict()), run


# Half precision


@pytest.mark.parametrize("replaces", [luthier.SAM(), luthier.MeZO()], ids=["sam", "mezo"])
def test_a_scaler_of_gradients_is_refused_where_the_run_replaces_the_step(replaces, tmp_path, monkeypatch):
    _, run = begun(replaces, dropout=0.0)
    with pytest.raises(ConflictError, match=r"args.fp16  must be off.*Take bf16=True") as caught:
        hf.parts(run, arguments(tmp_path, fp16=True, max_grad_norm=1.0))
    assert [fault.where for fault in caught.value.faults] == ["args.max_grad_norm", "args.fp16"]
    hf.parts(run, arguments(tmp_path, bf16=True))
    hf.parts(begun(luthier.AdamW())[1], arguments(tmp_path, fp16=True))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")  # as "accelerate launch --mixed_precision fp16" does
    with pytest.raises(ConflictError, match=r"args.fp16"):
        hf.parts(run, arguments(tmp_path))


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 2)
    with pytest.raises(ConflictError, match=r"args.n_gpu  must be 1.*got 2.  Start a process for each GPU"):
        hf.parts(begun()[1], arguments(tmp_path))


# The end of a stage


def never_better(model: torch.nn.Module) -> dict[str, float]:
    return {"accuracy": 0.5}


def test_a_stage_that_ends_early_ends_the_trainer(tmp_path):
    """The first score is the best; after the third step two in a row were no better."""
    model, run = begun(luthier.Best(every=1, patience=2), score=never_better)
    host = trainer(model, run, tmp_path)
    host.train()
    assert (host.state.global_step, run.progress.step) == (3, 3)
    assert "ended after step 3 of 6: 2 evaluations without a better accuracy" in run.notes


# Going on


def nll(model: torch.nn.Module) -> dict[str, float]:
    """On the first four rows; leaves the mode as it was."""
    was, rows = model.training, ROWS[:4]
    model.eval()
    with torch.no_grad():
        found = model(
            input_ids=torch.stack([row["input_ids"] for row in rows]),
            labels=torch.tensor([row["labels"] for row in rows]),
        )
    model.train(was)
    return {"nll": float(found.loss)}


@pytest.mark.parametrize(
    "ingredients",
    [
        [luthier.EMA(decay=0.5), luthier.Thaw(bands=1, over=0.5, state="reset")],
        [luthier.LISA(layers=1, every=1), luthier.SWA(start=0.2)],
        [luthier.Mixout(p=0.5), luthier.NEFTune(), luthier.EMA(decay=0.5)],
        [luthier.L2SP(strength=0.5), luthier.Best(every=1, metric="nll"), luthier.WiSE(alpha=0.5)],
        [luthier.LoRA(r=2), luthier.SMART(pull=1.0), luthier.ChildTuning(mode="free", p=0.5)],
        [luthier.SAM(), luthier.EMA(decay=0.5)],
        [luthier.MeZO(), luthier.EMA(decay=0.5)],
    ],
    ids=lambda ingredients: " ".join(one.name() for one in ingredients),
)
def test_it_goes_on_to_the_bits_of_a_trainer_that_never_stopped(ingredients, tmp_path):
    """Also on a model that was drawn anew: all that counts is in the checkpoint, the reference weights too."""
    torch.manual_seed(0)
    whole, _ = ended(tmp_path / "whole", *ingredients, every=1, score=nll)
    for step in (3, 4):  # inside an epoch, and at its end
        torch.manual_seed(1)
        again, run = ended(
            tmp_path / "again",
            *ingredients,
            go_on=str(tmp_path / "whole" / f"checkpoint-{step}"),
            start=9,
            score=nll,
        )
        assert run.progress.step == STEPS
        assert same(again, whole)


def test_without_its_own_file_an_average_would_end_elsewhere(tmp_path, monkeypatch):
    whole, _ = ended(tmp_path / "whole", luthier.EMA(decay=0.5))
    monkeypatch.setattr(saved, "load", lambda run, saved: None)
    again, _ = ended(tmp_path / "again", luthier.EMA(decay=0.5), go_on=str(tmp_path / "whole" / "checkpoint-3"))
    assert not same(again, whole)


def test_the_last_checkpoint_is_found_and_takes_no_step_more(tmp_path):
    """The Trainer by itself takes a seventh step, as the sixth ends no epoch."""
    whole, _ = ended(tmp_path, luthier.EMA(decay=0.5))
    again, run = ended(tmp_path, luthier.EMA(decay=0.5), go_on=True)
    assert run.progress.step == STEPS
    assert same(again, whole)


def test_a_stage_that_ended_early_is_over_when_it_is_gone_on_with(tmp_path):
    whole, run = ended(tmp_path / "whole", luthier.Best(every=1, patience=2), score=never_better)
    assert run.progress.step == 3
    last = str(tmp_path / "whole" / "checkpoint-3")
    again, run = ended(tmp_path / "again", luthier.Best(every=1, patience=2), score=never_better, go_on=last)
    assert run.progress.step == 3
    assert same(again, whole)


def test_the_optimizer_is_saved_once(tmp_path):
    ended(tmp_path, luthier.AdamW())
    saved = torch.load(tmp_path / "checkpoint-3" / "luthier.pt", weights_only=True)
    assert saved["step"] == 3
    assert not saved.keys() & {"optimizer", "schedule"}


def test_a_checkpoint_of_another_trainer_is_refused_before_anything_is_loaded(tmp_path):
    args = arguments(tmp_path / "other", save_strategy="steps", save_steps=3)
    transformers.Trainer(tiny("bert"), args, train_dataset=ROWS).train()
    model, run = begun(luthier.AdamW())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"checkpoint-3  must hold luthier.pt, or"):
        trainer(model, run, tmp_path / "new").train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-3"))
    assert same(dict(model.state_dict()), before)


def test_a_checkpoint_of_weights_alone_is_refused(tmp_path):
    model, run = begun(luthier.AdamW())
    trainer(model, run, tmp_path, save_strategy="steps", save_steps=3, save_only_model=True).train()
    with pytest.raises(CheckpointError, match=r"must hold luthier.pt, optimizer.pt, scheduler.pt.*save_only_model"):
        ended(tmp_path, luthier.AdamW(), go_on=True)


def test_a_checkpoint_of_another_run_or_a_torn_one_is_refused(tmp_path):
    ended(tmp_path, luthier.EMA(decay=0.5))
    with pytest.raises(CheckpointError, match=r"must be of a run that was begun with the same ingredients"):
        ended(tmp_path, luthier.EMA(decay=0.9), go_on=True)
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / "torn")
    whole = (tmp_path / "torn" / "luthier.pt").read_bytes()
    for part in (b"", b"text", whole[: len(whole) // 2]):
        (tmp_path / "torn" / "luthier.pt").write_bytes(part)
        with pytest.raises(CheckpointError, match=r"luthier.pt  must be whole"):
            ended(tmp_path, luthier.EMA(decay=0.5), go_on=str(tmp_path / "torn"))


def test_a_run_that_has_taken_steps_is_trained_no_further(tmp_path):
    """Trap: a second ``train()`` began with the first step's batches at the last step's rates."""
    model, run = begun(luthier.EMA(decay=0.5))
    host = trainer(model, run, tmp_path, save_strategy="steps", save_steps=3)
    host.train()
    for given in (None, str(tmp_path / "checkpoint-3")):
        with pytest.raises(ConflictError, match=r"the run  must have taken no step before train\(\); got 6 steps"):
            host.train(resume_from_checkpoint=given)


def test_a_trainer_that_is_not_the_runs_own_is_not_gone_on_with(tmp_path):
    ended(tmp_path, luthier.AdamW())
    model, run = begun(luthier.AdamW())
    args = arguments(tmp_path)
    parts = hf.parts(run, args)
    plain = transformers.Trainer(
        model, args, train_dataset=ROWS, optimizers=parts.optimizers, callbacks=parts.callbacks
    )
    with pytest.raises(ConflictError, match=r"must go on at the run's step 0; got step 3.*parts.Trainer"):
        plain.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


# Several processes


def test_weights_that_wake_later_are_refused_where_processes_share_gradients(tmp_path, monkeypatch):
    thaw = luthier.Thaw(bands=1, over=0.5)
    runs = [begun(*given, dropout=0.0)[1] for given in ([thaw], [luthier.AdamW()], [thaw, luthier.MeZO()])]
    args = arguments(tmp_path)
    hf.parts(runs[0], args)
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", property(lambda args: 2))
    with pytest.raises(ConflictError, match=r"args.world_size  must be 1.*got 2, and \d+ weights rest, such as bert"):
        hf.parts(runs[0], args)
    for run in runs[1:]:  # nothing rests; nothing has a gradient to share
        hf.parts(run, args)


def test_a_replaced_step_takes_the_mean_of_all_processes(tmp_path, monkeypatch):
    model, run = begun(luthier.MeZO(), dropout=0.0, steps=1)
    host, seen = trainer(model, run, tmp_path, max_steps=1), []

    def reduce(loss: torch.Tensor, reduction: str) -> torch.Tensor:
        seen.append((reduction, float(loss)))
        return loss + 10.0

    monkeypatch.setattr(host.accelerator, "reduce", reduce)
    told = host.train().training_loss
    (how, high), (again, _) = seen  # on both sides of the weights
    assert how == again == "mean"
    assert told == pytest.approx(high + 10.0)


@pytest.mark.slow
def test_two_processes_without_gradients_stay_together_and_are_as_one_of_twice_the_rows(tmp_path):
    """In float64, and eps is 1e-3: what is left is the rounding of the loss, 1e-16 / 1e-3, times the rate."""
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    meet = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command = [*two, *meet, str(ROOT / "tests" / "programs" / "two_trainers.py"), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, other, gone_on = (torch.load(tmp_path / f"{name}.pt") for name in ("rank-0", "rank-1", "again-1"))
    assert same(one, other)
    assert same(gone_on, other)
    model = tiny("bert").double()
    run = luthier.begin(model, [luthier.MeZO(), luthier.EMA(decay=0.5)], learning_rate=1e-2, steps=4)
    sequential = {"per_device_train_batch_size": 8, "train_sampling_strategy": "sequential"}
    trainer(model, run, tmp_path / "one", max_steps=4, **sequential).train()
    run.finish()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(one[name], value, rtol=1e-9, atol=1e-11)
