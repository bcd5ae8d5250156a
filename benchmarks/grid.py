"""Recipes x sets x seeds on a few hundred rows: what the quality benchmarks share.

The sets are read from ../shared/data where that is there, else the demo's rows stand for all of them. The rows are the same for every
recipe and seed; a seed changes the head's start, the order and dropout. Recipes are run as they are written: nothing is tuned here, and
the test rows choose nothing. Each run has one thread and a process of its own, so that its seconds (of processor time, import aside) and
its peak memory are its own. Runs that the JSON holds are not made again.
"""

from __future__ import annotations

import gzip
import json
import multiprocessing
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent / "shared" / "data"
SETS = ("sst2", "trec6", "ag_news")
OTHERS = {"books, sst2 beside": ("amazon_domains", "sst2", 600)}  # set: its own rows, those of another domain, how many
ROWS = {"train": 200, "validation": 100, "test": 300}
SEEDS = range(5)


@dataclass(frozen=True)
class Entry:
    """A recipe of a benchmark: a shipped one, with changes and more ingredients.

    Args:
        recipe: a shipped name.
        sets: changes as ``--set`` takes them.
        first, last: ingredients that are put before and behind those of the last stage.
    """

    recipe: str
    sets: tuple[str, ...] = ()
    first: tuple[Any, ...] = ()
    last: tuple[Any, ...] = field(default=())

    def made(self) -> Any:
        from luthier.recipe.text import build, read

        plain = read(self.recipe, sets=[*self.sets, "max_length=64"]).to_dict()
        stage = plain["stages"][-1]
        stage["ingredients"] = [*self.first, *stage["ingredients"], *self.last]
        return build(plain, inside=self.recipe)


def rows(name: str) -> dict[str, Any]:
    """The first rows of each split after a seeded shuffle, as DataFrames."""
    import pandas as pd

    if not SHARED.is_dir():
        from luthier.sources import demo

        told, at, made = demo.rows().sample(frac=1, random_state=0), 0, {}
        for split, most in ROWS.items():
            made[split], at = told.iloc[at : at + most], at + most
        return made
    own, other, many = OTHERS.get(name, (name, "", 0))
    wanted = [(split, own, split, most) for split, most in ROWS.items()]
    made = {}
    for split, folder, file_name, most in [*wanted, *([("out_domain", other, "train", many)] if other else [])]:
        with gzip.open(SHARED / folder / f"{file_name}.jsonl.gz", "rt", encoding="utf-8") as file:
            told = [json.loads(line) for line in file]
        random.Random(0).shuffle(told)
        made[split] = pd.DataFrame(told[:most])[["text", "label"]]
    return made


def one(work: tuple[str, str, Entry, int]) -> dict[str, Any]:
    """One run."""
    import torch

    import luthier
    from luthier.outputs import kept

    torch.set_num_threads(1)
    name, called, entry, seed = work
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        report = luthier.fit(entry.made(), model="demo", data=rows(name), seed=seed, out=f"{folder}/run")
        test = kept(Path(report.path or ""))["test"]
    right = test.logits.argmax(axis=1) == test.targets
    return {
        "set": name,
        "recipe": called,
        "seed": seed,
        "accuracy": report.metrics["test"]["accuracy"],
        "nll": report.metrics["test"]["nll"],
        "ece": report.metrics["test"]["ece"],
        "validation": report.metrics["validation"]["accuracy"],
        "seconds": time.process_time() - begun,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "steps": sum(stage.steps for stage in report.stages),
        "right": "".join(str(int(each)) for each in right),
    }


