"""The order in which rows are trained on: a seeded order per epoch, resumable from (epoch, position)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from horizon.data.packing import balanced
from horizon.data.rows import Rows
from horizon.errors import ConfigError


class Loader:
    """Hands out steps of rows without end; a step may reach into the next epoch.

    An epoch takes every row once. Where sources have weights, it has as many tokens in all, of each source its share:
    a small source comes round several times, and of a large one each epoch takes the part that follows.

    `epoch` and `position` (rows of that epoch already handed out) are the whole state: a loader made with those
    of another goes on exactly where that one is.
    """

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        micro_batch: int,
        seed: int,
        *,
        shuffle: bool = True,
        epoch: int = 0,
        position: int = 0,
    ) -> None:
        """`batch_size` rows make a step, handed out in micro-batches of `micro_batch` rows (the last may have fewer).

        Raises:
            ConfigError: a size is not positive.
        """
        for key, value in (("train.batch_size", batch_size), ("train.micro_batch", micro_batch)):
            if value < 1:
                raise ConfigError(f"{key}={value} must be at least 1")
        self.rows = rows
        self.batch_size = batch_size
        self.micro_batch = micro_batch
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = epoch
        self.position = position
        self.step_tokens = 0  # real tokens, padding excluded, of the last step handed out
        self._order = self._epoch_order()

    def next_step(self) -> list[dict[str, torch.Tensor]]:
        """The next step's micro-batches, of about equal arithmetic each, as `Rows.batch` makes them."""
        indices = self.take(self.batch_size)
        self.step_tokens = int(self.rows.num_tokens[indices].sum())
        groups = balanced(self.rows.attention_work[indices], self.micro_batch)
        return [self.rows.batch(indices[group]) for group in groups]

    def take(self, num_rows: int) -> NDArray[np.int64]:
        """The next so many rows, as indices into `rows`."""
        taken = []
        while num_rows:
            part = self._order[self.position : self.position + num_rows]
            taken.append(part)
            num_rows -= len(part)
            self.position += len(part)
            if self.position == len(self._order):
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._epoch_order()
        return np.concatenate(taken)

    def _epoch_order(self) -> NDArray[np.int64]:
        quotas = row_quotas(self.rows)
        if quotas is None:
            return self._permutation([self.epoch], len(self.rows))
        parts = [self._part(source, quota) for source, quota in enumerate(quotas)]
        joined = np.concatenate(parts)
        if self.shuffle:
            return joined[self._permutation([self.epoch], len(joined))]
        evenly = np.concatenate([(np.arange(len(part)) + 0.5) / max(1, len(part)) for part in parts])
        return joined[np.argsort(evenly, kind="stable")]

    def _part(self, source: int, quota: int) -> NDArray[np.int64]:
        """What this epoch takes of a source: rows that follow those of the epoch before, round after round."""
        rows = np.flatnonzero(self.rows.source == source)
        first = self.epoch * quota
        rounds = range(first // len(rows), (first + quota - 1) // len(rows) + 1) if quota else ()
        orders = [rows[self._permutation([number, source + 1], len(rows))] for number in rounds]
        skip = first % len(rows)
        return np.concatenate(orders)[skip : skip + quota] if orders else rows[:0]

    def _permutation(self, numbers: list[int], length: int) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(length)
        return np.random.default_rng([self.seed, *numbers]).permutation(length)


def row_quotas(rows: Rows) -> list[int] | None:
    """Rows that an epoch takes of each source by the sources' weights; None: they have none."""
    weights = [source.weight for source in rows.sources]
    if None in weights:
        return None
    total, all_weights = int(rows.num_tokens.sum()), sum(float(weight or 0) for weight in weights)
    quotas = []
    for index, weight in enumerate(weights):
        tokens = rows.num_tokens[rows.source == index]
        mean = float(tokens.mean()) if len(tokens) else 1.0
        quotas.append(round(total * float(weight or 0) / all_weights / mean))
    return quotas
