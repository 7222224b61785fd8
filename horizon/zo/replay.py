"""The replay log: a zeroth-order run as a text of kilobytes, from which its weights are rebuilt bit for bit.

    {"horizon_replay": 1, "model": ..., "fingerprint": ..., "noise": ..., settings ...}
    {"step": 1, "seed": 0, "projected_gradients": [0.25], "lr": 1e-06}
    ...

The first line says what the run began with; each line after it is one step. Numbers are written so that they read back
as the same doubles. A line is on disk as soon as its step is done; one that was cut off by a crash is left out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from horizon.errors import CheckpointError
from horizon.zo.estimator import StepRecord
from horizon.zo.masters import Masters
from horizon.zo.noise import VERSION
from horizon.zo.settings import ZerothOrder

FORMAT = 1
SAMPLE = 4096  # elements at each end of a block that the fingerprint covers
SCHEDULING = "lr", "writeback_every"  # settings that change no bit, or that every step has of its own


@dataclass(frozen=True, slots=True)
class Beginning:
    """What a run begins with: the log's first line."""

    fingerprint: str  # of its weights
    freeze: tuple[str, ...]
    settings: ZerothOrder
    model: str = ""  # as the user named it


@dataclass(frozen=True, slots=True)
class ReplayLog:
    """A log as read."""

    beginning: Beginning
    records: Sequence[StepRecord]


class ReplayWriter:
    """Writes a run's log, a new file."""

    def __init__(self, path: Path, beginning: Beginning):
        self._file = path.open("w", encoding="utf-8")
        self._write(
            {
                "horizon_replay": FORMAT, "model": beginning.model, "fingerprint": beginning.fingerprint,
                "noise": VERSION, "freeze": list(beginning.freeze), **dataclasses.asdict(beginning.settings),
            }
        )  # fmt: skip

    def write(self, record: StepRecord) -> None:
        """Append a step."""
        self._write(dataclasses.asdict(record))

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def fingerprint(masters: Masters) -> str:
    """A hash of the weights that a run begins with: both ends of every block, and all names and shapes."""
    digest = hashlib.blake2b(digest_size=16)
    for layout in masters.layouts:
        digest.update(repr([(p.name, p.spec.shape, p.spec.trainable) for p in layout.params]).encode())
        for state in masters.states[layout.index]:
            for end in (state[:SAMPLE], state[-SAMPLE:]):
                digest.update(end.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_log(path: str | Path) -> ReplayLog:
    """Read a log.

    Raises:
        CheckpointError: it cannot be read, is no replay log, or was written with another noise.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the replay log {path} cannot be read: {error}") from error
    rows = [_parse(path, number, line) for number, line in enumerate(lines[:-1], start=1)]  # what follows is cut off
    if not rows or rows[0].get("horizon_replay") != FORMAT:
        raise CheckpointError(f"{path} is no replay log of format {FORMAT}: its first line does not say so")
    header = rows[0]
    if header.get("noise") != VERSION:
        raise CheckpointError(f"{path} was written with noise {header.get('noise')!r}, this version draws {VERSION!r}")
    names = {field.name for field in dataclasses.fields(ZerothOrder)}
    try:
        settings = ZerothOrder(**{name: header[name] for name in names})
        records = [_record(row) for row in rows[1:]]
        beginning = Beginning(header["fingerprint"], tuple(header["freeze"]), settings, header["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: a line lacks something or holds something else ({error!r})") from error
    _check_records(path, records, settings)
    return ReplayLog(beginning, records)


def _parse(path: str | Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: line {number} is no JSON ({error})") from error
    if not isinstance(row, dict):
        raise CheckpointError(f"{path}: line {number} is no JSON object")
    return row


def _record(row: dict[str, Any]) -> StepRecord:
    return StepRecord(row["step"], row["seed"], tuple(float(g) for g in row["projected_gradients"]), float(row["lr"]))


def _check_records(path: str | Path, records: Sequence[StepRecord], settings: ZerothOrder) -> None:
    for number, record in enumerate(records, start=1):
        complete = len(record.projected_gradients) == settings.queries
        finite = all(map(math.isfinite, (*record.projected_gradients, record.lr)))
        if record.step != number or record.seed != settings.seed or not complete or not finite:
            raise CheckpointError(f"{path}: line {number + 1} does not continue the run: {record}")


def check_log(log: ReplayLog, beginning: Beginning, path: str | Path) -> None:
    """Refuse a log that does not continue from `beginning`.

    Raises:
        CheckpointError: naming what differs.
    """
    theirs = log.beginning
    for field in dataclasses.fields(ZerothOrder):
        found, expected = getattr(theirs.settings, field.name), getattr(beginning.settings, field.name)
        if field.name not in SCHEDULING and found != expected:
            raise CheckpointError(f"{path} was written with {field.name}={found}, the engine has {expected}")
    if theirs.fingerprint != beginning.fingerprint:
        raise CheckpointError(
            f"{path} belongs to a run that began with other weights (model {theirs.model!r}), or with other parameters "
            f"frozen (freeze={list(theirs.freeze)})"
        )
