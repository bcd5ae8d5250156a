"""fit: from a recipe, a model and data to a Report, through a run folder that can be gone on with at any time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.call import Call
from luthier.errors import LuthierError
from luthier.folder import RunFolder, refuse
from luthier.jsonfile import expanded
from luthier.narrate import Narrator, Silent
from luthier.placement import Placement
from luthier.quick import keep_memory
from luthier.recipe import text as recipes
from luthier.recipe.recipe import Recipe
from luthier.report import Report
from luthier.stock import Stock
from luthier.training.fitting import Fitting, Saving
from luthier.training.job import Columns, prepare


def fit(
    recipe: str | Path | Recipe,
    *,
    model: Any,
    data: Any = None,
    out: str | Path | None = None,
    seed: int | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    task: str | None = None,
    ood: Mapping[str, Any] | None = None,
    out_domain: Any = None,
    label_map: Mapping[str, Mapping[str, str]] | None = None,
    sets: Sequence[str] = (),
    resume: bool = False,
    save_every: int | None = None,
    save_share: float | None = None,
    keep_stages: bool = False,
    pause_at: float | None = None,
    trackers: Sequence[str] = (),
    narrator: Narrator | None = None,
    stock: Stock | None = None,
) -> Report:
    """Fine-tunes ``model`` on ``data`` as ``recipe`` says.

    Args:
        recipe: a shipped name (``lp-ft``), a YAML file, or a Recipe.
        model: a local folder, a hub id, ``demo``, or (model, tokenizer).
        data: a file, a folder, a DataFrame, a datasets.Dataset, a dict of these by split, or a hub id; None = as the recipe says.
        out: the run folder; None keeps nothing on disk.
        seed: goes before the recipe's.
        text, text_pair, label: columns of the data; None infers them.
        task: ``classification`` or ``regression``; None decides from the labels.
        ood: more shifted tests, by name.
        out_domain: training rows of another domain, for recipes whose stages ask for some.
        label_map: for shifted tests whose labels are named otherwise: name -> {their label: your label}.
        sets: changes to the recipe, such as ``stages.1.lr=3e-5``.
        resume: go on with the run in ``out``; a run that has ended gives its report back.
        save_every: optimizer steps between checkpoints; None = every two minutes and at every stage's end.
        save_share: instead, as often as takes up to this share of the time (0.05), and every two minutes at least.
        keep_stages: keep the weights at the end of each stage but the last, as ``stages/NAME.safetensors`` in ``out``, for ``study``.
        pause_at: the share of the trained steps, all stages together, after which the run stops with a checkpoint; ``resume=True``
            without it goes on, to the same bits as without a pause. A run that has ended by then is not touched.
        trackers: names of trackers for Accelerate; none by default.
        narrator: who says what happens; None says nothing.
        stock: what this run shares with others; it changes no bit.
    Returns:
        the report; also saved in ``out`` as report.json and report.html, beside ``model/``.
    Raises:
        LuthierError: something was wrong before the first step (nothing was written), or the run could not go on (what it had saved
            is still there, and ``resume=True`` goes on from it).
        Paused: it has come to ``pause_at``; its scores on validation are with the error and in ``out``, as paused.json.
    """
    say, out = narrator or Silent(), None if out is None else expanded(out)
    if pause_at is not None and (out is None or not 0 < pause_at < 1):
        raise LuthierError(f"pause_at must be in (0, 1), with out, the run folder to go on from; got {pause_at}.")
    if keep_stages and out is None:
        raise LuthierError("keep_stages needs out, the run folder that the stages' weights are kept in.")
    keep_memory()
    known = recipes.read(recipe, sets=[*sets, *([f"task={task}"] if task else [])], seed=seed)
    place = str(out) if out is not None else None
    settings = Placement(precision=known.precision, compile=known.compile, trackers=trackers, folder=place)
    if not settings.main:
        say = Silent()
    elif out is not None:
        refuse(out, resume=resume)
    job = prepare(
        known,
        model=model,
        data_source=known.source("in", data),
        columns=Columns(text, text_pair, label),
        ood=ood,
        out_domain=known.source("out", out_domain),
        label_map=label_map,
        voids=settings.voids(),
        narrator=say,
        stock=stock,
    )
    if pause_at is not None and "validation" not in job.encoded:
        raise LuthierError("pause_at needs validation rows, which a run that pauses is judged by.")
    say.show(job.plan)
    saving = Saving(save_every, save_share, keep_stages, pause_at)
    if out is None:
        return Fitting(job, settings, None, say, saving).go(resume=False)
    folder = RunFolder(out, resume=resume, identity=job.identity, surroundings=settings.described(), main=settings.main)
    try:
        if folder.done:
            say.line(f"{folder.path} holds a run that has ended; its report is given back")
            return Report.load(folder.path)
        folder.write("recipe.yaml", recipes.write(job.recipe))
        folder.write_json("plan.json", job.plan.to_json())
        if folder.main:
            Call.of(
                model=model,
                data=known.source("in", data),
                text=text,
                text_pair=text_pair,
                label=label,
                ood=ood,
                out_domain=known.source("out", out_domain),
                label_map=label_map,
            ).save(folder.path)
        return Fitting(job, settings, folder, say, saving).go(resume=resume)
    finally:
        folder.close()
