"""Label cells as labels: what is a number, what is nothing, and when numbers are classes."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

Label = str | float
IN_DOMAIN = ("train", "validation", "test")  # the splits whose labels say what is learned

_WHOLE = re.compile(r"-?(0|[1-9][0-9]*)")
_COMMA = re.compile(r"[+-]?[0-9]+,[0-9]+")
_THOUSANDS = re.compile(r"[+-]?[1-9][0-9]{0,2},[0-9]{3}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def as_number(cell: Any) -> int | float | None:
    """A cell as a finite number: an int when written as one (``7``, not ``07`` or ``7.0``), else a float, else None.

    >>> [as_number(cell) for cell in ("7", 7, "7.0", "1e-3", "07", "NA", True)]
    [7, 7, 7.0, 0.001, None, None, None]
    """
    if isinstance(cell, bool):
        return None
    if isinstance(cell, (int, float)):
        return cell if abs(cell) <= sys.float_info.max else None  # isfinite fails for an int beyond it
    if isinstance(cell, str):
        told = cell.strip()
        if _WHOLE.fullmatch(told):
            return int(told) if math.isfinite(float(told)) else None
        if _NUMBER.fullmatch(told) and not re.fullmatch(r"0[0-9]+", told) and math.isfinite(float(told)):
            return float(told)
    return None


def is_empty(cell: Any) -> bool:
    """Whether a label cell holds nothing: None, NaN, an infinity, or white space."""
    if isinstance(cell, str):
        return not cell.strip()
    return cell is None or (isinstance(cell, float) and not math.isfinite(cell))


def as_labels(splits: Mapping[str, Sequence[Any]]) -> dict[str, tuple[Label, ...]]:
    """The label cells of all splits in one kind, which train, validation and test decide.

    Strings when any cell of theirs is no number; else whole numbers when all are whole and one at least is written
    without a point; else numbers with decimals. What does not fit in another split stays a number with decimals, or a
    string, for the task to refuse.

    Args:
        splits: by split, cells that are not empty.

    >>> as_labels({"train": ["0", "1"], "out_domain": ["1.0", "0.5", "pos"]})
    {'train': (0, 1), 'out_domain': (1, 0.5, 'pos')}
    """
    every = [as_number(cell) for name in IN_DOMAIN for cell in splits.get(name, ())]
    if any(number is None for number in every):
        return {name: tuple(str(cell).strip() for cell in cells) for name, cells in splits.items()}
    whole = any(isinstance(n, int) for n in every) and all(n == int(n) for n in every if n is not None)
    return {name: tuple(_label(cell, whole) for cell in cells) for name, cells in splits.items()}


def decimal_commas(splits: Mapping[str, Sequence[Any]]) -> str | None:
    """The first label cell with a decimal comma (``3,5``) where all of train, validation and test are such or whole; else None.

    >>> decimal_commas({"train": ["3", "3,5", "-1,25"]}), decimal_commas({"train": ["3,5", "3.5"]})
    ('3,5', None)
    """
    every = [str(cell).strip() for name in IN_DOMAIN for cell in splits.get(name, ())]
    written = [cell for cell in every if _COMMA.fullmatch(cell)]
    fit = len(written) + sum(bool(_WHOLE.fullmatch(cell)) for cell in every) == len(every)
    return written[0] if written and fit else None


def may_be_thousands(splits: Mapping[str, Sequence[Any]]) -> bool:
    """Whether every label cell with a comma in train, validation and test would be a number of thousands too (``1,100``).

    >>> may_be_thousands({"train": ["900", "1,100"]}), may_be_thousands({"train": ["1,125", "0,875"]})
    (True, False)
    """
    every = [str(cell).strip() for name in IN_DOMAIN for cell in splits.get(name, ())]
    return all(_THOUSANDS.fullmatch(cell) for cell in every if "," in cell)


def pointed(cell: Any) -> Any:
    """A cell with a point for its decimal comma; any other cell as it is."""
    told = str(cell).strip()
    return told.replace(",", ".") if _COMMA.fullmatch(told) else cell


def _label(cell: Any, whole: bool) -> Label:
    number = as_number(cell)
    if number is None:
        return str(cell).strip()
    return int(number) if whole and number == int(number) else float(number)


def are_classes(labels: Sequence[Label]) -> bool:
    """Whether labels are read as classes: strings, or whole numbers with few distinct values.

    Few: at most 20 distinct, each twice on average; or ids without gaps (0..k-1 or 1..k), k at most 1000 and at most a
    twentieth of the rows. Numbers with decimals, and all else, are read as quantities.
    """
    if not all(isinstance(label, int) for label in labels):
        return any(isinstance(label, str) for label in labels)
    distinct = set(labels)
    few = len(distinct) <= min(20, len(labels) / 2)
    without_gaps = min(distinct) in (0, 1) and max(distinct) - min(distinct) + 1 == len(distinct)  # type: ignore[operator]
    return few or (without_gaps and len(distinct) <= min(1000, len(labels) / 20))
