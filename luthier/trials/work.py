"""What a worker does: take a run that no one has, do it, take the next. Workers know of each other only through the desk's locks."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from luthier.engine import fit
from luthier.errors import LuthierError
from luthier.narrate import Narrator, Silent
from luthier.stages import Stopped
from luthier.stock import Stock
from luthier.trials.asking import GOES_ON, interruptible
from luthier.trials.design import Design, Trial
from luthier.trials.desk import Desk

SAVE_SHARE = 0.05  # of the time, for checkpoints
WAIT = 1.0  # seconds between looks at runs that others have


def work(
    folder: str | Path,
    *,
    only: Sequence[str] = (),
    narrator: Callable[[Trial], Narrator] = lambda trial: Silent(),
    stock: Stock | None = None,
    save_every: int | None = None,
) -> int:
    """Does the runs of the comparison in ``folder`` that are left, until none is; what others have under way is left to them.

    Args:
        only: names of runs; all without.
        narrator: who says what a run does.
        stock: what runs share; kept beside them without.
        save_every: steps between checkpoints, which is what a killed process loses at most; None makes as many as take a twentieth of
            the time.
    Returns:
        how many runs were done here.
    Raises:
        Stopped: someone asked to stop; the run that was under way is saved.
        LuthierError: there is no comparison in ``folder``, or no such run.
    """
    desk, design = Desk(Path(folder)), Design.load(Path(folder))
    shared = stock or Stock(desk.shared)
    known = {trial.name: trial for trial in design.trials()}
    if missing := [name for name in only if name not in known]:
        raise LuthierError(f"{', '.join(missing)}: no such run in {folder}.  There are: {', '.join(known)}.")
    left = [known[name] for name in only] or list(known.values())
    done = 0
    try:
        with interruptible():
            while left:
                before = len(left)
                for trial in left:
                    with desk.claimed(trial) as mine:
                        if mine:
                            one(desk, design, trial, narrator(trial), shared, save_every)
                            done += 1
                left = [trial for trial in left if desk.state(trial) in ("open", "running")]
                if len(left) == before:
                    time.sleep(WAIT)  # others have them; one that they let go of is taken
    except KeyboardInterrupt:
        raise Stopped(GOES_ON) from None
    return done


def one(
    desk: Desk, design: Design, trial: Trial, narrator: Narrator, stock: Stock, save_every: int | None = None
) -> None:
    """Does one run, or goes on with it; an error is written down, and ends this run only."""
    try:
        fit(
            design.recipe(trial),
            **design.call(trial).arguments(),
            out=desk.run(trial),
            resume=True,
            save_every=save_every,
            save_share=SAVE_SHARE,
            narrator=narrator,
            stock=stock,
        )
    except Stopped as stopped:
        raise Stopped(GOES_ON) from stopped
    except LuthierError as error:
        desk.fail(trial, str(error))
    except Exception:
        desk.fail(trial, traceback.format_exc())
