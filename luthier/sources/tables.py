"""Files as tables: csv, tsv, jsonl, json and parquet, each also .gz. Nothing is guessed about a cell: "NA" stays "NA".

A table is a mapping from column name to a list of cells, one a row; a cell that is not there is None.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from luthier.errors import DataError, Fault, MissingExtra

Table = dict[str, list[Any]]


def rows_of(table: Table) -> int:
    """How many rows a table has."""
    return len(next(iter(table.values()), ()))


def format_of(path: Path) -> str:
    """The suffix that names a file's format, ``.csv`` for ``a.CSV.gz``; empty where it is none that we read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else ""


def read_table(path: Path) -> Table:
    """The table in one file.

    Raises:
        DataError: the format is unknown, or the file is torn, ragged, empty or neither UTF-8 nor UTF-16; file and line are named.
        MissingExtra: a parquet file without pyarrow.
    """
    kind = format_of(path)
    if not kind:
        raise fault(path.name, "must end in .csv, .tsv, .jsonl, .json or .parquet, each also with .gz", path.suffix)
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, ValueError) as error:
        raise fault(path.name, "must be a readable file", f"{type(error).__name__}: {error}") from error
    return FORMATS[kind](data, path.name)


def fault(where: str, must: str, got: str = "", do: str = "") -> DataError:
    """A DataError with one fault; ``where`` is a file, or a file and a line."""
    return DataError.of([Fault(where, must, got, do)], where.split(",")[0])  # type: ignore[return-value]


def _text(data: bytes, name: str) -> str:
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # as Excel writes "Unicode text"
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        if wide:
            do = f"Save it anew as UTF-8: iconv -c -f utf-16 -t utf-8 {name} > new-{name}"
            raise fault(name, "must be UTF-16, as its first two bytes say", error.reason, do) from error
        line = data.count(b"\n", 0, error.start) + 1
        do = f"Save it as UTF-8: iconv -f latin1 -t utf-8 {name} > new-{name}"
        raise fault(f"{name}, line {line}", "must be UTF-8", f"byte 0x{data[error.start]:02x}", do) from error


def _csv(data: bytes, name: str) -> Table:
    text = _text(data, name)
    header = text.split("\n", 1)[0]
    return _table(_fields(text, name, ";" if ";" in header and "," not in header else ","), name)


def _tsv(data: bytes, name: str) -> Table:
    """Tabs without quoting when every line then has the same number of fields, else quoted as in csv.

    A file that reads either way, to the same number of rows, is taken as quoted.
    """
    text = _text(data, name)
    plain = [(i, line.rstrip("\r").split("\t")) for i, line in enumerate(text.split("\n"), 1) if line.strip("\r")]
    if len({len(fields) for _, fields in plain}) > 1 and '"' in text:
        return _table(_fields(text, name, "\t"), name)
    try:
        quoted = _fields(text, name, "\t") if '"' in text else plain
    except DataError:
        quoted = plain
    same = [len(fields) for _, fields in quoted] == [len(fields) for _, fields in plain]
    return _table(quoted if same else plain, name)


