"""What starting costs: import, help, planning BERT-base, and the engine's overhead a step over a bare torch loop on a toy."""

from __future__ import annotations

import subprocess
import sys
import time

import torch
import transformers
from common import median, write

from luthier.planning.compose import compose, skeleton
from luthier.recipe.text import read


def best(command: list[str], times: int = 5) -> float:
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found.append(time.perf_counter() - begun)
    return min(found)


def planning() -> float:
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(transformers.BertConfig())
    recipe = read("lp-ft-llrd-swa")
    found = []
    for _ in range(5):
        begun = time.perf_counter()
        compose(recipe, skeleton(model), lengths=[128] * 1000)
        found.append(time.perf_counter() - begun)
    return min(found)


def overhead() -> dict[str, float]:
    """Milliseconds a step of a two-layer BERT of 16 hidden units: ours with log and schedule, and a bare loop of the same torch calls."""
    import tempfile
    from pathlib import Path

    from luthier.narrate import Silent
    from luthier.placement import Placement
    from luthier.sources.text import collate
    from luthier.training import stages
    from luthier.training.job import prepare
    from tests.little import recipe, sentences
    from tests.tinyfolder import tiny_folder

    torch.set_num_threads(1)
    steps = 200
    with tempfile.TemporaryDirectory() as folder:
        path = tiny_folder(Path(folder) / "tiny")
        made = recipe([{"anneal": {"warmup": 0.1}}, "adamw"], steps=steps)
        ours, bare = [], []
        for _ in range(5):
            job = prepare(made, model=path, data_source=sentences())
            run, _inner = stages.attach(job, job.plan.stages[0], job.loaded.model, Placement())
            del job.encoded["validation"]  # the bare loop has none either
            hooks = stages.Hooks(lambda step, run: None, lambda: False, lambda values: None)
            begun = time.perf_counter()
            stages.train(job, run, Placement(), stages.Trace(), hooks, Silent())
            ours.append((time.perf_counter() - begun) / steps * 1000)

            job = prepare(made, model=path, data_source=sentences())
            model, train = job.loaded.model.train(), job.encoded["train"]
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
            order = [rows for _, rows, _ in stages.steps(job.plan.stages[0], 0)]
            begun = time.perf_counter()
            for rows in order:
                batch = collate(train, rows, pad_id=job.pad_id)
                labels = batch.pop("labels")
                loss = torch.nn.functional.cross_entropy(model(**batch).logits, labels)
                loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                loss.item()
            bare.append((time.perf_counter() - begun) / steps * 1000)
    return {"luthier_ms": median(ours), "bare_ms": median(bare), "overhead_ms": median(ours) - median(bare)}


def main() -> None:
    write(
        "start_speed",
        {
            "import_seconds": best([sys.executable, "-c", "import luthier"]),
            "help_seconds": best([sys.executable, "-m", "luthier", "--help"]),
            "planning_bert_base_seconds": planning(),
            "step": overhead(),
        },
    )


if __name__ == "__main__":
    main()
