"""Run under torchrun by tests/test_hosts.py: four steps of MeZO in transformers.Trainer, and again from the second step's checkpoint.

Argument: the folder where each process leaves its weights, as ``rank-N.pt`` and ``again-N.pt``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import transformers

import luthier
from luthier.hosts import hf
from tests.tiny import tiny

torch.set_num_threads(1)
out, rank = Path(sys.argv[1]), os.environ["RANK"]
rows = [{"input_ids": torch.arange(3 + at, 11 + at), "labels": at % 3} for at in range(16)]
for name, go_on in (("rank", None), ("again", str(out / "two" / "checkpoint-2"))):
    model = tiny("bert").double()
    run = luthier.begin(model, [luthier.MeZO(), luthier.EMA(decay=0.5)], learning_rate=1e-2, steps=4)
    args = transformers.TrainingArguments(
        str(out / "two"), max_steps=4, per_device_train_batch_size=4, max_grad_norm=0, report_to=[], use_cpu=True,
        save_strategy="steps", save_steps=2, disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    parts = hf.parts(run, args)
    trainer = parts.Trainer(model, args, train_dataset=rows, optimizers=parts.optimizers, callbacks=parts.callbacks)
    trainer.train(resume_from_checkpoint=go_on)
    assert args.world_size == 2
    run.finish()
    torch.save(model.state_dict(), out / f"{name}-{rank}.pt")
