"""`ft` on BBC News, 128 tokens, batch 16, dropout as in the config: examples a second against transformers.Trainer.

HF: its defaults. HF+: the best setting found: the quickest of its attention implementations, like lengths together, no clipping cost
saved (both clip at 1.0). Same model, rows, tokens and number of updates; alternating in one process; the median of the rounds.
"""

from __future__ import annotations

from common import BATCH, alternate, job, median, ours, theirs, write

STEPS = 12
ROUNDS = 3


def main() -> None:
    made = job("ft")
    found = alternate(
        {
            "luthier": lambda: ours(made, 0, steps=STEPS),
            "hf": lambda: theirs(made, steps=STEPS),
            "hf+": lambda: theirs(
                made,
                steps=STEPS,
                attention="eager",
                optim="adamw_torch_fused",
                train_sampling_strategy="group_by_length",
            ),
        },
        rounds=ROUNDS,
    )
    rates = {name: STEPS * BATCH / median(seconds) for name, seconds in found.items()}
    write(
        "ft_speed",
        {
            "examples_per_second": rates,
            "seconds": found,
            "ratio_to_hf": rates["luthier"] / rates["hf"],
            "ratio_to_hf_plus": rates["luthier"] / rates["hf+"],
        },
    )


if __name__ == "__main__":
    main()
