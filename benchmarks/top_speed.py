"""Only the two topmost blocks and the head learn: examples a second against transformers.Trainer with the same freezing.

Three epochs, so that the one pass over the frozen layers is paid inside the measured time.
"""

from __future__ import annotations

import torch
from common import BATCH, alternate, job, median, ours, theirs, write

ROUNDS = 2
EPOCHS = 3


def freeze(model: torch.nn.Module) -> None:
    kept = ("bert.encoder.layer.4.", "bert.encoder.layer.5.", "bert.pooler.", "classifier.")
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.startswith(kept))


def main() -> None:
    keep = "{freeze: {keep: [head, bridge, 'top:2']}}"
    recipe = f"stages.0.ingredients=[{{anneal: {{warmup: 0.1}}}}, {keep}, adamw, clip]"
    made = job("ft", sets=(recipe, f"stages.0.epochs={EPOCHS}"), limit=60)
    steps = made.plan.stages[0].steps
    found = alternate(
        {"luthier": lambda: ours(made, 0, steps=steps), "hf": lambda: theirs(made, steps=steps, freeze=freeze)},
        rounds=ROUNDS,
    )
    rates = {name: steps * BATCH / median(seconds) for name, seconds in found.items()}
    write(
        "top_speed",
        {
            "examples_per_second": rates,
            "seconds": found,
            "ratio": rates["luthier"] / rates["hf"],
            "steps": steps,
            "epochs": EPOCHS,
        },
    )


if __name__ == "__main__":
    main()
