"""soup: the mean of the weights of several runs, or of those that help.

Source: Wortsman, Ilharco, Gadre, Roelofs, Gontijo-Lopes, Morcos, Namkoong, Farhadi, Carmon, Kornblith, Schmidt, ICML 2022, section 2
(arXiv:2203.05482).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from luthier.call import Call
from luthier.core.ingredient import Outputs
from luthier.core.scores import HIGHER_IS_BETTER, better
from luthier.errors import Fault, LuthierError, ModelError
from luthier.finished.reruns import gone, other_data
from luthier.finished.weights import weightless
from luthier.jsonfile import atomically, expanded, write_whole
from luthier.narrate import Narrator, Silent
from luthier.outputs import by_split, logits, scores
from luthier.recipe import text as recipes
from luthier.recipe.recipe import Recipe
from luthier.report import Report
from luthier.sources import data as sources
from luthier.sources import models, tasks
from luthier.sources.limits import pad_id
from luthier.sources.text import Encoded, encode

State = Mapping[str, Tensor]
_HELD = "Give --data with splits that none of the runs was trained on."


def mean(states: Sequence[State]) -> dict[str, Tensor]:
    """The mean of each tensor over ``states``, in double precision, in the first one's types; whole numbers are the first one's.

    Args:
        states: at least one; the same names and shapes.
    Source: section 2, the uniform soup.
    """
    made: dict[str, Tensor] = {}
    for name, first in states[0].items():
        if not first.is_floating_point():
            made[name] = first.clone()
            continue
        total = sum(state[name].double() for state in states)
        assert isinstance(total, Tensor)
        made[name] = (total / len(states)).to(first.dtype)
    return made


def greedy(
    count: int, order: Sequence[int], score: Callable[[Sequence[int]], float | None], *, higher: bool
) -> tuple[int, ...]:
    """Which of ``count`` models go into the pot: each is tried in ``order``, and stays when the score is no worse.

    Args:
        order: numbers of the models, the best alone first.
        score: of the mean of some of them, on validation rows; None, where it is not defined, is the worst.
    Source: recipe 1 of section 2.
    """
    kept = [order[0]]
    best = score(kept)
    for number in order[1:count]:
        value = score([*kept, number])
        if value is not None and (value == best or better(value, best, higher=higher)):
            kept, best = [*kept, number], value
    return tuple(kept)


@dataclass(frozen=True)
class Soup:
    """What was cooked.

    Args:
        runs: the folders it was made from, in the order in which they were given.
        kept: those whose weights are in the mean.
        how: ``uniform`` or ``greedy``.
        metric: what was compared.
        metrics: scores by split of the soup; ``ood`` holds the shifted tests by name.
        each: the same of each run, scored here.
        notes: what a reader should know.
    """

    runs: tuple[str, ...]
    kept: tuple[str, ...]
    how: str
    metric: str
    metrics: Mapping[str, Any]
    each: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """The scores as a table: each run, those in the mean marked, then the soup."""
        splits = [name for name, value in self.metrics.items() if name != "ood" and value]
        names = [*splits, *(f"ood {name}" for name in self.metrics["ood"])]

        def row(called: str, found: Mapping[str, Any]) -> str:
            told = [found[name] for name in splits] + [found["ood"][name] for name in self.metrics["ood"]]
            return f"  {called:<40.40}" + "".join(f"{_shown(one[self.metric]):>12}" for one in told)

        head = f"  {self.metric:<40}" + "".join(f"{name:>12.12}" for name in names)
        marked = [row(("* " if run in self.kept else "  ") + run, self.each[run]) for run in self.runs]
        return [head, *marked, row(f"  {self.how} soup", self.metrics), *self.notes]


def soup(
    runs: Sequence[str | Path],
    *,
    out: str | Path,
    data: Any = None,
    how: Literal["uniform", "greedy"] = "greedy",
    ood: Mapping[str, Any] | None = None,
    narrator: Narrator | None = None,
) -> Soup:
    """Averages the weights of runs that started from one pretrained model, and saves a model folder with its scores.

    Args:
        runs: at least two run folders that have ended, of one model, one task and the same labels.
        out: a new folder: ``model/`` and ``soup.json``.
        data: what it is scored on: rows that no run was trained on; None = the rows that all the runs held out, read again.
        how: ``uniform`` takes all; ``greedy`` adds them one by one, the best on validation first, and keeps what does no harm there.
        ood: more shifted tests, by name.
        narrator: who says what happens.
    Raises:
        LuthierError: the runs do not fit together, their data is not what it was or was not split alike, ``out`` is not empty, or there
            are no validation rows to be greedy on.
    """
    say = narrator or Silent()
    target = expanded(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise LuthierError(f"{target} is not empty.  Choose another --out; nothing was touched.")
    folders = [expanded(run) for run in runs]
    reports = _reports(folders, alike=data is None)
    first = reports[0]
    task, encoded, model, tokenizer = _pot(reports, folders, data, ood)
    if how == "greedy" and "validation" not in encoded:
        raise LuthierError(
            "a greedy soup needs validation rows, and there are none.  Give --data, or say --how uniform."
        )
    states = [dict(models.reload(folder / "model").state_dict()) for folder in folders]
    _alike(states, folders)
    pad = pad_id(model, tokenizer)

    def scored(state: State, splits: Sequence[str]) -> dict[str, Any]:
        model.load_state_dict(state)
        return {
            name: scores(task, Outputs(logits(model, encoded[name], pad_id=pad), encoded[name].targets))  # type: ignore[arg-type]
            for name in splits
        }

    splits = [name for name in encoded if name != "train"]
    metric = first.metric
    each = []
    with say.bar("scoring each run", len(folders)) as bar:
        for state in states:
            each.append(scored(state, splits))
            bar.advance(1)
    kept: tuple[int, ...] = tuple(range(len(folders)))
    if how == "greedy":
        higher = HIGHER_IS_BETTER[metric]

        def held(found: Mapping[str, Any]) -> float | None:
            value = found["validation"][metric]
            return float(value) if value is not None and math.isfinite(value) else None

        def rank(number: int) -> float:
            value = held(each[number])
            return math.inf if value is None else -value if higher else value

        def tried(some: Sequence[int]) -> float | None:
            return held(scored(mean([states[number] for number in some]), ["validation"]))

        kept = greedy(len(folders), sorted(kept, key=rank), tried, higher=higher)
    final = mean([states[number] for number in kept])
    made = Soup(
        tuple(map(str, folders)),
        tuple(str(folders[number]) for number in kept),
        how,
        metric,
        by_split(scored(final, splits)),
        {str(folder): by_split(one) for folder, one in zip(folders, each, strict=True)},
        _notes(how, kept, reports),
    )

    def write(beside: Path) -> None:
        (beside / "model").mkdir(parents=True)
        models.store(model, tokenizer, beside / "model")
        write_whole(beside / "soup.json", json.dumps(asdict(made), indent=1) + "\n")

    if target.exists():
        target.rmdir()
    atomically(target, write)
    return made


def _reports(folders: Sequence[Path], *, alike: bool) -> list[Report]:
    """The runs' reports; ``alike``: whether their data must be the same, split in the same way."""
    faults = []
    ended = []
    for folder in folders:
        if not (folder / "report.json").is_file():
            faults.append(Fault(str(folder), "must be the folder of a run that has ended"))
            continue
        faults += weightless(folder)
        ended.append((folder, Report.load(folder)))
    if len(folders) < 2:
        faults.append(Fault("runs", "must be two or more", str(len(folders))))
    for folder, report in ended[1:]:
        first, one = ended[0]
        if report.labels != one.labels or report.task != one.task:
            faults.append(Fault(str(folder), f"must have the labels of {first}", ", ".join(report.labels)))
        if report.model.get("pretrained") != one.model.get("pretrained"):
            must = f"must start from the pretrained model that {first} started from"
            faults.append(Fault(str(folder), must, str(report.model["source"])))
        if alike and report.data["digest"] != one.data["digest"]:
            seeds = [_recipe(at).seed_of("split") for at in (folder, first)]
            got = "other rows" if seeds[0] == seeds[1] else f"a split by seed {seeds[0]}, and not {seeds[1]}"
            faults.append(Fault(str(folder), f"must have the data of {first}, split alike", got, _HELD))
    _refuse(faults)
    return [report for _, report in ended]


