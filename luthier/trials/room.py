"""Room on the disk for the weights that the runs of a comparison keep."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from luthier.errors import Fault, LuthierError
from luthier.narrate import Narrator
from luthier.trials.design import Design
from luthier.trials.desk import Desk
from luthier.units import size

MUCH = 1_000_000_000  # bytes of which it is told


def room(design: Design, weights: Mapping[str, int], desk: Desk, say: Narrator) -> None:
    """Tells how much the runs that are not done will keep, if that is much; what searches try comes on top.

    Args:
        weights: by setting, bytes of a run's weights.
    Raises:
        LuthierError: it is more than there is room for.
    """
    left = [trial for trial in design.trials() if not desk.done(trial)]
    needed = sum(weights[trial.setting] for trial in left) if design.weights else 0
    free = shutil.disk_usage(_there(desk.path)).free
    if needed > free:
        got = f"{size(free)} for {size(needed)}, the weights of {len(left):,} runs"
        do = "Make room, choose another --out, or say --no-weights: then runs keep their outputs and reports only."
        raise LuthierError.of([Fault(str(desk.path), "must have room for the runs", got, do)], "the comparison")
    if needed > MUCH:
        say.line(
            f"{len(left):,} runs will keep {size(needed)} of weights ({size(free)} are free); --no-weights keeps none"
        )


def _there(path: Path) -> Path:
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
