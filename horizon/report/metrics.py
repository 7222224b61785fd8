"""`metrics.jsonl`: one JSON object a step, on disk as soon as the step is done, so a killed run keeps its history.

A run that goes on from a checkpoint first cuts the file to the steps that the checkpoint has seen, and then appends.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Row = TypeVar("Row", bound="DataclassInstance")

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Writes rows to a file, a new one or (`append`) behind what it holds, and flushes each; a context manager."""

    def __init__(self, path: Path, append: bool = False) -> None:
        self.path = path
        self._file = path.open("a" if append else "w", encoding="utf-8")

    def write(self, row: DataclassInstance) -> None:
        """Append one row."""
        self._file.write(to_json(row) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a file; none where there is no file."""
    rows: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:  # cut short when the run was killed
            break
    return rows


def cut_rows(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Keep the rows of steps up to `last_step`, each whole; gives them."""
    rows = list(takewhile(lambda row: row["step"] <= last_step, read_rows(path)))
    cut = path.with_name(f".{path.name}.cut")
    cut.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(cut, path)
    return rows


def from_row(kind: type[Row], row: dict[str, Any]) -> Row:
    """The record that `to_json` wrote; what was not finite is NaN."""
    fields = dataclasses.fields(kind)
    missing = {f.name: math.nan for f in fields if f.type == "float" and row.get(f.name) is None}
    return kind(**{f.name: row[f.name] for f in fields if f.name in row} | missing)


def to_json(row: DataclassInstance, indent: int | None = None) -> str:
    """The record as strict JSON: what is not a finite number becomes null, which every reader accepts."""
    return json.dumps(finite(dataclasses.asdict(row)), indent=indent)


def finite(value: Any) -> Any:
    """The value with null for every number in it that is not finite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
