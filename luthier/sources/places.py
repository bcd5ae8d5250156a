"""Where a source lies: on this machine, or on the hub. The only rule by which a string may reach the network."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from luthier.errors import did_you_mean

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")
_FILE_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]{0,10}$")


def is_hub_id(source: str) -> bool:
    """Whether ``source`` can only be meant as ``org/name`` on the hub.

    It is not when it exists here, starts with ``.``, ``/`` or ``~``, has more or fewer than one separator, ends like a
    file (``.csv``, but not ``-3.1-8B``), or when the folder before the separator exists here: a mistyped path.

    >>> is_hub_id("org/name"), is_hub_id("org/Model-3.1-8B")
    (True, True)
    >>> is_hub_id("name"), is_hub_id("data/train.csv"), is_hub_id("./org/name"), is_hub_id("~/name"), is_hub_id("a/b/c")
    (False, False, False, False, False)
    """
    if not _HUB_ID.fullmatch(source) or _FILE_SUFFIX.search(source):
        return False
    return not Path(source).exists() and not Path(source).parent.exists()


def not_found(source: str) -> str:
    """What to do about a path that is not there, from its neighbours on disk alone."""
    path = Path(source).expanduser()
    near = path.parent if path.parent.is_dir() else None
    guess = did_you_mean(path.name, [each.name for each in near.iterdir()]) if near else ""
    return guess or "Check the path; data or a model on the hub is named org/name."


def signature(sources: Iterable[Any]) -> tuple[Any, ...] | None:
    """What tells whether anything changed at ``sources``: path, time and size of each file; None when one lies in memory."""
    told: list[Any] = []
    for source in sources:
        if not isinstance(source, (str, Path)):
            return None
        path = Path(source).expanduser()
        files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
        told.append((str(source), *((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)))
    return tuple(told)
