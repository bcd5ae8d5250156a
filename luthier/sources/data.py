"""Data from wherever it lies to the same frozen splits: files, folders, DataFrames, datasets, the hub."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import DataError, Fault, did_you_mean
from luthier.sources.columns import LABEL_NAMES, Columns, Flags, infer, other_text
from luthier.sources.gather import Gathered, gather
from luthier.sources.labels import Label, are_classes, as_labels, decimal_commas, is_empty, may_be_thousands, pointed
from luthier.sources.splitting import divide
from luthier.sources.tables import Table, format_of, plain, rows_of

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Split:
    """Rows of one split.

    Args:
        texts: one a row.
        pairs: the second text of each row, or None when there is none.
        labels: strings, or numbers (whole numbers are ints); None only where there is nothing to learn (predict).
        rows: the row's number in its source, from 1, the header not counted; empty when the split was made by hand.
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None = None
    labels: tuple[Label, ...] | None = None
    rows: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> Split:
        """The rows numbered ``rows`` (from 0), in that order."""
        return Split(
            tuple(self.texts[i] for i in rows),
            None if self.pairs is None else tuple(self.pairs[i] for i in rows),
            None if self.labels is None else tuple(self.labels[i] for i in rows),
            tuple(self.rows[i] if self.rows else i + 1 for i in rows),
        )

    def contents(self) -> list[tuple[str, str]]:
        """What makes two rows the same: text and pair, white space at the ends aside."""
        pairs = self.pairs or ("",) * len(self)
        return [(text.strip(), pair.strip()) for text, pair in zip(self.texts, pairs, strict=True)]


@dataclass(frozen=True)
class Data:
    """What a run learns from and is measured on.

    Args:
        splits: ``train``, ``validation``, ``test`` and any ``ood_NAME`` and ``out_domain``, in this order; ``test`` may be absent.
        columns: the columns in use.
        notes: what was inferred, one line each, for printing.
        source: what the user named, for printing.
        digest: sha256 over the contents: the same rows from another format have the same digest.
        warnings: what is odd, though not wrong.
    """

    splits: Mapping[str, Split]
    columns: Columns
    notes: tuple[str, ...] = ()
    source: str = "memory"
    digest: str = ""
    warnings: tuple[str, ...] = ()


def read(
    source: Any,
    *,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    task: str = "auto",
    seed: int = 0,
    ood: Mapping[str, Any] | None = None,
    out_domain: Any = None,
    label_map: Mapping[str, Mapping[str, str]] | None = None,
) -> Data:
    """The data at ``source``, its columns inferred and its missing splits drawn by ``seed``.

    Args:
        source: a csv, tsv, jsonl, json or parquet file (each also .gz); a folder of those named train, validation,
            test, ood_NAME; a pandas DataFrame; a datasets.Dataset or DatasetDict; a dict of these by split; a hub id;
            ``demo``, the demo's text (a folder of that name is ``./demo``).
        text, text_pair, label: column names; None infers them.
        task: ``classification`` takes labels for classes however they are written, and draws splits by them.
        seed: of the draw when one file is split 80/10/10, or validation is taken from train.
        ood: more shifted tests, name -> any single source.
        out_domain: more training rows, of another domain, for recipes that ask for some; any single source.
        label_map: for splits whose labels are named otherwise: split -> {its label: train's label}. ``NAME`` means ``ood_NAME`` too.
    Raises:
        DataError: nothing is there, a file cannot be read, a column cannot be found, a label is empty,
            or a text is a list or an object.
        MissingExtra: parquet files, datasets or a hub id without ``luthier[data]``.
    """
    gathered = gather(source, ood or {}, out_domain)
    name, tables = gathered.name, dict(gathered.tables)
    none = [Fault(split, "must have rows", "0") for split, table in tables.items() if not rows_of(table)]
    if none:
        raise DataError.of(none, name)
    columns, told = infer(tables["train"], Flags(text, text_pair, label), source=name)
    notes = list(gathered.notes + told)
    if _is_unlabelled(tables.get("test", {}), columns):
        del tables["test"]
        notes.append("test: has no labels, so it is left out; luthier predict labels it")
    splits, read_as = _splits(
        tables, columns, gathered, _maps(label_map or {}, tables), task, as_told=label is not None
    )
    splits, drawn = _completed(splits, seed, task)
    notes += [*read_as, *drawn, _sizes(splits)]
    odd = () if text or columns.text_pair else other_text(tables["train"], columns)
    return Data(splits, columns, tuple(notes), name, digest(splits), odd)


