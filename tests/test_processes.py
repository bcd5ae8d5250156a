"""Two processes on one machine (gloo): the same recipe gives the same weights as one process, wrapped (DDP) or sharded (FSDP2)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import luthier
from tests.little import recipe, same, sentences, weights
from tests.tinyfolder import tiny_folder

ROOT = Path(__file__).parents[1]


def launch(model: Path, out: Path, batch: int, micro: int, *asked: str, sharded: bool = False) -> Path:
    """Two processes by torchrun; gives the run folder."""
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if sharded:
        env |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-port=0",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
    ]
    program = str(ROOT / "tests" / "programs" / "two_processes.py")
    given = [str(model), str(out), str(batch), str(micro), *asked]
    done = subprocess.run([*command, program, *given], env=env, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharded", "batch", "micro"),
    [(False, 8, 3), (True, 8, 3), (True, 9, 0)],
    ids=["DDP", "FSDP2", "FSDP2, one process with a row more"],
)
def test_two_processes_end_on_the_weights_of_one(sharded, batch, micro, tmp_path):
    """Equal but for the order of additions: dropout is off, so what is left is float32 rounding, amplified by Adam's division."""
    tiny_model = tiny_folder(tmp_path / "tiny", dropout=0.0)
    ingredients = [{"swa": {"start": 0.3}}, "adamw", "clip"]
    out = launch(tiny_model, tmp_path / "two", batch, micro, sharded=sharded)
    two, told = weights(out), json.loads((out / "environment.json").read_text())
    assert (told["processes"], told["sharded"]) == (2, sharded)
    made = recipe(ingredients, probe=True, batch_size=batch)
    luthier.fit(made, model=tiny_model, data=sentences(), out=tmp_path / "one")
    one = weights(tmp_path / "one")
    assert two.keys() == one.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_one_of_two_processes_asked_to_stop_stops_both_and_they_go_on_to_the_same_bits(tmp_path):
    tiny_model = tiny_folder(tmp_path / "tiny")
    whole = launch(tiny_model, tmp_path / "whole", 8, 3)
    out = launch(tiny_model, tmp_path / "stopped", 8, 3, "stop")
    assert not (out / "report.json").exists()
    assert list((out / "checkpoints").iterdir())
    launch(tiny_model, out, 8, 3, "resume")
    assert same(weights(out), weights(whole))
