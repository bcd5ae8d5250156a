"""What a worker does: take a run that no one has, do it, take the next. Workers know of each other only through the desk's locks."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from luthier.errors import LuthierError
from luthier.jsonfile import expanded
from luthier.narrate import Narrator, Silent
from luthier.stock import Stock
from luthier.training.engine import fit
from luthier.training.stages import Paused, Stopped
from luthier.trials.asking import GOES_ON, interruptible
from luthier.trials.design import Design, Trial
from luthier.trials.desk import Desk
from luthier.trials.early import turns
from luthier.trials.searched import resolved, search, waiting

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

    A recipe's search comes before its runs.

    Args:
        only: names of runs; all without.
        narrator: who says what a run does.
        stock: what runs share; kept beside them without.
        save_every: steps between checkpoints, which is what a killed process loses at most; None makes as many as take a twentieth of
            the time.
    Returns:
        how many runs were done here, or brought to their pause.
    Raises:
        Stopped: someone asked to stop; the run that was under way is saved.
        LuthierError: there is no comparison in ``folder``, or no such run.
    """
    folder = expanded(folder)
    desk, design = Desk(folder), Design.load(folder)
    shared = stock or Stock(desk.shared)
    known = [trial.name for trial in design.trials()]
    if missing := [name for name in only if name not in known]:
        raise LuthierError(f"{', '.join(missing)}: no such run in {folder}.  There are: {', '.join(known)}.")
    done = 0

    def do(trial: Trial, now: Design, share: float | None = None) -> None:
        one(desk, now, trial, narrator(trial), shared, save_every, share)

    def searching(now: Design) -> set[tuple[str, str]]:
        mine = {(trial.setting, trial.recipe) for trial in now.trials() if not only or trial.name in only}
        return waiting(desk, now) & mine

    try:
        with interruptible():
            while True:
                before = done
                design = Design.load(desk.path)  # recipes may have come, and searches got more budget
                done += search(desk, design, do, searching(design))
                left = [turn for turn in turns(desk, design) if not only or turn[0].name in only]
                if not left and not searching(design):
                    break
                for trial, share in left:
                    if (trial.setting, trial.recipe) in searching(design):
                        continue
                    with desk.claimed(trial) as mine:
                        now = Design.load(desk.path)
                        held = (trial.setting, trial.recipe) in searching(now)
                        if mine and not held and (share is None or desk.paused(trial) is None):
                            do(trial, resolved(desk, now), share)
                            done += 1
                if done == before:
                    time.sleep(WAIT)  # others have them; one that they let go of is taken
    except KeyboardInterrupt:
        raise Stopped(GOES_ON) from None
    return done


def one(
    desk: Desk,
    design: Design,
    trial: Trial,
    narrator: Narrator,
    stock: Stock,
    save_every: int | None = None,
    pause_at: float | None = None,
) -> None:
    """Does one run, or goes on with it, to its end or its pause; an error is written down, and ends this run only."""
    begun = time.monotonic()
    try:
        fit(
            design.recipe(trial),
            **design.call(trial).arguments(),
            out=desk.run(trial),
            resume=True,
            save_every=save_every,
            save_share=SAVE_SHARE,
            pause_at=pause_at,
            narrator=narrator,
            stock=stock,
        )
        if not design.weights:
            desk.drop_weights(trial)
    except Stopped as stopped:
        raise Stopped(GOES_ON) from stopped
    except Paused:
        pass  # what there is to know is in its folder
    except LuthierError as error:
        desk.fail(trial, str(error), time.monotonic() - begun)
    except Exception:
        desk.fail(trial, traceback.format_exc(), time.monotonic() - begun)


def failures(folder: str | Path, only: Sequence[str]) -> list[str]:
    """A line for each run of ``only`` that has failed, with the last line of its error."""
    folder = expanded(folder)
    desk, design = Desk(folder), Design.load(folder)
    told = {trial.name: desk.failure(trial) for trial in design.trials() if trial.name in only}
    return [f"{name} failed: {why.strip().splitlines()[-1]}" for name, why in told.items() if why]
