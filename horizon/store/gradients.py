"""Host buffers that gradients drain into: one per block, or a short ring.

Exact clipping makes all gradients wait for the global norm, so they are *kept* (2 B/param in bf16). Without
clipping a block's update starts as soon as its gradient has landed, and a *ring* of a few buffers is enough.
The executor claims a block's buffer before draining into it; the optimizer releases it after the update.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from horizon.errors import HorizonError
from horizon.layout import BlockLayout
from horizon.store.arena import Arena


class GradientBuffers(Protocol):
    """Where gradients wait on the host."""

    dtype: torch.dtype
    kept: bool  # gradients stay readable until the next backward

    def claim(self, block: int) -> Tensor:
        """The block's buffer, [num_trainable]; waits until one is free. Claiming again returns the same."""

    def release(self, block: int) -> None:
        """The block's gradient is no longer needed."""

    def fail(self, error: BaseException) -> None:
        """Wake whoever waits for a buffer: none will come."""

    @property
    def num_bytes(self) -> int:
        """Host bytes held."""

    def close(self) -> None:
        """Give the memory back. Idempotent."""


class KeptGradients:
    """A buffer for every block."""

    kept = True

    def __init__(self, layouts: Sequence[BlockLayout], dtype: torch.dtype, pin: bool):
        self.dtype = dtype
        self._arena = Arena([lay.num_trainable * dtype.itemsize for lay in layouts], "grads", pin)
        self._buffers = [region.view(dtype) for region in self._arena.regions]

    def claim(self, block: int) -> Tensor:
        return self._buffers[block]

    def release(self, block: int) -> None:
        pass

    def fail(self, error: BaseException) -> None:
        pass

    @property
    def num_bytes(self) -> int:
        return self._arena.num_bytes

    def close(self) -> None:
        self._buffers = []
        self._arena.close()


class RingGradients:
    """A few buffers, each large enough for any block.

    Args:
        num_buffers: blocks whose gradients may be under way at once; each costs the largest block's bytes.
    """

    kept = False

    def __init__(self, layouts: Sequence[BlockLayout], dtype: torch.dtype, pin: bool, num_buffers: int):
        self.dtype = dtype
        self._sizes = [lay.num_trainable for lay in layouts]
        self._arena = Arena([max(self._sizes) * dtype.itemsize] * num_buffers, "grads", pin)
        self._free = [region.view(dtype) for region in self._arena.regions]
        self._claimed: dict[int, Tensor] = {}
        self._changed = threading.Condition()
        self._error: BaseException | None = None

    def claim(self, block: int) -> Tensor:
        with self._changed:
            if block not in self._claimed:
                self._changed.wait_for(lambda: self._free or self._error)
                if self._error:
                    raise self._error
                self._claimed[block] = self._free.pop()
            return self._claimed[block][: self._sizes[block]]

    def release(self, block: int) -> None:
        with self._changed:
            if block not in self._claimed:
                raise HorizonError(f"gradient buffer of block {block} was released twice")
            self._free.append(self._claimed.pop(block))
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    @property
    def num_bytes(self) -> int:
        return self._arena.num_bytes

    def close(self) -> None:
        with self._changed:
            self._free, self._claimed = [], {}
        self._arena.close()
