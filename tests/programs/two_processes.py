"""Run under torchrun by tests/test_processes.py: fits the little job and saves the run folder.

Arguments: model, out, rows in a step, rows in a forward pass (0: all), and ``stop``: after three steps the second process, and only it,
is asked to stop; or ``resume``: the run goes on.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import luthier
from luthier.run import Run
from luthier.training.stages import Stopped
from tests.little import recipe, sentences


def ask_one_to_stop() -> None:
    """The process of rank 1 gets SIGTERM after its third step."""
    step, taken = Run.step, []  # no run is held: it would hold the group of processes

    def counted(run: Run, take: Any = None) -> None:
        step(run, take)
        taken.append(1)
        if len(taken) == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    Run.step = counted  # type: ignore[method-assign]


def part_or_fail() -> None:
    """A thread of the group that is still there when Python ends can abort the process: then it ends with 3."""
    threads = [Path(task.path, "comm").read_text() for task in os.scandir("/proc/self/task")]
    if any("gloo" in name for name in threads):
        os._exit(3)


if (
    sys.platform == "linux" and "ACCELERATE_USE_FSDP" not in os.environ
):  # torch holds the group of sharded tensors to the end
    atexit.register(part_or_fail)  # the first that is registered is the last that is called
torch.set_num_threads(1)
model, out, batch, micro = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]) or None
made = recipe([{"swa": {"start": 0.3}}, "adamw", "clip"], probe=True, batch_size=batch, micro_batch=micro)
stops = "stop" in sys.argv[5:]
if stops:
    ask_one_to_stop()
try:
    luthier.fit(made, model=model, data=sentences(), out=out, resume="resume" in sys.argv[5:])
except Stopped:
    sys.exit(0 if stops else 1)
sys.exit(1 if stops else 0)
