"""Models and data in memory as files, so that any process can do a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.errors import Fault, LuthierError
from luthier.jsonfile import atomically, plain, write_whole
from luthier.sources.gather import gather
from luthier.sources.models import digest, store

WEIGHTS = "weights.sha256"  # in a model's folder: the digest of the weights it was given with


def stored(source: Any, place: Path) -> Any:
    """``source`` as it is where it names a place; else the same written to ``place``, once.

    Args:
        source: a path or an id; (model, tokenizer); a DataFrame, a datasets object, or a dict of these by split.
        place: a folder for a model or for data of several splits; ``place``.jsonl for one table.
    Raises:
        LuthierError: other data or another model is there: a comparison's runs must all have the same.
    """
    if source is None or isinstance(source, (str, Path)):
        return source
    if isinstance(source, tuple):
        model, tokenizer = source
        told, known = digest(model.state_dict()), place / WEIGHTS

        def write(beside: Path) -> None:
            store(model, tokenizer, beside)
            (beside / WEIGHTS).write_text(f"{told}\n", encoding="utf-8")

        if not place.exists():
            atomically(place, write)
        elif not known.is_file() or known.read_text(encoding="utf-8").strip() != told:
            fault = Fault(str(place), "must be the model this comparison began with", do="Choose another --out.")
            raise LuthierError.of([fault], "the model")
        return str(place)
    split = isinstance(source, Mapping)
    for name, table in gather(source if split else {"train": source}, {}).tables.items():
        names = list(table)
        rows = zip(*table.values(), strict=True)
        text = "".join(json.dumps(plain(dict(zip(names, row, strict=True))), ensure_ascii=False) + "\n" for row in rows)
        file = place / f"{name}.jsonl" if split else place.with_name(f"{place.name}.jsonl")
        if file.is_file() and file.read_text(encoding="utf-8") != text:
            fault = Fault(str(file), "must be the data this comparison began with", do="Choose another --out.")
            raise LuthierError.of([fault], "the data")
        if not file.is_file():
            write_whole(file, text)
    return str(place if split else place.with_name(f"{place.name}.jsonl"))
