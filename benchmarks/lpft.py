"""LP-FT and its science: six recipes, five seeds, two sets with shifted tests, MiniLM, 200 rows.

Of each run: accuracy inside and on each shifted test, calibration error before and after temperature, the head's norm, how far the
features moved (mean L2 distance of what the head reads, test rows), and the FT ratio of the kernel at the start of its last stage.
Every recipe takes ten epochs of its last stage, so that none is ahead by its length alone. PYTHONPATH=. python benchmarks/lpft.py
"""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import grid

SHIFTS = {"sst2": ("yelp", "tweets", "customer"), "ag_news": ("bbc",)}
OUTSIDE = 300  # rows of each shifted test
STUDIED = 32  # rows of a study


def rows(name: str) -> dict[str, Any]:
    """The rows of ``grid``, and the shifted tests of the set."""
    import pandas as pd

    made = grid.rows(name)
    for shift in SHIFTS[name] if grid.SHARED.is_dir() else ():
        with gzip.open(grid.SHARED / name / f"ood_{shift}.jsonl.gz", "rt", encoding="utf-8") as file:
            told = [json.loads(line) for line in file]
        random.Random(0).shuffle(told)
        made[f"ood_{shift}"] = pd.DataFrame(told[:OUTSIDE])[["text", "label"]]
    return made


def one(work: tuple[str, str, grid.Entry, int]) -> dict[str, Any]:
    """One run and its studies."""
    import torch

    import luthier

    torch.set_num_threads(1)
    name, called, entry, seed = work
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/data"
        os.mkdir(data)
        for split, frame in rows(name).items():
            frame.to_csv(f"{data}/{split}.csv", index=False)
        report = luthier.fit(entry.made(), model="demo", data=data, seed=seed, out=f"{folder}/run")
        kinds = ["drift"] if called in ("lp", "eh-ft") else ["drift", "ntk"]
        found = {study.kind: study.found for study in luthier.study(f"{folder}/run", kinds=kinds, rows=STUDIED)}
    return {
        "set": name,
        "recipe": called,
        "seed": seed,
        "accuracy": report.metrics["test"]["accuracy"],
        "nll": report.metrics["test"]["nll"],
        "outside": {shift: told["accuracy"] for shift, told in report.metrics["ood"].items()},
        "ece": report.metrics["test"]["ece"],
        "ece_after": report.calibrated.get("test", {}).get("ece"),
        "head_norm": found["drift"]["head_norm_after"],
        "moved": found["drift"]["layers"][-1]["diff"],
        "ft_ratio": found["ntk"]["ft_ratio"] if "ntk" in found else None,
        "seconds": time.process_time() - begun,
    }


RECIPES = {
    "ft": grid.Entry("ft", ("stages.finetune.epochs=10",)),
    "lp": grid.Entry("lp"),
    "lp-ft": grid.Entry("lp-ft", ("stages.finetune.epochs=10",)),
    "lora": grid.Entry("lora", ("stages.finetune.epochs=10",)),
    "lp-lora": grid.Entry("lp-lora", ("stages.finetune.epochs=10",)),
    "eh-ft": grid.Entry("eh-ft", ("stages.finetune.epochs=10",)),
}

# (title, what of a run, logarithmic); a number of None is not drawn.
PANELS: tuple[tuple[str, Callable[[dict[str, Any]], float | None], bool], ...] = (
    ("test accuracy (%)", lambda run: 100 * run["accuracy"], False),
    ("shifted tests, accuracy (%)", lambda run: 100 * statistics.mean(run["outside"].values()), False),
    ("ECE as trained (%)", lambda run: 100 * run["ece"], False),
    ("ECE after temperature (%)", lambda run: None if run["ece_after"] is None else 100 * run["ece_after"], False),
    ("norm of the head", lambda run: run["head_norm"], True),
    ("features moved (L2)", lambda run: run["moved"], False),
    ("FT ratio at the start", lambda run: run["ft_ratio"], False),
)


def table(runs: list[dict[str, Any]]) -> str:
    """Means over seeds (standard deviation) as a Markdown table."""
    lines = [
        "| set | recipe | " + " | ".join(title for title, _, _ in PANELS) + " |",
        "|---|---" + "|---" * len(PANELS) + "|",
    ]
    for name in dict.fromkeys(run["set"] for run in runs):
        for recipe in RECIPES:
            mine = [run for run in runs if (run["set"], run["recipe"]) == (name, recipe)]
            cells = []
            for _, what, _ in PANELS:
                told = [value for run in mine if (value := what(run)) is not None]
                mean, sd = (statistics.mean(told), statistics.stdev(told)) if len(told) > 1 else (math.nan, math.nan)
                cells.append(f"{mean:.3g} ({sd:.2g})" if told else "–")
            lines.append(f"| {name} | {recipe} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(runs: list[dict[str, Any]]) -> None:
    """A row of panels a set, a dot a seed, a bar at the mean; readable in grey."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "luthier"
    import matplotlib.pyplot as plt

    names, sets = list(RECIPES)[::-1], list(dict.fromkeys(run["set"] for run in runs))
    figure, panels = plt.subplots(
        len(sets), len(PANELS), figsize=(2.1 * len(PANELS), 2.5 * len(sets)), sharey=True, squeeze=False
    )
    for row, each in zip(panels, sets, strict=True):
        for panel, (title, what, logarithmic) in zip(row, PANELS, strict=True):
            for at, recipe in enumerate(names):
                told = [what(run) for run in runs if (run["set"], run["recipe"]) == (each, recipe)]
                seen = [value for value in told if value is not None]
                panel.plot(seen, [at] * len(seen), "o", color="#1f5a8a", alpha=0.6, markersize=4)
                if seen:
                    panel.plot([statistics.mean(seen)] * 2, [at - 0.3, at + 0.3], color="black", linewidth=2)
            if logarithmic:
                panel.set_xscale("log")
                panel.set_xticks([0.5, 1, 2, 5, 10, 20], minor=False)
                panel.xaxis.set_major_formatter("{x:g}")
                panel.minorticks_off()
            panel.set_xlabel(title, fontsize=8)
            panel.tick_params(labelsize=7)
            panel.grid(axis="x", color="#dddddd")
        row[0].set_yticks(range(len(names)), names)
        row[0].set_title(each, loc="left", fontsize=9)
    figure.suptitle(
        f"{grid.ROWS['train']} training rows, {len(grid.SEEDS)} seeds (dots), their mean (bars); MiniLM", fontsize=9
    )
    figure.tight_layout()
    figure.savefig(grid.HERE / "lpft.svg", metadata={"Date": None})


if __name__ == "__main__":
    runs = grid.go("lpft", RECIPES, sets=SHIFTS, work=one)
    print(table(runs))
    plot(runs)
