"""The comparison that one would show a colleague: every shipped recipe for one domain, five seeds, three sets, MiniLM.

Recipes are run as they are shipped (texts are cut to 64 tokens), on the first 200 training rows of each set; the other recipes are
compared with mosbach, the baseline of the literature for small data, which was fixed before the first run. The page, its numbers and a
picture are written into docs/results.

    PYTHONPATH=. python benchmarks/house.py FOLDER     (about an hour on two cores; called again, it goes on)
"""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import grid

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
ROWS = {"train": 200, "validation": 100, "test": 300}
OUTSIDE = 150  # rows of each shifted test
SHIFTS = {"sst2": ("yelp", "tweets", "customer"), "trec6": (), "cola": ()}
AGAINST = "mosbach"


def recipes() -> list[str]:
    """All that are shipped, but for those that want rows of another domain."""
    from luthier.recipe import shipped
    from luthier.recipe.text import read

    names = [name for name in shipped.names() if "out_domain" not in str(read(name).to_dict()["stages"])]
    return [AGAINST, *(name for name in names if name != AGAINST)]


def rows(name: str) -> dict[str, list[dict[str, Any]]]:
    """Rows by file name: the first of each split after a seeded shuffle."""
    if not grid.SHARED.is_dir():
        from luthier.sources import demo

        told = demo.rows().sample(frac=1, random_state=0).to_dict("records")
        ends = [sum(list(ROWS.values())[:at]) for at in range(len(ROWS) + 1)]
        return {split: told[ends[at] : ends[at + 1]] for at, split in enumerate(ROWS)}
    made = {}
    for split, most in [*ROWS.items(), *((f"ood_{shift}", OUTSIDE) for shift in SHIFTS[name])]:
        with gzip.open(grid.SHARED / name / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            every = [json.loads(line) for line in file]
        random.Random(0).shuffle(every)
        made[split] = [{"text": row["text"], "label": row["label"]} for row in every[:most]]
    return made


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # so that no path of this machine is in what is told
    names = list(SHIFTS) if grid.SHARED.is_dir() else ["demo_rows"]
    for name in names:
        for split, told in rows(name).items():
            file = Path(name) / f"{split}.jsonl"
            file.parent.mkdir(exist_ok=True)
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in told)
            if not file.exists():
                file.write_text(text, encoding="utf-8")
    from luthier.narrate import Plain
    from luthier.page import compared
    from luthier.trials.comparing import compare

    found = compare(
        recipes(),
        model="demo",
        data=names,
        out="house",
        seeds=len(grid.SEEDS),
        against=AGAINST,
        sets=["max_length=64"],
        workers=2,
        narrator=Plain(),
    )
    print(found)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in ("comparison.json", "compare.html"):
        shutil.copy(Path("house") / name, RESULTS / name)
    for setting in found.settings:
        (RESULTS / f"{setting.name}.svg").write_text(compared.picture(found, setting.name), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/house"))
