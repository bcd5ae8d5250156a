"""What the speed benchmarks share: the demo's model and text, and two trainers that alternate in one process."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers

import luthier
from luthier.core.seeds import borrowed
from luthier.narrate import Silent
from luthier.placement import Placement
from luthier.quick import keep_memory
from luthier.recipe.text import read
from luthier.sources.demo import rows
from luthier.training import stages
from luthier.training.job import Job, prepare

HERE = Path(__file__).parent
LENGTH = 128
BATCH = 16


keep_memory()  # as ``fit`` does; process-wide, so the other trainer has it too


def job(recipe: str, *, sets: tuple[str, ...] = (), limit: int | None = 80) -> Job:
    """A prepared job over BBC News, 128 tokens."""
    made = read(recipe, sets=[f"max_length={LENGTH}", *sets])
    return prepare(made, model="demo", data_source=rows(limit))


def ours(job: Job, stage: int, *, steps: int) -> float:
    """Seconds for ``steps`` steps of a stage, batches made in the loop, without validation."""
    placement = Placement()
    model = fresh(job)
    run, inner = stages.attach(job, job.plan.stages[stage], model, placement)
    begun = time.perf_counter()
    stages.keep_frozen(job, run, inner, placement, Silent())
    left = [steps]

    def stop() -> bool:
        left[0] -= 1
        return left[0] <= 0

    hooks = stages.Hooks(save=lambda step, run: None, stop=stop, log=lambda values: None)
    try:
        stages.train(job, run, placement, stages.Trace(), hooks, Silent())
    except stages.Stopped:
        pass
    return time.perf_counter() - begun


def fresh(job: Job) -> torch.nn.Module:
    """The start model again."""
    from luthier.sources.models import load

    return load("demo", job.task, seed=0, max_length=LENGTH).model


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """The job's training rows as transformers.Trainer wants them."""

    def __init__(self, job: Job) -> None:
        self._rows = job.encoded["train"]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"input_ids": self._rows.input_ids[row].tolist(), "labels": int(self._rows.targets[row])}


def theirs(job: Job, *, steps: int, freeze: Callable[[torch.nn.Module], None] | None = None, **settings: Any) -> float:
    """Seconds of transformers.Trainer for as many steps of the same rows, batches made in its loop."""
    model = fresh(job)
    attention = settings.pop("attention", None)
    if attention:
        model.set_attn_implementation(attention)
    if freeze:
        freeze(model)
    args = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=2e-5,
        lr_scheduler_type="linear",
        warmup_steps=max(1, steps // 10),
        weight_decay=0.01,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **settings,
    )
    collator = transformers.DataCollatorWithPadding(job.loaded.tokenizer)
    trainer = transformers.Trainer(model, args, train_dataset=Rows(job), data_collator=collator)
    begun = time.perf_counter()
    trainer.train()
    return time.perf_counter() - begun


def alternate(contestants: dict[str, Callable[[], float]], *, rounds: int) -> dict[str, list[float]]:
    """Each contestant in turn, ``rounds`` times, after one round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, run in contestants.items():
            with borrowed(0, "benchmark"):
                seconds = run()
            if turn:
                found[name].append(seconds)
            print(f"round {turn}: {name} {seconds:.2f} s", file=sys.stderr, flush=True)
    return found


def write(name: str, told: dict[str, Any]) -> None:
    """The result beside the script, and on the terminal."""
    told = {
        "benchmark": name,
        **told,
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "luthier": luthier.__version__,
        },
        "repeat": f"PYTHONPATH=. python benchmarks/{name}.py",
    }
    (HERE / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told, indent=1))


def median(values: list[float]) -> float:
    return statistics.median(values)
