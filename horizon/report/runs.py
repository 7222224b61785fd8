"""A run's folder, read: its steps, facts, checkpoints and settings, and the numbers that it ended with."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from horizon.errors import DataError
from horizon.records import CheckpointRow, EvalRow, StepRow, StepSplit
from horizon.report.facts import FILE, RunFacts, Status, split_from
from horizon.report.metrics import METRICS_FILE, from_row, read_rows
from horizon.report.settings import Settings, read_settings
from horizon.units import format_bytes

METRICS, CHECKPOINTS, SUMMARY, PICTURE = METRICS_FILE, "checkpoints.jsonl", "summary.json", "trace.png"
EVALUATIONS = "evaluations.jsonl"
MARKS = FILE, METRICS, ".hydra"  # of a run's folder
RECENT = 0.05  # of the steps: what the loss at the end is the mean of, beside that of the last step

Numbers = dict[str, float | None]


@dataclass(frozen=True)
class TrainingRun:
    """What a run's folder holds, as far as it does."""

    folder: Path
    facts: RunFacts | None  # None: a run of an earlier version, or one that had no time to write them
    summary: dict[str, Any]  # empty: it did not finish
    settings: Settings
    rows: tuple[StepRow, ...]
    checkpoints: tuple[CheckpointRow, ...]
    evaluations: tuple[EvalRow, ...] = ()

    @property
    def name(self) -> str:
        """The last parts of the folder's path: outputs are DATE/TIME, sweeps number their runs."""
        return "/".join(self.folder.resolve().parts[-2:])

    @property
    def status(self) -> Status:
        """How it ended."""
        if self.facts is not None:
            return self.facts.status
        return Status.finished if self.summary else Status.running

    @property
    def split(self) -> StepSplit | None:
        """Where the time of the recorded steps went."""
        if self.facts is not None and self.facts.split is not None:
            return self.facts.split
        return split_from(self.summary["split"]) if self.summary.get("split") else None

    @property
    def picture(self) -> Path | None:
        """The timeline of a step."""
        path = self.folder / PICTURE
        return path if path.is_file() else None

    @property
    def last_good(self) -> StepRow | None:
        """The last step that changed the weights, by gradients that were finite."""
        return next((row for row in reversed(self.rows) if math.isfinite(row.loss) and not row.skipped), None)

    @property
    def validation(self) -> list[tuple[int, float]]:
        """(steps done, loss) as often as it was evaluated."""
        if self.evaluations:
            return [(row.step, row.loss) for row in self.evaluations]
        found = []
        if (before := self._before("validation_loss_before")) is not None:
            found.append((0 if self.facts is None else self.facts.first_step, float(before)))
        if (after := self.summary.get("validation_loss_after")) is not None:
            found.append((int(self.summary["steps"]), float(after)))
        return found

    @property
    def samples(self) -> tuple[str | None, str | None, str | None]:
        """(prompt, what the untrained model went on with, and the trained one)."""
        prompt = None if self.facts is None else self.facts.prompt
        return prompt, self._before("sample_before"), self.summary.get("sample_after")

    def _before(self, what: str) -> Any:
        return self.summary.get(what) if self.facts is None else getattr(self.facts, what)

    @cached_property
    def numbers(self) -> Numbers:
        """What the run comes to; None where it says nothing of it."""
        rows = self.rows
        seconds = sum(row.seconds for row in rows)
        on_cpu = self.facts is not None and self.facts.device == "cpu"  # where device_bytes is the plan's own number
        recent = [row.loss for row in rows[-max(1, round(RECENT * len(rows))) :] if math.isfinite(row.loss)]
        validation = [None if value is None else float(value) for value in (
            self._before("validation_loss_before"), self.summary.get("validation_loss_after")
        )]  # fmt: skip
        return {
            "steps": rows[-1].step if rows else 0 if self.facts is None else self.facts.first_step,
            "tokens": sum(row.num_tokens for row in rows),
            "seconds": seconds,
            "tokens_per_s": sum(row.num_tokens for row in rows) / seconds if seconds else None,
            "loss": _known(rows[-1].loss) if rows else None,
            "recent_loss": sum(recent) / len(recent) if recent else None,
            "validation_loss_before": validation[0],
            "validation_loss_after": validation[1],
            "clipped_share": sum(row.clip_scale < 1 for row in rows) / len(rows) if rows else None,
            "skipped_steps": sum(row.skipped for row in rows),
            "host_bytes": max((row.host_bytes for row in rows), default=None),
            "device_bytes": None if on_cpu else max((row.device_bytes for row in rows), default=None),
            "checkpoint_stall_s": sum(row.stall_s for row in self.checkpoints) if self.checkpoints else None,
        }


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


