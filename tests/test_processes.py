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
from tests.little import recipe, sentences, weights
from tests.tinyfolder import tiny_folder

ROOT = Path(__file__).parents[1]


def launch(tmp_path: Path, tiny_model: Path, kind: str, *, sharded: bool) -> Path:
    """Two processes by torchrun; gives the run folder."""
    out = tmp_path / f"{kind}-{'sharded' if sharded else 'wrapped'}"
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
    done = subprocess.run(
        [*command, program, str(tiny_model), str(out), kind], env=env, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_two_processes_end_on_the_weights_of_one(sharded, tmp_path):
    """Equal but for the order of additions: dropout is off, so what is left is float32 rounding, amplified by Adam's division."""
    tiny_model = tiny_folder(tmp_path / "tiny", dropout=0.0)
    ingredients = [{"swa": {"start": 0.3}}, "adamw", "clip"]
    out = launch(tmp_path, tiny_model, "swa", sharded=sharded)
    two, told = weights(out), json.loads((out / "environment.json").read_text())
    assert (told["processes"], told["sharded"]) == (2, sharded)
    luthier.fit(recipe(ingredients, probe=True), model=tiny_model, data=sentences(), out=tmp_path / "one")
    one = weights(tmp_path / "one")
    assert two.keys() == one.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=2e-5)
