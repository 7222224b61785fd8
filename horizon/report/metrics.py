"""`metrics.jsonl`: one JSON object a step, on disk as soon as the step is done, so a killed run keeps its history."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class MetricsWriter:
    """Writes rows to a new file and flushes each; a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("w", encoding="utf-8")

    def write(self, row: DataclassInstance) -> None:
        """Append one row."""
        self._file.write(to_json(row) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()


def to_json(row: DataclassInstance, indent: int | None = None) -> str:
    """The record as strict JSON: what is not a finite number becomes null, which every reader accepts."""
    return json.dumps(_finite(dataclasses.asdict(row)), indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