def _pot(
    reports: Sequence[Report], folders: Sequence[Path], data: Any, ood: Mapping[str, Any] | None
) -> tuple[tasks.Task, dict[str, Encoded], torch.nn.Module, Any]:
    first, folder = reports[0], folders[0]
    found = _again(first, folder, ood or {}) if data is None else _other(first, folders, data, ood)
    task = tasks.Classification(first.labels) if first.task == "classification" else tasks.Regression()
    tokenizer = models.reload_tokenizer(folder / "model")
    length = int(first.model["max_length"])
    encoded = {
        name: encode(tokenizer, split, task.targets(split.labels or ()), max_length=length)
        for name, split in found.splits.items()
        if name not in ("train", "out_domain")
    }
    return task, encoded, models.reload(folder / "model"), tokenizer


def _again(report: Report, folder: Path, ood: Mapping[str, Any]) -> sources.Data:
    """The run's own data, split as it was, and more shifted tests."""
    call = Call.load(folder)
    told = call.arguments()
    told["ood"] |= ood
    _refuse(gone(folder, call, told, {"data": "--data", "out_domain": "--data"}))
    names = ("ood", "out_domain", "label_map")
    found = _read(report, told["data"], _recipe(folder), **{name: told[name] for name in names})
    own = {name: found.splits[name] for name in report.data["sizes"] if name in found.splits}
    _refuse(other_data(folder, found.source, own, report))
    return found


