"""A source as tables by split name, before anything is known about its columns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.errors import DataError, Fault, MissingExtra, did_you_mean
from luthier.sources import demo
from luthier.sources.places import is_hub_id, not_found
from luthier.sources.tables import FORMATS, Table, format_of, from_frame, read_table, rows_of, whole

ALIASES = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "ood": "ood_ood", "out_domain": "out_domain",
}  # fmt: skip
_SHARD = re.compile(r"-([0-9]{5})-of-([0-9]{5})(-[0-9a-f]{16})?$")


@dataclass(frozen=True)
class Gathered:
    """Tables by split (``train`` is always there), what the user named, and the file each came from."""

    tables: Mapping[str, Table]
    name: str
    notes: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    def where(self, split: str) -> str:
        """What to call a split in a message: its file's name, else its own."""
        return self.files.get(split, split)


def split_name(name: str) -> str | None:
    """The split that ``name`` (of a file, or in a dict) means, or None.

    >>> split_name("Dev"), split_name("ood_tweets"), split_name("train_extra")
    ('validation', 'ood_tweets', None)
    """
    lower = name.lower()
    return ALIASES.get(lower) or (lower if re.fullmatch(r"ood_\w+", lower) else None)


def gather(source: Any, ood: Mapping[str, Any], out_domain: Any = None) -> Gathered:
    """Every table of ``source``, of each of ``ood`` as ``ood_NAME``, and ``out_domain``; train, validation, test, others in this order.

    Raises:
        DataError: nothing is there, or there is no train split, or two files are the same split.
        MissingExtra: a hub id or a datasets object without ``datasets``.
    """
    found = _gather(source)
    more = {f"ood_{name.removeprefix('ood_')}": _gather(each) for name, each in ood.items()}
    if out_domain is not None:
        more["out_domain"] = _gather(out_domain)
    several = [name for name, each in more.items() if len(each.tables) != 1]
    twice = [name for name in more if name in found.tables]
    faults = [Fault(name, "must be one table", "several splits") for name in several]
    do = "Leave one out; --set data=null leaves out the recipe's."
    faults += [
        Fault(name, "must be given once", f"{found.where(name)} of {found.name}, and {more[name].name}", do)
        for name in twice
    ]
    if faults:
        raise DataError.of(faults, found.name)
    tables = {**found.tables, **{name: next(iter(each.tables.values())) for name, each in more.items()}}
    files = {**found.files, **{name: each.name for name, each in more.items()}}
    order: list[str] = [name for name in ("train", "validation", "test") if name in tables]
    order += [name for name in tables if name not in order]
    return Gathered({name: whole(tables[name]) for name in order}, found.name, found.notes, files)


def _gather(source: Any) -> Gathered:
    if isinstance(source, str) and source == "demo":
        return _demo()
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        if path.is_dir():
            return _folder(path)
        if path.exists():
            return Gathered({"train": read_table(path)}, str(source), files={"train": path.name})
        if isinstance(source, str) and is_hub_id(source):
            return _hub(source)
        fault = Fault(str(source), "must be a file, a folder or a hub id", "nothing there", not_found(str(source)))
        raise DataError.of([fault], "the data source")
    if isinstance(source, Mapping):
        return _by_split(source)
    return Gathered({"train": _object(source)}, _kind(source))


def _demo() -> Gathered:
    here = ("demo: the text that comes with the demo; what lies here by that name is ./demo",)
    rows = demo.rows(limit_per_class=demo.PER_CLASS)
    return Gathered({"train": from_frame(rows)}, "demo", here if Path("demo").exists() else ())


def _folder(path: Path) -> Gathered:
    files = [file for file in sorted(path.iterdir()) if file.is_file() and format_of(file)]
    by_split: dict[str, list[Path]] = {}
    unread = []
    for file in files:
        name = split_name(_SHARD.sub("", file.name.split(".")[0]))
        if name is None:
            unread.append(file.name)
        else:
            by_split.setdefault(name, []).append(file)
    faults = [
        Fault(f"{path.name}/", f"must have one file for {name}", ", ".join(file.name for file in several))
        for name, several in by_split.items()
        if len(several) > 1 and not all(map(_shard, several))
    ]
    faults += [fault for name, several in by_split.items() for fault in _missing(f"{path.name}/", name, several)]
    if "train" not in by_split:
        there = ", ".join(file.name for file in files) or f"no file ending in {', '.join(FORMATS)}"
        do = "Name it train, or give the file itself."
        faults.append(Fault(f"{path.name}/", "must have a train file", there, do))
    if faults:
        raise DataError.of(faults, str(path))
    tables = {name: _joined([read_table(file) for file in several]) for name, several in by_split.items()}
    notes = (
        [f"not read: {', '.join(unread)} (read are train, validation, test, ood_NAME, out_domain)"] if unread else []
    )
    return Gathered(tables, str(path), tuple(notes), {name: several[0].name for name, several in by_split.items()})


