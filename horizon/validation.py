"""Held-out rows, scored before, while and after a run trains, and what its losses say about going on.

Scored are a step's rows at a time, so that it takes no more memory than a step does. Patience counts the evaluations of
`eval.every` and the one before training, not those that only a checkpoint asked for: a run that was stopped and resumed
ends at the step at which it would have ended.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch

from horizon.checkpoint.folder import flush
from horizon.checkpoint.schedule import Due, parse_interval
from horizon.config.schema import EvalConfig, HorizonConfig
from horizon.data import Rows
from horizon.errors import ConfigError, DataError
from horizon.eval.metrics import Tally, by_source, tally_rows, total
from horizon.records import EvalRow, Score
from horizon.report.metrics import MetricsWriter, cut_rows
from horizon.stream.head import TokenScores

METRICS = "evaluations.jsonl"

Batches = list[dict[str, torch.Tensor]]


def check_eval_settings(config: HorizonConfig) -> None:
    """Refuse settings that cannot work, or that would do nothing.

    Raises:
        ConfigError: naming the setting.
    """
    settings = config.eval
    if settings.rows < 0:
        raise ConfigError(f"eval.rows={settings.rows} must be at least 0")
    if settings.every is not None:
        parse_interval(settings.every, "eval.every")
        if not settings.rows:
            raise ConfigError(f"eval.every={settings.every} has nothing to score: set eval.rows above 0")
    if settings.patience is not None:
        if settings.patience < 1:
            raise ConfigError(f"eval.patience={settings.patience} must be at least 1, or null to never stop early")
        if settings.every is None:
            raise ConfigError(f"eval.patience={settings.patience} counts evaluations while it trains: set eval.every")
    if not 0 <= settings.min_delta < math.inf:
        raise ConfigError(f"eval.min_delta={settings.min_delta} must be a number of at least 0")
    if settings.min_delta and settings.patience is None:
        raise ConfigError(f"eval.min_delta={settings.min_delta} has no use without eval.patience")


class Scoring(Protocol):
    """The engine, as far as it is asked here."""

    def score(self, batch: Batches) -> list[TokenScores]:
        """How well the labels of each micro-batch are predicted."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Rows that nothing is trained on."""

    passes: tuple[Batches, ...]  # micro-batches that go through the model together
    sources: tuple[str, ...]  # the name of that of each row, in order; empty where there is one source

    @classmethod
    def of(cls, rows: Rows | None, num_rows: int, rows_at_once: int, micro_batch: int) -> HeldOut:
        """The first `num_rows` rows, none where there are none."""
        if rows is None:
            return cls((), ())
        indices = np.arange(min(num_rows, len(rows)))
        groups = [indices[start : start + rows_at_once] for start in range(0, len(indices), rows_at_once)]
        passes = tuple(
            [rows.batch(group[start : start + micro_batch]) for start in range(0, len(group), micro_batch)]
            for group in groups
        )
        names = tuple(rows.sources[source].name for source in rows.source[indices])
        return cls(passes, names if len(rows.sources) > 1 else ())


def check_held_out(config: HorizonConfig, held_out: HeldOut) -> None:
    """Raise a DataError where settings need rows that the data do not have."""
    needing = {"eval.every": config.eval.every, "checkpoint.keep_best": config.checkpoint.keep_best or None}
    for key, value in needing.items():
        if value is not None and not held_out.passes:
            raise DataError(
                f"{key}={value} has nothing to score: no rows are held out; set data.validation_fraction or "
                "data.validation_path"
            )