def go(
    name: str,
    entries: dict[str, Entry],
    sets: Iterable[str] = SETS,
    work: Callable[[tuple[str, str, Entry, int]], dict[str, Any]] = one,
) -> list[dict[str, Any]]:
    """All runs that are not in NAME.json yet, by as many processes as the first argument says (2); writes NAME.json as it goes."""
    from luthier.jsonfile import write_whole

    file = HERE / f"{name}.json"
    known: list[dict[str, Any]] = json.loads(file.read_text())["runs"] if file.exists() else []
    done = {(run["set"], run["recipe"], run["seed"]) for run in known}
    wanted = [(name, called, entry, seed) for seed in SEEDS for name in sets for called, entry in entries.items()]
    left = [each for each in wanted if (each[0], each[1], each[3]) not in done]
    order = {(each[0], each[1], each[3]): at for at, each in enumerate(wanted)}
    context = multiprocessing.get_context("spawn")
    with context.Pool(int(sys.argv[1]) if len(sys.argv) > 1 else 2, maxtasksperchild=1) as pool:
        for run in pool.imap_unordered(work, left):
            known.append(run)
            known.sort(key=lambda run: order.get((run["set"], run["recipe"], run["seed"]), len(order)))
            told = {"rows": ROWS, "summary": summary(known), "runs": known}
            write_whole(file, json.dumps(told, indent=1) + "\n")
            print(len(known), "of", len(wanted), run, flush=True)
    return known


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Test accuracy by set and recipe over the seeds: mean, standard deviation (n - 1), worst; medians of seconds and memory."""
    told = []
    for name in dict.fromkeys(run["set"] for run in runs):
        for recipe in dict.fromkeys(run["recipe"] for run in runs):
            mine = [run for run in runs if (run["set"], run["recipe"]) == (name, recipe)]
            if len(mine) < 2:
                continue
            accuracy = [run["accuracy"] for run in mine]
            told.append(
                {
                    "set": name,
                    "recipe": recipe,
                    "seeds": len(mine),
                    "mean": statistics.mean(accuracy),
                    "sd": statistics.stdev(accuracy),
                    "worst": min(accuracy),
                    "nll": statistics.mean(run["nll"] for run in mine),
                    "seconds": statistics.median(run["seconds"] for run in mine),
                    "peak_bytes": statistics.median([run["peak_bytes"] for run in mine if "peak_bytes" in run] or [0]),
                }
            )
    return told


def table(runs: list[dict[str, Any]]) -> str:
    """The summary as a Markdown table."""
    lines = ["| set | recipe | mean | sd | worst seed | NLL | seconds | peak MB |", "|---|---|---|---|---|---|---|---|"]
    for row in summary(runs):
        peak = f"{row['peak_bytes'] / 1e6:.0f}" if row["peak_bytes"] else "–"
        lines.append(
            f"| {row['set']} | {row['recipe']} | {100 * row['mean']:.1f} | {100 * row['sd']:.1f} |"
            f" {100 * row['worst']:.1f} | {row['nll']:.3f} | {row['seconds']:.0f} | {peak} |"
        )
    return "\n".join(lines)


def against(runs: list[dict[str, Any]], reference: str) -> list[dict[str, Any]]:
    """The difference of each recipe's test accuracy to that of ``reference``, paired by seed and row, as ``luthier compare`` tells it.

    low, high: of the 95 % interval for other seeds and other test rows, uncorrected. p: corrected by Holm over all recipes and sets.
    """
    from luthier.statistics.paired import difference
    from luthier.statistics.verdict import Pair, verdicts

    right = {(run["set"], run["recipe"], run["seed"]): [each == "1" for each in run["right"]] for run in runs}
    pairs = []
    for name, recipe in dict.fromkeys((run["set"], run["recipe"]) for run in runs if run["recipe"] != reference):
        seeds = [seed for seed in SEEDS if (name, recipe, seed) in right and (name, reference, seed) in right]
        if len(seeds) > 1:
            one, other = ([right[name, each, seed] for seed in seeds] for each in (recipe, reference))
            pairs.append(Pair(recipe, reference, name, difference(one, other)))
    return [
        {
            "set": found.pair.on,
            "recipe": found.pair.one,
            "difference": found.interval.value,
            "low": found.interval.low,
            "high": found.interval.high,
            "p": found.p_adjusted,
            "claimed": found.claimed,
        }
        for found in verdicts(pairs, test="t")
    ]


def differences(told: list[dict[str, Any]]) -> str:
    """What ``against`` found as a Markdown table, a column a set; a star where the difference is claimed."""
    sets = list(dict.fromkeys(row["set"] for row in told))
    lines = ["| recipe | " + " | ".join(sets) + " |", "|---" * (len(sets) + 1) + "|"]
    for recipe in dict.fromkeys(row["recipe"] for row in told):
        cells = []
        known = {row["set"]: row for row in told if row["recipe"] == recipe}
        for row in map(known.get, sets):
            if row is None:
                cells.append("–")
                continue
            value, low, high = (100 * row[key] for key in ("difference", "low", "high"))
            cells.append(f"{value:+.1f} [{low:+.1f}, {high:+.1f}]" + "*" * row["claimed"])
        lines.append(f"| {recipe} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def costs(runs: list[dict[str, Any]], references: Iterable[str]) -> str:
    """Seconds of each recipe as a multiple of each reference's, and MB of peak memory more, as a Markdown table.

    Paired by set and seed, the median over all pairs.
    """
    known = {(run["set"], run["recipe"], run["seed"]): run for run in runs}
    references = list(references)
    heads = [f"{what} {reference}" for reference in references for what in ("time x", "MB over")]
    lines = ["| recipe | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for recipe in dict.fromkeys(run["recipe"] for run in runs):
        cells = []
        for reference in references:
            mine = [(one, known.get((one["set"], reference, one["seed"]))) for one in runs if one["recipe"] == recipe]
            pairs = [(one, other) for one, other in mine if other]
            if not pairs:
                cells += ["–", "–"]
                continue
            cells.append(f"{statistics.median(one['seconds'] / other['seconds'] for one, other in pairs):.2f}")
            more = statistics.median(one["peak_bytes"] - other["peak_bytes"] for one, other in pairs)
            cells.append(f"{more / 1e6:+.0f}")
        lines.append(f"| {recipe} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(name: str, runs: list[dict[str, Any]]) -> None:
    """A dot a seed and a bar at the mean, one panel a set; readable in grey."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "luthier"
    import matplotlib.pyplot as plt

    recipes = list(dict.fromkeys(run["recipe"] for run in runs))[::-1]
    sets = list(dict.fromkeys(run["set"] for run in runs))
    size = (max(6.5, 3.7 * len(sets)), 1.2 + 0.32 * len(recipes))
    figure, panels = plt.subplots(1, len(sets), figsize=size, sharey=True, squeeze=False)
    for panel, each in zip(panels[0], sets, strict=True):
        for at, recipe in enumerate(recipes):
            accuracy = [100 * run["accuracy"] for run in runs if (run["set"], run["recipe"]) == (each, recipe)]
            panel.plot(accuracy, [at] * len(accuracy), "o", color="#1f5a8a", alpha=0.6, markersize=5)
            if accuracy:
                panel.plot([statistics.mean(accuracy)] * 2, [at - 0.3, at + 0.3], color="black", linewidth=2)
        panel.set_title(each)
        panel.set_xlabel("test accuracy (%)")
        panel.grid(axis="x", color="#dddddd")
    panels[0][0].set_yticks(range(len(recipes)), recipes)
    figure.suptitle(f"{ROWS['train']} training rows, {len(SEEDS)} seeds (dots), their mean (bars); MiniLM")
    figure.tight_layout()
    figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})