def _shard(file: Path) -> tuple[int, int] | None:
    """Which shard a file is, of how many, by its name; None for a whole table."""
    found = _SHARD.search(file.name.split(".")[0])
    return (int(found[1]), int(found[2])) if found else None


def _missing(where: str, split: str, files: list[Path]) -> list[Fault]:
    shards = [shard for shard in map(_shard, files) if shard]
    if len(shards) < len(files):
        return []
    wanted = [(at, many) for many in {many for _, many in shards} for at in range(many)]
    twice = {shard for shard in shards if shards.count(shard) > 1}
    odd = [("no", sorted({*wanted} - {*shards})), ("twice", sorted(twice))]
    told = [f"{how} {split}-{at:05}-of-{many:05}" for how, which in odd for at, many in which[:3]]
    do = "Fetch what is missing; leave one of what is there twice."
    return [Fault(where, f"must have each shard of {split} once", ", ".join(told), do)] if told else []


def _joined(shards: list[Table]) -> Table:
    columns = list(dict.fromkeys(column for shard in shards for column in shard))
    return {name: [cell for shard in shards for cell in shard.get(name, [None] * rows_of(shard))] for name in columns}


def _by_split(source: Mapping[Any, Any]) -> Gathered:
    tables: dict[str, Table] = {}
    files: dict[str, str] = {}
    unread, faults = [], []
    for key, value in source.items():
        name = split_name(str(key))
        if name is None:
            unread.append(str(key))
        elif name in tables:
            faults.append(Fault(str(key), f"must be the only split that means {name}"))
        elif isinstance(value, (str, Path)):
            each = _gather(value)
            tables[name], files[name] = each.tables["train"], each.name
        else:
            tables[name] = _object(value)
    if "train" not in tables:
        do = next(filter(None, (did_you_mean(name, ["train"]) for name in unread)), "")
        faults.append(Fault("the dict", "must have a 'train' split", ", ".join(map(repr, source)) or "nothing", do))
    if faults:
        raise DataError.of(faults, _kind(source))
    notes = (
        [f"not read: {', '.join(unread)} (read are train, validation, test, ood_NAME, out_domain)"] if unread else []
    )
    return Gathered(tables, _kind(source), tuple(notes), files)


def _object(source: Any) -> Table:
    """A DataFrame or a datasets.Dataset as a table; named classes come as their names, and -1 (no label) as None."""
    if hasattr(source, "iloc") and hasattr(source, "columns"):
        return from_frame(source)
    if hasattr(source, "to_dict") and hasattr(source, "features") and hasattr(source, "with_format"):
        table: Table = dict(source.with_format(None).to_dict())
        for column, feature in source.features.items():
            if hasattr(feature, "int2str"):
                table[column] = [feature.int2str(i) if i is not None and i >= 0 else None for i in table[column]]
        return table
    do = "Give a path, a DataFrame, a datasets.Dataset, or a dict of these by split."
    raise DataError.of([Fault("data", "must be something that holds rows", _kind(source), do)], "the data source")


def _kind(source: Any) -> str:
    return f"a {type(source).__name__} in memory"


def _hub(source: str) -> Gathered:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra(f'{source} is on the hub, which needs datasets.  pip install "luthier[data]"') from error
    repository, _, config = source.partition(":")
    try:
        loaded = datasets.load_dataset(repository, config or None)
    except Exception as error:  # whatever the hub, the network or the data set's own reader says
        said = str(error).split("\n")[0]
        do = "Check the id and the connection; a data set with several parts is named org/name:part."
        raise DataError.of([Fault(source, "must be a data set on the hub", said, do)], "the data source") from error
    found = _by_split(loaded) if isinstance(loaded, Mapping) else Gathered({"train": _object(loaded)}, source)
    return Gathered(found.tables, source, found.notes, found.files)
