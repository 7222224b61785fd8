"""The replay log: a zeroth-order run as a text of kilobytes, from which its weights are rebuilt bit for bit.

    {"horizon_replay": 1, "model": ..., "fingerprint": ..., "noise": ..., settings ..., "run": {...}}
    {"step": 1, "seed": 0, "projected_gradients": [0.25], "lr": 1e-06, "run": {...}}
    ...

The first line says what the run began with; each line after it is one step. Numbers are written so that they read back
as the same doubles. `run`, where there is one, is what its writer wants to know of the step in order to go on; later
lines' values take the place of earlier ones'. A line is written as soon as its step is done; one that was cut off by a
crash is left out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
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
    adapter: dict[str, Any] | None = None  # peft's settings of the LoRA adapter, if it has one


@dataclass(frozen=True, slots=True)
class ReplayLog:
    """A run as its log has it."""

    beginning: Beginning
    records: Sequence[StepRecord]
    run: dict[str, Any] = field(default_factory=dict)  # after the last step

    def text(self) -> str:
        """What a file of it holds."""
        beginning = self.beginning
        header = {
            "horizon_replay": FORMAT, "model": beginning.model, "fingerprint": beginning.fingerprint,
            "noise": VERSION, "freeze": list(beginning.freeze), "adapter": beginning.adapter,
            **dataclasses.asdict(beginning.settings),
        }  # fmt: skip
        return _line(header, self.run) + "".join(_line(dataclasses.asdict(record), {}) for record in self.records)


class ReplayWriter:
    """Appends steps to a log that holds `text`, whole lines, from the beginning on: at no instant is there less."""

    def __init__(self, path: Path, text: str):
        written = path.with_name(f".{path.name}.new")
        self._file = written.open("w", encoding="utf-8")
        self._file.write(text)
        self.sync()
        os.replace(written, path)

    def write(self, record: StepRecord, run: dict[str, Any] | None = None) -> None:
        """Append a step."""
        self._file.write(_line(dataclasses.asdict(record), run or {}))
        self._file.flush()

    def sync(self) -> None:
        """Have all steps on disk, whatever happens to the machine."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(row: dict[str, Any], run: dict[str, Any]) -> str:
    return json.dumps({**row, "run": run} if run else row) + "\n"


def fingerprint(masters: Masters) -> str:
    """A hash of the weights that a run begins with: both ends of every block, and all names and shapes."""
    digest = hashlib.blake2b(digest_size=16)
    for layout in masters.layouts:
        digest.update(repr([(p.name, p.spec.shape, p.spec.trainable) for p in layout.params]).encode())
        for state in masters.states[layout.index]:
            for end in (state[:SAMPLE], state[-SAMPLE:]):
                digest.update(end.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def whole_lines(path: str | Path) -> str:
    """What a log holds but for a line that was cut off.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        data = Path(path).read_bytes()
        return data[: data.rfind(b"\n") + 1].decode()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the replay log {path} cannot be read: {error}") from error


def read_log(path: str | Path) -> ReplayLog:
    """Read a log.

    Raises:
        CheckpointError: it cannot be read, is no replay log, or was written with another noise.
    """
    rows = [_parse(path, number, line) for number, line in enumerate(whole_lines(path).split("\n")[:-1], start=1)]
    if not rows or rows[0].get("horizon_replay") != FORMAT:
        raise CheckpointError(f"{path} is no replay log of format {FORMAT}: its first line does not say so")
    header = rows[0]
    if header.get("noise") != VERSION:
        raise CheckpointError(f"{path} was written with noise {header.get('noise')!r}, this version draws {VERSION!r}")
    names = {item.name for item in dataclasses.fields(ZerothOrder)}
    try:
        settings = ZerothOrder(**{name: header[name] for name in names})
        records = [_record(row) for row in rows[1:]]
        frozen, adapter = tuple(header["freeze"]), header.get("adapter")  # which earlier versions did not write
        beginning = Beginning(header["fingerprint"], frozen, settings, header["model"], adapter)
        run = {**header.get("run", {}), **rows[-1].get("run", {})}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: a line lacks something or holds something else ({error!r})") from error
    _check_records(path, records, settings)
    return ReplayLog(beginning, records, run)


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
    for name in (item.name for item in dataclasses.fields(ZerothOrder)):
        found, expected = getattr(theirs.settings, name), getattr(beginning.settings, name)
        if name not in SCHEDULING and found != expected:
            raise CheckpointError(f"{path} was written with {name}={found}, the engine has {expected}")
    if theirs.fingerprint != beginning.fingerprint:
        raise CheckpointError(
            f"{path} belongs to a run that began with other weights (model {theirs.model!r}), or with other parameters "
            f"frozen (freeze={list(theirs.freeze)}), or with another adapter"
        )
