"""From losses to updates: pure functions of scalars, after MeZO (https://arxiv.org/abs/2305.17333), Algorithm 1.

A step's losses give one projected gradient a query, (L+ - L-) / (2 eps). These numbers, the learning rate and the
seed are all that there is to know of a step: weights before it, its record, weights after it. Averaging the projected
gradients of several machines' batches gives the record of their common step.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from horizon.zo.settings import ZerothOrder
from horizon.zo.table import Term, Update


@dataclass(frozen=True, slots=True)
class StepRecord:
    """All that a step was: a line of the replay log."""

    step: int  # from 1
    seed: int
    projected_gradients: tuple[float, ...]  # one a query
    lr: float


def projected_gradients(losses: Sequence[float], eps: float) -> tuple[float, ...]:
    """(L+ - L-) / (2 eps) of each query; `losses` are L+, L- of the first query, of the second, ..."""
    return tuple((plus - minus) / (2 * eps) for plus, minus in zip(losses[::2], losses[1::2], strict=True))


def mean_loss(losses: Sequence[float]) -> float:
    """The loss of a step: half-way between L+ and L- the terms of first order in eps cancel."""
    return sum(losses) / len(losses)


def update_of(settings: ZerothOrder, records: Sequence[StepRecord]) -> Update:
    """What the last of `records` does to the weights.

        w <- w (1 - lr wd),  w <- w - lr momentum^j g / queries * z    for the steps j before, queries in order

    Args:
        records: of the last `momentum_steps` steps, the newest last.
    """
    newest = records[-1]
    terms = [
        Term(record.step, query, _fp32(-newest.lr * settings.momentum**age * gradient / settings.queries))
        for age, record in enumerate(reversed(records))
        for query, gradient in enumerate(record.projected_gradients)
    ]
    decay = _fp32(1 - newest.lr * settings.weight_decay)
    return Update(newest.step, decay, tuple(term for term in terms if term.coefficient))


def _fp32(value: float) -> float:
    return float(np.float32(value))


class History:
    """The steps so far, as far as they are still needed: by blocks that have not seen them, and for momentum.

    Attributes:
        version: steps so far.
    """

    def __init__(self, settings: ZerothOrder):
        self._settings = settings
        self._records: deque[StepRecord] = deque(maxlen=settings.momentum_steps)
        self._updates: list[Update] = []  # of consecutive steps, the last one's is that of step `version`
        self.version = 0

    def append(self, record: StepRecord) -> None:
        """A step is done: from now on its update is pending for every block."""
        if record.step != self.version + 1:
            raise RuntimeError(f"step {record.step} cannot follow step {self.version}")
        self._records.append(record)
        self._updates.append(update_of(self._settings, self._records))
        self.version += 1

    def since(self, version: int) -> list[Update]:
        """The updates of the steps after `version`."""
        count = self.version - version
        if count > len(self._updates):
            raise RuntimeError(f"the updates since step {version} are forgotten; {len(self._updates)} are kept")
        return self._updates[len(self._updates) - count :]

    def forget(self, version: int) -> None:
        """Every block has seen the steps up to `version`."""
        del self._updates[: max(0, len(self._updates) - (self.version - version))]


def are_finite(losses: Sequence[float]) -> bool:
    """Whether a step may be made of these losses."""
    return all(math.isfinite(loss) for loss in losses)
