"""compare: which recipe wins on one's own data. A driver above the engine; nothing in a stage knows of it."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from luthier.call import Call
from luthier.comparison import Comparison
from luthier.errors import LuthierError
from luthier.jsonfile import expanded, unwritable
from luthier.narrate import Narrator, Silent
from luthier.stock import alone
from luthier.trials import design as designs
from luthier.trials import gather as gathering
from luthier.trials import workers as crews
from luthier.trials.checks import check
from luthier.trials.design import Asked, Design
from luthier.trials.desk import Desk
from luthier.trials.early import turns
from luthier.trials.places import On, Place
from luthier.trials.reading import Recipes, read
from luthier.trials.room import room
from luthier.trials.searched import refuse_under_way, searches, waiting
from luthier.trials.sources import stored
from luthier.trials.watch import Watch


def compare(
    recipes: Recipes,
    *,
    model: Any,
    data: Any = None,
    out: str | Path,
    seeds: int | Sequence[int] | None = None,
    vary: Sequence[str] = (),
    metric: str | None = None,
    against: str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    task: str | None = None,
    ood: Mapping[str, Any] | None = None,
    out_domain: Any = None,
    label_map: Mapping[str, Mapping[str, str]] | None = None,
    sets: Sequence[str] = (),
    search: Sequence[str] = (),
    budget: int | str | None = None,
    early: str | None = None,
    weights: bool | None = None,
    workers: int = 1,
    on: On = "local",
    slurm: Mapping[str, Any] | None = None,
    save_every: int | None = None,
    narrator: Narrator | None = None,
) -> Comparison:
    """Runs every recipe with every seed, and says what the differences are worth.

    The folder is the truth: runs that are done are not made again, a comparison that was stopped goes on when it is called again, and a
    second call with more recipes, seeds, data or models adds them.

    Args:
        recipes: shipped names, files or Recipes; ``NAME=RECIPE`` or a dict gives them other names.
        model, data: as ``fit`` takes them; a list means each with each. What lies in memory is written into ``out``.
        out: the folder of the comparison.
        seeds: how many, or which; when not given those of the comparison that is there, and 5 for a new one.
        vary: streams (head, order, dropout) that get the seeds each by itself, a full grid; empty varies all together.
        metric: what is compared; None = what the comparison that is there says, or the task's own.
        against: the one recipe that all others are compared with; None = what the comparison that is there says, or all pairs, which
            needs more seeds.
        text, text_pair, label, task, ood, out_domain, label_map: as ``fit`` takes them.
        sets: changes to all recipes (``max_length=128``), or to one (``ft:stages.finetune.epochs=10``).
        search: settings to be found before the runs, ``PATH=SPACE`` for all recipes that have PATH, or ``NAME:PATH=SPACE`` for one. A space
            is ``log:LOW:HIGH``, ``float:LOW:HIGH``, ``int:LOW:HIGH[:STEP]`` or ``one:A,B,C``. All runs have what was best on validation.
        budget: of search for each recipe that has a space: runs, or minutes of training (``"30min"``); None = 10 runs.
        early: such as ``start=20,share=0.3,keep=5``: 20 seeds of each recipe start, all pause after 0.3 of their steps, and the 5 best on
            validation go on. Those are no random sample of seeds, so no difference is claimed. None: all runs go to their end.
        weights: whether runs keep their weights when they have ended; without them they cannot predict, be studied, souped or rerun.
            None = as the comparison that is there has it, else they do.
        workers: how many runs at a time; 1 is this process. With more each has its share of the cores, which moves last bits.
        on: ``local``, this machine; ``ray``, the cluster at RAY_ADDRESS, or one of this machine; ``slurm``, jobs through submitit.
            Nodes must share ``out``, at the same path and with locks that count for all of them, and have Luthier installed.
        slurm: parameters of a job, such as ``{"partition": "gpu", "timeout_min": 240, "gpus_per_node": 1}``.
        save_every: steps between checkpoints, which is what a killed process loses at most; None makes as many as take a twentieth of
            the time: for a model of 22 million weights on one core about every 20 seconds.
        narrator: who says what happens.
    Returns:
        the comparison; also saved in ``out`` as comparison.json and compare.html.
    Raises:
        LuthierError: something is wrong with a recipe, the data or the model, before the first run.
        RunError: every run has failed.
        Stopped: it was asked to stop; the same call goes on from there.
    """
    place = Place(on, workers, slurm or {}, save_every)
    place.check()
    design = designed(
        recipes,
        model=model,
        data=data,
        out=out,
        seeds=seeds,
        vary=vary,
        metric=metric,
        against=against,
        text=text,
        text_pair=text_pair,
        label=label,
        task=task,
        ood=ood,
        out_domain=out_domain,
        label_map=label_map,
        sets=sets,
        search=search,
        budget=budget,
        early=early,
        weights=weights,
        narrator=narrator,
    )
    return finish(Desk(expanded(out)), design, narrator or Silent(), place)


def designed(
    recipes: Recipes,
    *,
    model: Any,
    data: Any = None,
    out: str | Path,
    seeds: int | Sequence[int] | None = None,
    vary: Sequence[str] = (),
    metric: str | None = None,
    against: str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    task: str | None = None,
    ood: Mapping[str, Any] | None = None,
    out_domain: Any = None,
    label_map: Mapping[str, Mapping[str, str]] | None = None,
    sets: Sequence[str] = (),
    search: Sequence[str] = (),
    budget: int | str | None = None,
    early: str | None = None,
    weights: bool | None = None,
    narrator: Narrator | None = None,
) -> Design:
    """What ``compare`` begins with: everything is checked, and the design is in ``out``, so that any process can do a run of it.

    Args and errors are those of ``compare``.
    """
    say = narrator or Silent()
    desk = Desk(expanded(out))
    _refuse(desk.path)
    before = _there(desk)
    if before is not None:
        metric, against = metric or before.metric, against or before.against
    told = read(
        recipes,
        sets=[*sets, *([f"task={task}"] if task else [])],
        metric=metric,
        against=None if before is not None and against in before.recipes else against,
        seeds=seeds,
        vary=vary,
        early=early,
        search=search,
        budget=budget,
    )
    with _undone(desk.path):
        calls = [
            Call.of(
                model=stored(one, desk.path / _numbered("model", at)),
                data=stored(rows, desk.path / _numbered("data", number)),
                text=text,
                text_pair=text_pair,
                label=label,
                ood={name: stored(each, desk.path / f"ood_{name}") for name, each in (ood or {}).items()},
                out_domain=stored(out_domain, desk.path / "out_domain"),
                label_map=label_map,
            )
            for at, one in enumerate(_several(model))
            for number, rows in enumerate(_several(data))
        ]
        plain = {
            name: {
                **recipe.to_dict(),
                "seed": 0,
                "seeds": {"split": split} if (split := recipe.seed_of("split")) else None,
            }
            for name, recipe in told.recipes.items()
        }
        keep = (before is None or before.weights) if weights is None else weights
        asked = Design(plain, _settings(calls), told.seeds, metric, against, told.more, keep)
        if before is not None:
            if seeds is None and before.seeds[0].keys() == told.seeds[0].keys():
                asked = dataclasses.replace(asked, seeds=before.seeds)
            asked = _grown(asked, before, desk)
        room(asked, check(asked, say, desk), desk, say)
        with alone(desk.path / "locks" / "design.lock"):
            now = _there(desk)
            if now is not None and now != before:  # another call has added to it since
                asked = _grown(asked, now, desk)
            asked.save(desk.path)
    for trial in asked.trials():
        desk.forgive(trial)
    for one in searches(desk, asked):
        one.again()
    return asked


def jobs(folder: str | Path, design: Design, save_every: int | None = None) -> list[str]:
    """A line of shell for each run that is left. Any number of processes may take them, in any order; one done twice does nothing."""
    desk = Desk(Path(folder))
    open_, held = {trial for trial, _ in turns(desk, design)}, waiting(desk, design)
    left = [trial.name for trial in design.trials() if trial in open_ or (trial.setting, trial.recipe) in held]
    told = Place(save_every=save_every).arguments()
    return [shlex.join(["luthier", "work", str(desk.path.absolute()), name, *told]) for name in left]


def finish(desk: Desk, design: Design, say: Narrator, place: Place) -> Comparison:
    """Does what is left of a comparison, and tells it."""
    watch = Watch(desk, design, workers=max(1, place.workers))
    there = len(list(watch.news()))
    if there:
        say.line(f"{there} of {len(design.trials())} runs are done already")
    if there < len(design.trials()):
        crews.do(place, watch, say)
    return gather(desk.path, design)


def gather(folder: str | Path, design: Design | None = None, *, metric: str | None = None) -> Comparison:
    """What the runs in ``folder`` say, as they are now; writes comparison.json and compare.html there.

    Args:
        folder: of the comparison.
        design: what is compared; None = as ``folder`` says.
        metric: what they are compared by; None = as the comparison says. Where runs were chosen, by a search or early, it stays.
    Raises:
        LuthierError: there is no comparison in ``folder``, no run has ended, or the metric is none of them.
        RunError: none has ended well, and one has failed.
    """
    folder = expanded(folder)
    found = gathering.gather(folder, design, metric=metric)
    found.save(folder)
    from luthier.page import compared

    compared.save(found, folder)
    return found


def _there(desk: Desk) -> Design | None:
    return Design.load(desk.path) if (desk.path / designs.NAME).is_file() else None


def _grown(asked: Design, before: Design, desk: Desk) -> Design:
    grown = asked.grown(before)
    refuse_under_way(desk, before, grown)
    return grown


@contextmanager
def _undone(path: Path) -> Iterator[None]:
    """What is written into ``path`` inside is taken away again where that ends in an error, unless a comparison is there."""
    before = set(path.iterdir()) if path.is_dir() else None
    try:
        yield
    except BaseException:  # Ctrl-C too
        if path.is_dir() and not (path / designs.NAME).is_file():  # else others may be at work there
            for new in set(path.iterdir()) - (before or set()):
                shutil.rmtree(new) if new.is_dir() else new.unlink()
            if before is None:
                path.rmdir()
        raise


def _refuse(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise LuthierError(f"{path} is a file.  Choose another --out.")
    if why := unwritable(path):
        raise LuthierError(f"{path} cannot be made: {why}.  Choose another --out.")
    if path.is_dir() and any(path.iterdir()) and not (path / designs.NAME).is_file():
        raise LuthierError(f"{path} is not empty and holds no comparison.  Choose another --out; nothing was touched.")


def _several(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list) else [given]


def _numbered(name: str, at: int) -> str:
    return name if at == 0 else f"{name}-{at + 1}"


def _settings(calls: Sequence[Call]) -> tuple[Asked, ...]:
    """Each call by a short name of its own: that of its data, with that of its model where there are several."""
    models = {call.model for call in calls}
    made: dict[str, Asked] = {}
    for call in calls:
        rows = Path(call.data or "data").name.split(".")[0]
        name = f"{rows}-{Path(call.model or 'model').name}" if len(models) > 1 else rows
        name = "".join(letter if letter.isalnum() or letter in "._-+" else "-" for letter in name).lstrip(".") or "data"
        at, free = 0, name
        while free in made:
            at += 1
            free = _numbered(name, at)
        made[free] = Asked(free, call, free if len(calls) > 1 else "")
    return tuple(made.values())
