"""Records out of files: JSON Lines, JSON, CSV and Parquet, told apart by the file's extension.

A record is a dict with the place it comes from: the line of its file, or its number where a file has no lines.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from horizon.data.documents import decode_text, read_bytes
from horizon.data.skipping import BadRecords
from horizon.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a table."""

    where: str  # file:line, or file: record n
    fields: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        """Of the text in it, roughly."""
        return _num_chars(self.fields)


def read_records(file: Path, bad: BadRecords) -> Iterator[Record]:
    """The records of one file, in order; those that cannot be read go to `bad`.

    Raises:
        ConfigError: a Parquet file, and pyarrow is not installed.
        DataError: the file cannot be read at all.
    """
    yield from _READERS[file.suffix.lower()](file, bad)


def _read_json(file: Path, bad: BadRecords) -> Iterator[Record]:
    """An array of objects, or (as many a .json file is) one object a line."""
    raw = read_bytes(file)
    if not raw.lstrip().startswith(b"["):
        yield from _read_json_lines(file, bad)
        return
    try:
        values = json.loads(decode_text(raw, str(file)))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: not JSON ({error.msg} at column {error.colno})") from None
    for number, value in enumerate(values, start=1):
        yield from _checked(f"{file}: record {number}", value, bad)


def _read_json_lines(file: Path, bad: BadRecords) -> Iterator[Record]:
    try:
        with file.open("rb") as lines:
            for number, raw in enumerate(lines, start=1):
                if raw.strip():
                    yield from _read_json_line(f"{file}:{number}", raw, bad)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None


def _read_json_line(where: str, raw: bytes, bad: BadRecords) -> Iterator[Record]:
    try:
        value = json.loads(decode_text(raw, where))
    except json.JSONDecodeError as error:
        bad.note(DataError(f"{where}: not JSON ({error.msg} at column {error.colno})"))
    except DataError as error:
        bad.note(error)
    except RecursionError:
        bad.note(DataError(f"{where}: JSON nested too deeply"))
    else:
        yield from _checked(where, value, bad)


def _checked(where: str, value: Any, bad: BadRecords) -> Iterator[Record]:
    if isinstance(value, dict):
        yield Record(where, value)
    else:
        bad.note(DataError(f"{where}: expected an object with fields, found a {type(value).__name__}"))


def _read_csv(file: Path, bad: BadRecords) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    lines = decode_text(read_bytes(file), str(file)).splitlines(keepends=True)
    reader = csv.DictReader(lines, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        for fields in reader:
            where = f"{file}:{reader.line_num}"
            if None in fields or None in fields.values():
                given = sum(value is not None for key, value in fields.items() if key is not None)
                given += len(fields.get(None, ()))
                columns = len(reader.fieldnames or ())
                bad.note(DataError(f"{where}: {given} values, but the first line names {columns} columns"))
            else:
                yield Record(where, dict(fields))
    except csv.Error as error:
        raise DataError(f"{file}:{reader.line_num}: not CSV ({error})") from None


def _read_parquet(file: Path, bad: BadRecords) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"{file}: reading Parquet needs pyarrow: pip install 'horizon[data]'") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield Record(f"{file}: record {number}", fields)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: not Parquet ({' '.join(str(error).split())[:200]})") from None


def _num_chars(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_num_chars, value.values()))
    return sum(map(_num_chars, value)) if isinstance(value, list) else 0


_READERS: dict[str, Callable[[Path, BadRecords], Iterator[Record]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
TABLES = tuple(_READERS)  # extensions
