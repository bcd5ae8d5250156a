"""Five seeds of lp-ft: one ``luthier compare`` against five calls of ``luthier fit``; seconds of whole processes, the demo's data.

Both do the same work, and with one worker the weights are the same to the bit (a test shows it). ``compare`` starts once, reads and
tokenises once and solves the probe once; with two workers it does two runs at a time on one core each. PYTHONPATH=. python
benchmarks/compare_speed.py (about ten minutes on a quiet machine of two cores)
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import write

SEEDS = 5
DEMO = ["--demo", "--set", "stages.finetune.epochs=1"]


def luthier(*words: str) -> float:
    """Seconds of one call."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "luthier", *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        fits = [
            luthier("fit", "--recipe", "lp-ft", *DEMO, "--seed", str(seed), "--out", str(Path(folder) / f"fit{seed}"))
            for seed in range(SEEDS)
        ]
        compared = {
            str(workers): luthier(
                *("compare", "--recipe", "lp-ft", *DEMO, "--seeds", str(SEEDS), "--workers", str(workers)),
                *("--out", str(Path(folder) / f"compare{workers}")),
            )
            for workers in (1, 2)
        }
    ratios = {workers: seconds / sum(fits) for workers, seconds in compared.items()}
    write("compare_speed", {"fit_seconds": fits, "compare_seconds": compared, "ratio": ratios, "seeds": SEEDS})


if __name__ == "__main__":
    main()
