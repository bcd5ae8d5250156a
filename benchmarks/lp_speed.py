"""The head alone: `lp`, solved exactly, against training the head in transformers.Trainer for ten epochs on a frozen backbone.

Both are measured on the same rows and tokens, and by the accuracy on the same test rows: a solved head that were worse would not count.
"""

from __future__ import annotations

import tempfile
import time

import numpy as np
import torch
import transformers
from common import BATCH, Rows, fresh, job, write

from luthier.narrate import Silent
from luthier.outputs import logits
from luthier.placement import Placement
from luthier.training import probing
from luthier.training.trace import Trace


def accuracy(made: object, model: torch.nn.Module) -> float:
    test = made.encoded["test"]
    return float((logits(model, test, pad_id=made.pad_id).argmax(1) == np.asarray(test.targets)).mean())


def main() -> None:
    made = job("lp", limit=80)
    model = fresh(made)
    begun = time.perf_counter()
    probing.solve(made, made.plan.stages[0], model, Placement(), Trace(), Silent())
    mine, my_score = time.perf_counter() - begun, accuracy(made, model)

    other = fresh(made)
    for name, weight in other.named_parameters():
        weight.requires_grad_(name.startswith("classifier"))
    args = transformers.TrainingArguments(
        tempfile.mkdtemp(), per_device_train_batch_size=BATCH, num_train_epochs=10, learning_rate=1e-2, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        other, args, train_dataset=Rows(made), data_collator=transformers.DataCollatorWithPadding(made.loaded.tokenizer)
    )
    begun = time.perf_counter()
    trainer.train()
    seconds, score = time.perf_counter() - begun, accuracy(made, other)
    write(
        "lp_speed",
        {
            "seconds": {"luthier": mine, "hf": seconds},
            "test_accuracy": {"luthier": my_score, "hf": score},
            "ratio": seconds / mine,
            "rows": len(made.encoded["train"]),
        },
    )


if __name__ == "__main__":
    main()
