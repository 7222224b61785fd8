"""When a run saves, and which of its checkpoints it keeps."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from horizon.checkpoint.folder import list_checkpoints, remove_checkpoint
from horizon.checkpoint.manifest import read_manifest
from horizon.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

_EVERY = re.compile(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*(steps?|s|min|h|tokens)?\s*", re.IGNORECASE)
_SECONDS = {"s": 1, "min": 60, "h": 3600}


@dataclass(frozen=True, slots=True)
class Interval:
    """So many steps, seconds or tokens."""

    amount: float
    unit: str  # steps, seconds or tokens


def parse_interval(text: str, key: str = "checkpoint.save_every") -> Interval:
    """The interval that `text` means: `100` or `100steps`, `90s`, `10min`, `2h`, `1e9tokens`.

    Raises:
        ConfigError: none, or one of no length.
    """
    match = _EVERY.fullmatch(text)
    amount, unit = (float(match[1]), (match[2] or "steps").lower()) if match else (0.0, "")
    if unit.startswith("step"):
        unit, amount = "steps", amount if amount.is_integer() else 0
    if amount <= 0:
        raise ConfigError(f"{key}={text!r}: expected steps such as 100, a time such as 10min, or 1e9tokens")
    if unit in _SECONDS:
        return Interval(amount * _SECONDS[unit], "seconds")
    return Interval(amount, unit)


class Due:
    """Tells when the next save is due, from where the run stood at the last one.

    Steps and tokens are counted from the run's beginning, so that a resumed run saves where it would have saved.
    """

    def __init__(self, interval: Interval, step: int, tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval, self._clock = interval, clock
        self.saved(step, tokens)

    def saved(self, step: int, tokens: int) -> None:
        """A save has begun."""
        self._at = {"steps": float(step), "tokens": float(tokens), "seconds": self._clock()}

    def is_due(self, step: int, tokens: int) -> bool:
        """Whether the next one should."""
        unit, amount = self._interval.unit, self._interval.amount
        if unit == "seconds":
            return self._clock() - self._at[unit] >= amount
        return (step if unit == "steps" else tokens) // amount > self._at[unit] // amount


def prune(parent: Path, keep: int | None, keep_best: bool) -> list[Path]:
    """Remove all checkpoints but the last `keep` (None: none is removed) and, with `keep_best`, the best.

    The best has the lowest `validation_loss` in what its run noted.

    Returns:
        what was removed.
    """
    folders = [folder for _, folder in list_checkpoints(parent)]
    kept = set(folders if keep is None else folders[-keep:])
    if keep_best and (best := best_checkpoint(folders)) is not None:
        kept.add(best)
    removed = [folder for folder in folders if folder not in kept]
    for folder in removed:
        remove_checkpoint(folder)
    return removed


def best_checkpoint(folders: list[Path]) -> Path | None:
    """The checkpoint with the lowest validation loss, if any has one."""
    losses = {folder: _validation_loss(folder) for folder in folders}
    known = {folder: loss for folder, loss in losses.items() if loss is not None}
    return min(known, key=lambda folder: known[folder], default=None)


def _validation_loss(folder: Path) -> float | None:
    try:
        loss = read_manifest(folder).run.get("validation_loss")
    except CheckpointError as error:
        log.warning("%s", error)
        return None
    return float(loss) if isinstance(loss, int | float) else None