def _other(report: Report, folders: Sequence[Path], data: Any, ood: Mapping[str, Any] | None) -> sources.Data:
    """Data that the caller names. If that is what the runs were trained on, each must have held out the same of it."""
    recipes_of = {one.seed_of("split"): one for one in map(_recipe, folders)}
    found = {seed: _read(report, data, one, ood=ood) for seed, one in recipes_of.items()}
    if len({one.digest for one in found.values()}) > 1:
        must = "must have train, validation and test of its own: the runs split their data by several seeds"
        _refuse([Fault("data", must, ", ".join(map(str, found)), _HELD)])
    return next(iter(found.values()))


def _read(report: Report, data: Any, recipe: Recipe, **more: Any) -> sources.Data:
    columns = report.data["columns"]
    names = {name: columns[name] for name in ("text", "text_pair", "label")}
    return sources.read(data, seed=recipe.seed_of("split"), task=recipe.task, **names, **more)


def _recipe(folder: Path) -> Recipe:
    return recipes.read(folder / "recipe.yaml")


def _refuse(faults: Iterable[Fault]) -> None:
    if found := [*faults]:
        raise LuthierError.of(found, "the runs")


def _alike(states: Sequence[State], folders: Sequence[Path]) -> None:
    faults = []
    for folder, state in zip(folders[1:], states[1:], strict=True):
        ours, theirs = ({name: value.shape for name, value in one.items()} for one in (states[0], state))
        odd = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
        if odd:
            faults.append(Fault(str(folder), f"must have the weights of {folders[0]}", f"another {min(odd)}"))
    if faults:
        raise ModelError.of(faults, "the runs")


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _notes(how: str, kept: Sequence[int], reports: Sequence[Report]) -> tuple[str, ...]:
    told = [f"the mean of all {len(reports)} runs"]
    if how == "greedy":
        chosen = "they were chosen on the validation rows, so that score is optimistic"
        told = [f"{len(kept)} of {len(reports)} runs are in the mean; {chosen}"]
    probed = all(any(stage.solver == "exact" for stage in report.stages) for report in reports)
    if len({report.model["digest"] for report in reports}) > 1 and not probed:
        odd = "their heads started at different random weights, which the method's authors do not do"
        told.append(f"{odd}: begin with a probe (lp-ft)")
    return tuple(told)