def read_unlabelled(source: Any, columns: Columns) -> tuple[Split, pd.DataFrame]:
    """The rows of one file (or DataFrame) to predict, and the file's own columns to put the predictions beside.

    Raises:
        DataError: the file cannot be read, has no rows, lacks the text column the model was trained on, or has no texts there.
    """
    import pandas as pd

    gathered = gather(source, {})
    if len(gathered.tables) != 1:
        fault = Fault(gathered.name, "must be one table", ", ".join(gathered.tables), "Name one file.")
        raise DataError.of([fault], gathered.name)
    table = next(iter(gathered.tables.values()))
    texts = [columns.text, columns.text_pair]
    faults = _absent(gathered.name, table, texts) or _text_faults(gathered.name, table, texts)
    if not faults and not rows_of(table):
        faults = [Fault(gathered.name, "must have rows", "0")]
    if faults:
        raise DataError.of(faults, gathered.name)
    frame = pd.DataFrame({column: pd.Series(cells, dtype=object) for column, cells in table.items()})
    return _split(table, Columns(columns.text, columns.text_pair), None), frame


def digest(splits: Mapping[str, Split]) -> str:
    """sha256 over the splits' names, texts, pairs and labels, in order; row numbers and file formats do not count."""
    told = hashlib.sha256()
    for name, split in splits.items():
        told.update(json.dumps([name, split.texts, split.pairs, split.labels], ensure_ascii=True).encode())
    return told.hexdigest()


def digests(splits: Mapping[str, Split]) -> dict[str, str]:
    """The digest of each split by itself."""
    return {name: digest({name: split}) for name, split in splits.items()}


def _maps(given: Mapping[Any, Mapping[Any, str]], tables: Mapping[str, Table]) -> dict[str, Mapping[str, str]]:
    """The label maps by the splits' own names; a label may be given as a number."""
    told = {str(name): {str(label): ours for label, ours in one.items()} for name, one in given.items()}
    found: dict[str, Mapping[str, str]] = {n if n in tables else f"ood_{n}": one for n, one in told.items()}
    odd = [name for name in told if name not in tables and f"ood_{name}" not in tables]
    if odd:
        do = did_you_mean(odd[0], tables) or f"There are: {', '.join(tables)}."
        raise DataError.of([Fault(f"the label map of {odd[0]}", "must be that of a split", do=do)], "--map")
    return found


def _splits(
    tables: Mapping[str, Table],
    columns: Columns,
    gathered: Gathered,
    maps: Mapping[str, Mapping[str, str]],
    task: str,
    *,
    as_told: bool,
) -> tuple[dict[str, Split], list[str]]:
    """Tables as splits, and how labels were read; every absent column and empty label of every split is told at once.

    Args:
        as_told: whether the user named the label's column.
    """
    faults: list[Fault] = []
    cells: dict[str, list[Any]] = {}
    for name, table in tables.items():
        absent = _absent(gathered.where(name), table, [columns.text, columns.text_pair, columns.label])
        faults += absent
        if not absent:
            cells[name] = [plain(cell) for cell in table[str(columns.label)]]
            if name in maps:
                there = {str(cell).strip() for cell in cells[name]}
                faults += [
                    Fault(
                        gathered.where(name), f"must have the label {label!r} to map it", do=did_you_mean(label, there)
                    )
                    for label in maps[name]
                    if label not in there
                ]
                cells[name] = [maps[name].get(str(cell).strip(), cell) for cell in cells[name]]
            faults += _text_faults(gathered.where(name), table, [columns.text, columns.text_pair])
            faults += _label_faults(gathered.where(name), str(columns.label), cells[name])
            faults += [] if as_told else _header_faults(gathered.where(name), str(columns.label), cells[name])
    if faults:
        raise DataError.of(faults, gathered.name)
    told = []
    comma = None if task == "classification" else decimal_commas(cells)
    if comma is not None and may_be_thousands(cells):
        do = "Write 1100 or 1.100; if they are classes, --task classification."
        raise DataError.of(
            [Fault("labels", "must say whether a comma marks thousands or decimals", repr(comma), do)], gathered.name
        )
    if comma is not None:
        cells = {name: [pointed(cell) for cell in each] for name, each in cells.items()}
        do = "if they are classes, --task classification"
        told = [f"labels: numbers with decimal commas, {comma!r} is read as {pointed(comma)}; {do}"]
    labels = as_labels(cells)
    return {name: _split(table, columns, labels[name]) for name, table in tables.items()}, told


def _split(table: Table, columns: Columns, labels: tuple[Label, ...] | None) -> Split:
    texts = tuple(_string(cell) for cell in table[columns.text])
    pairs = tuple(_string(cell) for cell in table[columns.text_pair]) if columns.text_pair else None
    return Split(texts, pairs, labels, tuple(range(1, len(texts) + 1)))


