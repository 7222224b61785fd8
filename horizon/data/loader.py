"""The order in which rows are trained on: a seeded permutation per epoch, resumable from (epoch, position)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from horizon.data.rows import Rows
from horizon.errors import ConfigError


class Loader:
    """Hands out steps of rows without end; each epoch takes every row once, and a step may reach into the next epoch.

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
        """The next step's micro-batches, each as `Rows.batch` makes it."""
        indices = self._take(self.batch_size)
        self.step_tokens = int(self.rows.num_tokens[indices].sum())
        return [
            self.rows.batch(indices[start : start + self.micro_batch])
            for start in range(0, self.batch_size, self.micro_batch)
        ]

    def _take(self, num_rows: int) -> NDArray[np.int64]:
        taken = []
        while num_rows:
            part = self._order[self.position : self.position + num_rows]
            taken.append(part)
            num_rows -= len(part)
            self.position += len(part)
            if self.position == len(self.rows):
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._epoch_order()
        return np.concatenate(taken)

    def _epoch_order(self) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(len(self.rows))
        return np.random.default_rng([self.seed, self.epoch]).permutation(len(self.rows))
