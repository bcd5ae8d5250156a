"""Run under torchrun by tests/test_processes.py: fits the little job and saves the run folder. Arguments: model, out, recipe kind."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import luthier
from tests.little import recipe, sentences

torch.set_num_threads(1)
model, out, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
ingredients = {
    "sgd-like": [{"anneal": {"warmup": 0.2}}, "adamw", "clip"],
    "swa": [{"swa": {"start": 0.3}}, "adamw", "clip"],
}[kind]
made = recipe(ingredients, probe=True, micro_batch=3)
luthier.fit(made, model=model, data=sentences(), out=out)