# What tables and pages call the numbers, and how they write them.
NUMBERS: dict[str, tuple[str, Callable[[float], str]]] = {
    "validation_loss_after": ("validation loss", "{:.4f}".format),
    "recent_loss": ("loss, last 5 %", "{:.4f}".format),
    "loss": ("last loss", "{:.4f}".format),
    "steps": ("steps", "{:,.0f}".format),
    "tokens": ("tokens", "{:,.0f}".format),
    "seconds": ("time in steps", lambda value: format_duration(value)),
    "tokens_per_s": ("tokens/s", "{:,.0f}".format),
    "clipped_share": ("clipped", "{:.0%}".format),
    "skipped_steps": ("skipped", "{:,.0f}".format),
    "host_bytes": ("host peak", format_bytes),
    "device_bytes": ("device peak", format_bytes),
    "checkpoint_stall_s": ("checkpoint stall", lambda value: format_duration(value)),
}


def write_number(key: str, value: float | None) -> str:
    """A number of `NUMBERS` as text."""
    return "-" if value is None else NUMBERS[key][1](value)


def format_duration(seconds: float) -> str:
    """`1 h 05 min`, `12 min 30 s`, `8.4 s`, `18.8 ms`."""
    if 0 < seconds < 0.1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02} min"


def read_run(folder: Path) -> TrainingRun:
    """A run of `horizon train`, whether or not it has ended.

    Raises:
        DataError: the folder is not that of a run, or a file in it is damaged.
    """
    if not any((folder / mark).exists() for mark in MARKS):
        raise DataError(f"{folder} is not the folder of a run: it has no {FILE}, {METRICS} or .hydra")
    facts, settings = RunFacts.read(folder), read_settings(folder)
    finished = facts is None or facts.status is Status.finished  # else the summary is that of an earlier run there
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8")) if finished else {}
    except FileNotFoundError:
        summary = {}
    except ValueError as error:
        raise DataError(f"{folder / SUMMARY} is damaged ({error})") from error
    try:
        rows = {row["step"]: from_row(StepRow, row) for row in read_rows(folder / METRICS)}
        checkpoints = tuple(from_row(CheckpointRow, row) for row in read_rows(folder / CHECKPOINTS))
        evaluations = tuple(from_row(EvalRow, row) for row in read_rows(folder / EVALUATIONS))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder} has metrics that this version of horizon does not know ({error})") from error
    steps = tuple(rows[step] for step in sorted(rows))
    return TrainingRun(folder, facts, summary, settings, steps, checkpoints, evaluations)


def find_runs(folder: Path) -> list[Path]:
    """The folder, if it is a run's, or the runs below it (of a sweep, of a day), in natural order.

    Raises:
        DataError: there are none.
    """
    if any((folder / mark).exists() for mark in MARKS):
        return [folder]
    found = {path.parent for mark in MARKS for path in folder.rglob(mark)}
    if not found:
        raise DataError(f"{folder} is neither the folder of a run nor one that has any below it")
    return sorted(found, key=lambda path: _natural(path.relative_to(folder).parts))


def _natural(parts: Sequence[str]) -> list[tuple[int, str]]:
    """A key that sorts run 10 behind run 9."""
    pieces = [piece for part in parts for piece in re.split(r"(\d+)", part) if piece]
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces]
