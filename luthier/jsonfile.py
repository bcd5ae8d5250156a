"""Files that are written whole or not at all; frozen values as JSON, read back with every fault named."""

from __future__ import annotations

import math
import os
import shutil
import types
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from luthier.errors import Fault, LuthierError, RunError

T = TypeVar("T")


def plain(value: Any) -> Any:
    """A value as JSON has it: tuples and sets as lists, arrays as nested lists, a number that is not finite as None.

    Text becomes valid Unicode (half a surrogate pair becomes ``?``); anything else becomes its text.

    >>> plain({"a": (1, float("nan")), 2: {"b"}})
    {'a': [1, None], '2': ['b']}
    """
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted((plain(item) for item in value), key=repr)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # arrays, tensors and their scalars
        return plain(value.tolist())
    return str(value).encode("utf-8", "replace").decode("utf-8")


def expanded(path: str | Path) -> Path:
    """``path`` with the home folder in the place of ``~``; where that is not known, as it is."""
    return Path(os.path.expanduser(path))


def atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls ``write`` on a path beside ``path``, flushes it to disk, and renames it into place.

    Raises:
        RunError: the disk is full or cannot be written; what stood at ``path`` is untouched.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(beside)  # of a process with this number that was killed; in a container numbers come again
        write(beside)
        flush(beside)
        if beside.is_dir() and path.exists():
            shutil.rmtree(path)
        os.replace(beside, path)
        flush(path.parent)
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}.  What was saved before is untouched."
        ) from error
    finally:
        with suppress(OSError):  # what went wrong above is told, not that it cannot be tidied up either
            _remove(beside)


def _remove(path: Path) -> None:
    """Removes a file or a folder, if one is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all.

    Raises:
        RunError: as ``atomically`` does.
    """
    atomically(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def unwritable(path: Path) -> str:
    """Why nothing new can be written at ``path``; empty when it can, its folders being made where they are missing."""
    above = path.parent
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir():
        return f"{above} is a file"
    return "" if os.access(above, os.W_OK | os.X_OK) else f"{above} cannot be written to"


def read_as(kind: type[T], told: Any, *, inside: str) -> T:
    """The dataclass ``kind`` from plain values; for a float None reads as NaN, for a tuple a list as a tuple.

    Args:
        inside: the file's name, for the error.
    Raises:
        LuthierError: a value is missing, unknown, or of another type; all of these at once.
    """
    faults: list[Fault] = []
    read = _dataclass(kind, told, "", faults)
    if faults:
        raise LuthierError.of(faults, inside)
    return read  # type: ignore[no-any-return]


def _dataclass(kind: Any, told: Any, where: str, faults: list[Fault]) -> Any:
    if not isinstance(told, dict):
        faults.append(Fault(where, "must be an object", type(told).__name__))
        return None
    before, hints, start = len(faults), get_type_hints(kind), f"{where}." if where else ""
    values = {}
    for one in fields(kind):
        if one.name in told:
            values[one.name] = _value(hints[one.name], told[one.name], start + one.name, faults)
        elif one.default is MISSING and one.default_factory is MISSING:
            faults.append(Fault(start + one.name, "must be there"))
    faults += [Fault(start + str(name), "must be a known name") for name in told if name not in hints]
    return kind(**values) if len(faults) == before else None


def _value(hint: Any, told: Any, where: str, faults: list[Fault]) -> Any:
    origin, args = get_origin(hint) or hint, get_args(hint)
    if is_dataclass(hint):
        return _dataclass(hint, told, where, faults)
    if origin in (types.UnionType, Union):
        return None if told is None else _value(args[0], told, where, faults)
    if origin is float and (told is None or (isinstance(told, int) and not isinstance(told, bool))):
        return math.nan if told is None else float(told)
    want = list if origin is tuple else origin
    if not isinstance(told, want) or (isinstance(told, bool) and want is not bool):
        faults.append(Fault(where, f"must be of type {want.__name__}", type(told).__name__))
        return None
    if origin is tuple:
        return tuple(_value(args[0], item, f"{where}[{at}]", faults) for at, item in enumerate(told))
    return told
