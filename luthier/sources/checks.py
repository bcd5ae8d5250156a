"""What is wrong with the data, all of it, before step 1; and what is odd, counted."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence

from luthier.errors import DataError, Fault, did_you_mean
from luthier.sources.data import Data, Split, named_rows
from luthier.sources.labels import IN_DOMAIN, as_number
from luthier.sources.tasks import Task, label_name

FEW_TO_CALIBRATE = 50  # rows of validation below which what is chosen on them is mostly luck


def check(
    data: Data,
    task: Task,
    *,
    metrics: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Warnings, a line each, with counts.

    Args:
        metrics: metrics that something is judged by, each under where it is said, to see that they exist.
    Raises:
        DataError: every fault there is: a split without rows, an empty text, one class only in train, a label that
            train never shows, a metric that does not exist.
    """
    faults = [Fault(name, "must have rows", "0") for name, split in data.splits.items() if not len(split)]
    for name, split in data.splits.items():
        faults += _empty(name, split.texts, data.columns.text, split)
        faults += _empty(name, split.pairs, data.columns.text_pair, split) if split.pairs is not None else []
    if task.kind == "classification":
        faults += _class_faults(data, task)
    elif len(set(data.splits["train"].labels or ())) == 1:
        faults.append(Fault("train", "must have labels that differ", "one number in every row"))
    for where, metric in (metrics or {}).items():
        if metric not in task.metric_names:
            do = f"{did_you_mean(metric, task.metric_names)}  There are: {', '.join(task.metric_names)}.".strip()
            faults.append(Fault(where, f"must be a metric of {task.kind}", repr(metric), do))
    if faults:
        raise DataError.of(faults, data.source)
    return (
        *_one_class(data, task),
        *_alike(data, task),
        *_repeated(data),
        *_small(data, task),
    )


def truncated(cut: Mapping[str, int], rows: Mapping[str, int], *, max_length: int) -> tuple[str, ...]:
    """A line for each split with texts cut at ``max_length`` tokens.

    >>> truncated({"train": 30, "test": 0}, {"train": 120, "test": 9}, max_length=128)
    ('train: 30 of 120 texts (25.0 %) are longer than 128 tokens and are cut',)
    """
    return tuple(
        f"{name}: {many} of {rows[name]} texts ({100 * many / rows[name]:.1f} %) are longer than {max_length} tokens "
        "and are cut"
        for name, many in cut.items()
        if many
    )


def _empty(name: str, texts: Sequence[str], column: str | None, split: Split) -> list[Fault]:
    bad = [split.rows[i] if split.rows else i + 1 for i, text in enumerate(texts) if not text.strip()]
    if not bad:
        return []
    told = f"no text in {len(bad)} of {len(split)} rows"
    return [Fault(f"{name}, {named_rows(bad)}", f"must have a text in {column!r}", told, "Fill or drop them.")]


def _class_faults(data: Data, task: Task) -> list[Fault]:
    faults = []
    known = set(task.label_names)
    if len(known) < 2:
        told = f"only {task.label_names[0]!r}" if known else "none"
        faults.append(Fault("train", "must have at least two classes", told, "Is this the right label column?"))
    for name, split in data.splits.items():
        counts = Counter(label_name(label) for label in split.labels or ()) if name != "train" else Counter[str]()
        unseen = sorted((label, many) for label, many in counts.items() if label not in known)
        for label, many in unseen[:5]:
            like = next((f"Did you mean {each!r}?  " for each in known if _plain(each) == _plain(label)), "")
            cure = "Rename" if name in IN_DOMAIN else f"Say --map {shlex.quote(f'{name}:{label}=YOURS')}, rename"
            do = f"{like}{cure} or drop these rows, or leave {name} out."
            faults.append(Fault(name, "must only have labels that train has", f"{label!r} in {_rows(many)}", do))
        if unseen[5:]:
            faults.append(Fault(name, f"has {len(unseen) - 5} more such labels"))
    return faults


def _plain(label: str) -> str:
    """A label without case, spaces and signs; likeness alone would offer 'entailment' for 'not_entailment'."""
    return "".join(letter for letter in label.casefold() if letter.isalnum())


def _rows(many: int) -> str:
    return f"{many} row{'' if many == 1 else 's'}"


def _one_class(data: Data, task: Task) -> list[str]:
    if task.kind != "classification":
        return []
    only = {name: {label_name(label) for label in split.labels or ()} for name, split in data.splits.items()}
    return [f"{name}: every row is {min(has)!r}: scores say little" for name, has in only.items() if len(has) == 1]


def _alike(data: Data, task: Task) -> list[str]:
    """Classes of train that differ only in case, spaces, hyphens or underscores; numbers are never alike."""
    counts = Counter(label_name(label) for label in data.splits["train"].labels or ())
    alike: dict[str, list[str]] = {}
    for name in task.label_names if task.kind == "classification" else ():
        if as_number(name) is None:
            alike.setdefault(re.sub(r"[\s_-]+", "", name.casefold()) or name, []).append(name)
    return [
        f"train: {' and '.join(f'{name!r} ({_rows(counts[name])})' for name in names)} are classes of their own: "
        "if they are one, write them alike"
        for names in alike.values()
        if len(names) > 1
    ]


def _small(data: Data, task: Task) -> list[str]:
    rows = len(data.splits.get("validation", ()))
    chosen = "a temperature, a best step" if task.kind == "classification" else "a best step"
    few = 0 < rows < FEW_TO_CALIBRATE
    return [f"validation: only {_rows(rows)}: what is chosen on it ({chosen}) is mostly luck"] if few else []


def _repeated(data: Data) -> list[str]:
    """Rows that occur again within train, with another label, or in a split that is measured."""
    train = data.splits["train"]
    labels: dict[tuple[str, str], set[str]] = {}
    for key, label in zip(train.contents(), train.labels or (), strict=True):
        labels.setdefault(key, set()).add(label_name(label))
    warnings = []
    again = len(train) - len(labels)
    if again:
        warnings.append(f"train: {_rows(again)} repeat another")
    torn = sum(len(has) > 1 for has in labels.values())
    if torn:
        warnings.append(f"train: {torn} text{'' if torn == 1 else 's'} with more than one label")
    other = set(data.splits["out_domain"].contents()) if "out_domain" in data.splits else set()
    for name, split in data.splits.items():
        if name in ("train", "out_domain"):
            continue
        leaked = sum(key in labels or key in other for key in split.contents())
        if leaked:
            told = f"{leaked} of {_rows(len(split))} ({100 * leaked / len(split):.1f} %)"
            warnings.append(f"{name}: {told} {'is' if leaked == 1 else 'are'} in train too: scores flatter")
    return warnings
