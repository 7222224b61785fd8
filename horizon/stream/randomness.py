"""Dropout masks that depend on (step, block, micro-batch) only, so that a recomputation draws them again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from horizon.models.blocks import BlockModel


class Randomness:
    """The random numbers of one model's blocks; `seed` is the current pass's."""

    def __init__(self, model: BlockModel, device: torch.device):
        self._model, self._device = model, device
        self._needed = model.uses_dropout()
        self.seed = 0

    @contextmanager
    def of(self, block: int, micro_batch: int) -> Iterator[None]:
        """While open, the block draws its own numbers on this micro-batch; the global generators are left alone."""
        if not self._needed or not self._model.skeleton.training:
            yield
            return
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else [], device_type="cuda"):
            torch.manual_seed(_mix(self.seed, block, micro_batch))
            yield


def _mix(*values: int) -> int:
    """A 63-bit seed from a few small integers."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = ((state ^ value) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1
