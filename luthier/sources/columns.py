"""Which column is the text, which its pair, which the label: by name, else by content; flags override; all is said."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.errors import DataError, Fault, did_you_mean
from luthier.sources.labels import as_number
from luthier.sources.tables import Table, rows_of

TEXT_NAMES = (
    "text", "sentence", "sentence1", "text1", "premise", "question1", "review", "content", "question", "document",
    "body", "comment", "tweet", "utterance", "query", "message", "input",
)  # fmt: skip
LABEL_NAMES = (
    "label", "labels", "target", "class", "category", "gold_label", "score", "rating", "stars", "sentiment", "intent",
    "topic", "y", "output",
)  # fmt: skip
# A second text is only taken beside the first that it belongs to; any text may have one of the last row.
PAIR_NAMES: Mapping[str, tuple[str, ...]] = {
    "question": ("passage", "context", "sentence", "answer"),
    "query": ("passage", "document", "answer"),
    "": ("text2", "text_pair", "sentence2", "hypothesis", "question2"),
}


@dataclass(frozen=True)
class Columns:
    """The names of the columns in use; ``label`` is None only where there is nothing to learn (predict)."""

    text: str
    text_pair: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class Flags:
    """What the user said: column names, or None to infer."""

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None


def infer(table: Table, flags: Flags, *, source: str) -> tuple[Columns, tuple[str, ...]]:
    """The columns of ``table`` and, a line each, how they were found.

    Text: the flag; else the first known name (``TEXT_NAMES``) that holds strings; else the longest strings on average.
    Pair: the flag; else a known name that belongs to the text's.
    Label: the flag; else the first known name (``LABEL_NAMES``); else the column with the fewest distinct values.

    Raises:
        DataError: a flag names no column, two flags name one, or no text or label can be found. All faults at once.
    """
    faults = _flag_faults(table, flags)
    if faults:
        raise DataError.of(faults, source)
    free = [name for name in table if name not in (flags.text, flags.text_pair, flags.label)]
    label_by_name = flags.label or _named(LABEL_NAMES, [name for name in free if not _is_nested(table[name])])
    text, text_why = _text(table, flags, [name for name in free if name != label_by_name])
    free = [name for name in free if name != text]
    pair = flags.text_pair or (_pair(table, text, free) if text else None)
    free = [name for name in free if name != pair]
    label = flags.label or _named(LABEL_NAMES, [name for name in free if not _is_nested(table[name])])
    label_why = "as told" if flags.label else "by its name"
    if not label:
        label, label_why = _by_content(table, free)
    if not text or not label:
        raise DataError.of(_missing(table, text, label), source)
    unused = [name for name in free if name != label]
    notes = [f"text: column {text!r} ({text_why})"]
    notes += [f"second text: column {pair!r} ({'as told' if flags.text_pair else 'by its name'})"] if pair else []
    notes += [f"label: column {label!r} ({label_why})"]
    notes += [f"not used: {', '.join(unused)}"] if unused else []
    return Columns(text, pair, label), tuple(notes)


def other_text(table: Table, columns: Columns) -> tuple[str, ...]:
    """A warning where other columns hold texts as well, at least half as long as those in use, in letters and in words."""
    letters, words = _mean_length(table[columns.text]), _mean_words(table[columns.text])
    like = [
        name
        for name, cells in table.items()
        if name not in (columns.text, columns.label)
        and _is_text(cells)
        and 2 * _mean_length(cells) >= letters
        and 2 * _mean_words(cells) >= words
    ]
    if not like:
        return ()
    do = (
        f"for pairs, --text-pair {shlex.quote(like[0])}; for {columns.text!r} alone, --text {shlex.quote(columns.text)}"
    )
    return (f"only {columns.text!r} is read, and {', '.join(map(repr, like))} looks like text too: {do}",)


def _flag_faults(table: Table, flags: Flags) -> list[Fault]:
    told = [("--text", flags.text), ("--text-pair", flags.text_pair), ("--label", flags.label)]
    there = f"Columns: {', '.join(table)}."
    faults = [
        Fault(flag, "must name a column", repr(name), f"{did_you_mean(name, table)}  {there}".strip())
        for flag, name in told
        if name is not None and name not in table
    ]
    names = [name for _, name in told if name is not None]
    faults += [Fault("--text, --text-pair, --label", "must name different columns", repr(name))
               for name in dict.fromkeys(names) if names.count(name) > 1]  # fmt: skip
    return faults


def _named(known: Sequence[str], names: Sequence[str]) -> str | None:
    """The column whose name comes first in ``known``, whatever its case."""
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[each] for each in known if each in lower), None)


def _text(table: Table, flags: Flags, free: Sequence[str]) -> tuple[str | None, str]:
    if flags.text:
        return flags.text, "as told"
    strings = [name for name in free if _is_text(table[name])]
    named = _named(TEXT_NAMES, strings)
    if named:
        return named, "by its name"
    if not strings:
        return None, ""
    by_length = sorted(strings, key=lambda name: -_mean_length(table[name]))
    others = f"; others: {', '.join(by_length[1:])}; --text overrides" if len(by_length) > 1 else ""
    return by_length[0], f"the longest strings, {_mean_length(table[by_length[0]]):.0f} characters on average{others}"


def _pair(table: Table, text: str, free: Sequence[str]) -> str | None:
    known = (*PAIR_NAMES.get(text.lower(), ()), *PAIR_NAMES[""])
    return _named(known, [name for name in free if _is_text(table[name])])


def _by_content(table: Table, free: Sequence[str]) -> tuple[str | None, str]:
    """The column with the fewest distinct values (two or more, each twice on average); else the only one of numbers."""
    rows = rows_of(table)
    scalar = [name for name in free if not _is_nested(table[name])]
    counts = {name: len({str(cell) for cell in table[name]}) for name in scalar}
    few = sorted((name for name in scalar if 2 <= counts[name] <= max(rows // 2, 2)), key=lambda name: counts[name])
    if few:
        others = f"; others: {', '.join(few[1:])}; --label overrides" if len(few) > 1 else ""
        return few[0], f"the fewest distinct values, {counts[few[0]]}{others}"
    numbers = [name for name in scalar if all(isinstance(as_number(cell), float) for cell in table[name])]
    return (numbers[0], "the only column of numbers with decimals") if len(numbers) == 1 else (None, "")


def _missing(table: Table, text: str | None, label: str | None) -> list[Fault]:
    kinds = [f"{name} ({_kind(cells)})" for name, cells in table.items()]
    there = f"columns {', '.join(kinds)}" if kinds else "no columns"
    faults = []
    if not text:
        faults.append(Fault("text", "must be a column of strings", there, "Name it: --text COLUMN"))
    if not label:
        do = "Name it: --label COLUMN (one value a row: a class or a number)"
        faults.append(Fault("label", "must be a column with a class or a number in each row", there, do))
    return faults


def _kind(cells: Sequence[Any]) -> str:
    first = next((cell for cell in cells if cell is not None), None)
    kinds = {str: "text", bool: "yes/no", int: "whole numbers", float: "numbers", list: "lists", dict: "objects"}
    return "empty" if first is None else kinds.get(type(first), type(first).__name__)


def _is_nested(cells: Sequence[Any]) -> bool:
    return any(isinstance(cell, (list, dict, tuple, set)) for cell in cells)


def _is_text(cells: Sequence[Any]) -> bool:
    """Whether a column holds strings, not all of them numbers or empty."""
    told = [cell for cell in cells if cell is not None]
    return bool(told) and all(isinstance(cell, str) for cell in told) and any(
        cell.strip() and as_number(cell) is None for cell in told
    )  # fmt: skip


def _mean_length(cells: Sequence[Any]) -> float:
    return sum(len(cell or "") for cell in cells) / max(len(cells), 1)


def _mean_words(cells: Sequence[Any]) -> float:
    return sum(len((cell or "").split()) for cell in cells) / max(len(cells), 1)