def _fields(text: str, name: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """(line number, fields) of each record; blank lines are skipped."""
    limit = csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        return [(reader.line_num, fields) for fields in reader if fields]
    except csv.Error as error:
        do = 'Put text that holds quotes in quotes, and double each: "a ""b"" c"'
        raise fault(f"{name}, line {reader.line_num}", "must be quoted as csv is", str(error), do) from error
    finally:
        csv.field_size_limit(limit)


def _table(records: list[tuple[int, list[str]]], name: str) -> Table:
    if not records:
        raise fault(name, "must have a first line with column names", "an empty file")
    header = [column.strip() for column in records[0][1]]
    _once(header, f"{name}, line 1")
    ragged = [(line, fields) for line, fields in records[1:] if len(fields) != len(header)]
    if ragged:
        do = "A text that holds the separator or a line break must be in quotes."
        lines = [
            Fault(
                f"{name}, line {line}", f"must have {len(header)} fields, as the first line has", str(len(fields)), do
            )
            for line, fields in ragged[:5]
        ]
        more = [Fault(name, f"has {len(ragged) - 5} more such lines")] if len(ragged) > 5 else []
        raise DataError.of(lines + more, name)
    return {column: [fields[i] for _, fields in records[1:]] for i, column in enumerate(header)}


def _once(names: list[str], where: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise fault(where, "must name each column once", f"{twice[0]!r} more than once")


def _jsonl(data: bytes, name: str) -> Table:
    records = []
    for number, line in enumerate(_text(data, name).split("\n"), 1):  # a text may hold U+2028, so not splitlines()
        if line.strip():
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise fault(f"{name}, line {number}", "must be one JSON object a line", _short(error)) from error
            if not isinstance(records[-1], dict):
                raise fault(f"{name}, line {number}", "must be one JSON object a line", type(records[-1]).__name__)
    return from_records(records)


def _json(data: bytes, name: str) -> Table:
    """A list of objects; an object of columns; one of these under a single key; or one object a line."""
    try:
        value = json.loads(_text(data, name))
    except ValueError as error:
        if "Extra data" in str(error):
            return _jsonl(data, name)
        raise fault(name, "must be JSON", _short(error)) from error
    if isinstance(value, dict) and len(value) == 1 and not _is_columns(value):
        value = next(iter(value.values()))
    if isinstance(value, list) and all(isinstance(each, dict) for each in value):
        return from_records(value)
    if isinstance(value, dict) and _is_columns(value):
        return {str(column): list(cells) for column, cells in value.items()}
    raise fault(name, "must hold a list of objects, or one list a column", type(value).__name__)


def _is_columns(value: dict[str, Any]) -> bool:
    lists = [cells for cells in value.values() if isinstance(cells, list)]
    same = len(lists) == len(value) and len({len(cells) for cells in lists}) == 1
    return same and not all(isinstance(cell, dict) for cells in lists for cell in cells)


def _short(error: Exception) -> str:
    return str(error).split("\n")[0]


def from_records(records: Iterable[dict[str, Any]]) -> Table:
    """Objects as a table; a key that an object lacks is None there."""
    told = list(records)
    columns = list(dict.fromkeys(str(key) for record in told for key in record))
    return {column: [record.get(column) for record in told] for column in columns}


def whole(table: Table) -> Table:
    """The table with ``?`` for each half of a surrogate pair, which JSON may hold and no tokenizer or file takes."""
    return {
        column: [cell.encode("utf-8", "replace").decode() if isinstance(cell, str) else cell for cell in cells]
        for column, cells in table.items()
    }


def from_frame(frame: Any) -> Table:
    """A pandas DataFrame as a table: missing values (NaN, NaT, NA) become None, numpy arrays lists.

    Raises:
        DataError: two columns have the same name.
    """
    table: Table = {}
    _once(list(map(str, frame.columns)), "the DataFrame")
    for place, column in enumerate(frame.columns):
        series = frame.iloc[:, place]
        missing = series.isna().tolist()
        cells = series.tolist()
        table[str(column)] = [None if gone else plain(cell) for cell, gone in zip(cells, missing, strict=True)]
    return table


def plain(cell: Any) -> Any:
    """A numpy scalar or array as Python's own; anything else as it is."""
    return cell.tolist() if hasattr(cell, "tolist") else cell


def _parquet(data: bytes, name: str) -> Table:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtra(f'{name} is a parquet file, which needs pyarrow.  pip install "luthier[data]"') from error
    try:
        return dict(pq.read_table(io.BytesIO(data)).to_pydict())
    except (pa.ArrowException, OSError) as error:
        raise fault(name, "must be a parquet file", _short(error)) from error


FORMATS: dict[str, Callable[[bytes, str], Table]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
}