def _string(cell: Any) -> str:
    return "" if cell is None or (isinstance(cell, float) and math.isnan(cell)) else str(cell)


def _absent(where: str, table: Table, names: Sequence[str | None]) -> list[Fault]:
    there = ", ".join(table) or "none"
    return [
        Fault(where, f"must have the column {name!r}", there, did_you_mean(name, table))
        for name in names
        if name is not None and name not in table
    ]


def _text_faults(where: str, table: Table, names: Sequence[str | None]) -> list[Fault]:
    faults = []
    for name in names:
        odd = [row for row, cell in enumerate(table[name], 1) if not _is_plain(cell)] if name else []
        if odd:
            at = f"{where}, {named_rows(odd)}"
            got = type(table[name][odd[0] - 1]).__name__  # type: ignore[index]
            faults.append(Fault(at, f"must have one text in {name!r}", got, "Join each into one text, or drop them."))
    return faults


def _is_plain(cell: Any) -> bool:
    return not isinstance(cell, (list, tuple, dict, set, bytes))


def _label_faults(where: str, column: str, cells: Sequence[Any]) -> list[Fault]:
    faults = []
    empty = [row for row, cell in enumerate(cells, 1) if is_empty(cell)]
    nested = [row for row, cell in enumerate(cells, 1) if isinstance(cell, (list, dict))]
    if empty:
        told = f"none in {len(empty)} of {len(cells)} rows"
        at = f"{where}, {named_rows(empty)}"
        faults.append(Fault(at, f"must have a label in {column!r}", told, "Fill or drop them."))
    if nested:
        at = f"{where}, {named_rows(nested)}"
        faults.append(Fault(at, f"must have one class or number in {column!r}", "lists or objects"))
    return faults


def _header_faults(where: str, column: str, cells: Sequence[Any]) -> list[Fault]:
    """A csv or tsv file whose first line is a row: the label's column seems to be named as one of its labels."""
    if format_of(Path(where)) not in (".csv", ".tsv") or column.lower() in LABEL_NAMES or column not in map(str, cells):
        return []
    do = f"Add a first line with the columns' names, or say --label {shlex.quote(column)} if it is one."
    return [Fault(where, "must begin with column names", f"{column!r}, which is a label below", do)]


def named_rows(rows: Sequence[int]) -> str:
    """``row 3``, ``rows 3, 9`` or ``rows 3, 9, 12, 15, 20 and 7 more``."""
    told = ", ".join(str(row) for row in rows[:5])
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return f"{'row' if len(rows) == 1 else 'rows'} {told}{more}"


def _is_unlabelled(table: Table, columns: Columns) -> bool:
    """Whether a test table has the texts but not one label."""
    cells = table.get(str(columns.label), [])
    return columns.text in table and all(is_empty(plain(cell)) for cell in cells)


def _completed(splits: dict[str, Split], seed: int, task: str) -> tuple[dict[str, Split], list[str]]:
    """Validation, and test when train is all there is, are drawn from train; rows of the same text stay together."""
    train = splits["train"]
    labels = train.labels or ()
    others = [name for name in splits if name not in ("train", "validation", "test")]
    if "validation" in splits:
        absent = [] if "test" in splits else ["test: there is none, so nothing is measured on unseen rows"]
        return splits, absent
    shares = {"validation": 0.1} if "test" in splits else {"validation": 0.1, "test": 0.1}
    keys = train.contents()
    copies = len(train) - len(set(keys))
    if len(train) - copies < 3 * len(shares):
        do = "Add rows, or give a validation split."
        got = f"{len(train)}, {copies} of them copies" if copies else str(len(train))
        raise DataError.of([Fault("train", "must have more rows to be split", got, do)], "the data")
    classes = task == "classification" or are_classes(labels)
    divided, notes = divide(labels, shares, stratify=classes, seed=seed, keys=keys)
    kept = [f"copies: {copies} of {len(train)} rows repeat another's text, and are in its split"] if copies else []
    whole = {**splits, **{name: train.take(rows) for name, rows in divided.items()}}
    how = f"{'stratified by label' if classes else 'at random'}, seed {seed}"
    what = "validation: 10 % of train" if "test" in splits else "split: train 80 %, validation 10 %, test 10 %"
    order = ["train", "validation", "test", *others]
    return {name: whole[name] for name in order}, [f"{what}, {how}", *kept, *notes]


def _sizes(splits: Mapping[str, Split]) -> str:
    return "rows: " + ", ".join(f"{name} {len(split)}" for name, split in splits.items())