@dataclass(slots=True)
class Patience:
    """Tells from the losses of evaluations when a run has stopped getting better."""

    limit: int | None  # misses in a row; None: any number
    min_delta: float
    best_loss: float = math.inf
    best_step: int = 0
    reference: float = math.inf  # what the next loss is measured against: small steps downhill add up
    misses: int = 0  # in a row

    def see(self, step: int, loss: float) -> None:
        """Take an evaluation into account."""
        if loss < self.reference - self.min_delta:
            self.reference, self.misses = loss, 0
        else:
            self.misses += 1
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, step

    @property
    def state(self) -> dict[str, Any]:
        """For `restore`, as plain JSON."""
        best, reference = (x if math.isfinite(x) else None for x in (self.best_loss, self.reference))
        return {"best_loss": best, "best_step": self.best_step, "reference": reference, "misses": self.misses}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        best, reference = state["best_loss"], state["reference"]
        self.best_loss = math.inf if best is None else best
        self.reference = math.inf if reference is None else reference
        self.best_step, self.misses = state["best_step"], state["misses"]

    @property
    def verdict(self) -> str | None:
        """Why the run is to end; None: it is not."""
        if self.limit is None or self.misses < self.limit:
            return None
        by = f" by more than eval.min_delta={self.min_delta:g}" if self.min_delta else ""
        return (
            f"none of the last {self.misses} evaluations was better than the best before them{by} "
            f"(eval.patience={self.limit}); the best loss was {self.best_loss:.4f} at step {self.best_step}"
        )


class Evaluation:
    """Scores a run's held-out rows, once for a step, and writes a row each time; a context manager.

    Args:
        kept: steps of this folder's earlier run that this one goes on from; 0: its rows are of no use.
        tell: hears of each row.
    """

    def __init__(
        self, settings: EvalConfig, engine: Scoring, held_out: HeldOut, folder: Path, kept: int,
        tell: Callable[[EvalRow], None],
    ) -> None:  # fmt: skip
        self._engine, self._held_out, self._tell = engine, held_out, tell
        self._interval = None if settings.every is None else parse_interval(settings.every, "eval.every")
        self._due: Due | None = None
        self.patience = Patience(settings.patience, settings.min_delta)
        self._path = folder / METRICS
        self._written = {row["step"] for row in cut_rows(self._path, kept or -1)}
        self._last: EvalRow | None = None
        self._metrics = MetricsWriter(self._path, append=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._metrics.__exit__(kind, error, at)

    def begin(self, step: int, tokens: int) -> None:
        """Training begins, or goes on, at `step`."""
        if self._interval is not None:
            self._due = Due(self._interval, step, tokens)

    def is_due(self, step: int, tokens: int) -> bool:
        """Whether eval.every asks for one after this step."""
        return self._due is not None and self._due.is_due(step, tokens)

    def when_due(self, step: int, tokens: int) -> EvalRow:
        """The evaluation that eval.every asked for."""
        assert self._due is not None
        self._due.saved(step, tokens)
        row = self.at(step)
        assert row is not None
        self.patience.see(step, row.loss)
        return row

    def at(self, step: int) -> EvalRow | None:
        """The evaluation of the weights as they are after `step`; None where no rows are held out."""
        if not self._held_out.passes:
            return None
        if self._last is None or self._last.step != step:
            self._last = self._score(step)
            if step not in self._written:
                self._written.add(step)
                self._metrics.write(self._last)
                self._tell(self._last)
        return self._last

    def sync(self) -> None:
        """Have all rows on disk."""
        flush(self._path)

    def _score(self, step: int) -> EvalRow:
        started = time.perf_counter()
        tallies = [tally for batches in self._held_out.passes for tally in tally_rows(self._engine.score(batches))]
        names = self._held_out.sources
        sums, rows = by_source(tallies, names) if names else {}, Counter(names)
        everything = score_of(total(tallies), len(tallies))
        return EvalRow(
            step=step,
            loss=everything.loss,
            perplexity=everything.perplexity,
            accuracy=everything.accuracy,
            num_tokens=everything.num_tokens,
            num_rows=everything.num_rows,
            sources={name: score_of(sums[name], rows[name]) for name in sorted(sums)} if len(sums) > 1 else {},
            seconds=time.perf_counter() - started,
            time=time.time(),
        )


def score_of(tally: Tally, num_rows: int) -> Score:
    """What rows come to together: every label counts the same."""
    return Score(
        loss=tally.loss, perplexity=tally.perplexity, accuracy=tally.accuracy, num_tokens=tally.num_tokens,
        num_rows=num_rows,
    )  # fmt: skip


def describe_eval(row: EvalRow) -> str:
    """An evaluation in a line."""
    sources = ", ".join(f"{name} {score.loss:.4f}" for name, score in row.sources.items())
    by_source = f"; {sources}" if sources else ""
    return f"{row.loss:.4f} (perplexity {row.perplexity:.4g}, accuracy {row.accuracy:.1%}){by_source}"
