"""Buffers that gradients wait in for their update: one per block, or a short ring.

Exact clipping makes all gradients wait for the global norm, so they are *kept* (2 B/param in bf16). Without
clipping a block's update starts as soon as its gradient has landed, and a *ring* of a few buffers is enough.
The executor claims a block's buffer before writing it; the optimizer releases it after the update. A buffer is on the
tier of its block's states: on the host, where the gradient is drained to, or on the device, where it stays.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence, Set
from typing import Protocol

import torch
from torch import Tensor

from horizon.errors import HorizonError
from horizon.layout import BlockLayout
from horizon.plan.memory import GRADS, RING_BUFFERS, MemoryNeeds
from horizon.store.tiers import NOWHERE, Nodes, TieredState, anywhere

CPU = torch.device("cpu")


class GradientBuffers(Protocol):
    """Where gradients wait."""

    dtype: torch.dtype
    kept: bool  # gradients stay readable until the next backward
    in_hbm: frozenset[int]  # blocks whose buffers are on the device

    def claim(self, block: int) -> Tensor:
        """The block's buffer, [num_trainable]; waits until one is free. Claiming again returns the same."""

    def release(self, block: int) -> None:
        """The block's gradient is no longer needed."""

    def fail(self, error: BaseException) -> None:
        """Wake whoever waits for a buffer: none will come."""

    def keep_in_hbm(self, in_hbm: Set[int]) -> None:
        """Have the buffers of exactly these blocks on the device, with what they keep; no buffer may be claimed."""

    @property
    def num_bytes(self) -> int:
        """Host bytes held."""

    def close(self) -> None:
        """Give the memory back. Idempotent."""


class KeptGradients:
    """A buffer for every block."""

    kept = True

    def __init__(
        self,
        layouts: Sequence[BlockLayout],
        dtype: torch.dtype,
        pin: bool,
        device: torch.device = CPU,
        in_hbm: Set[int] = NOWHERE,
        nodes: Nodes = anywhere,
    ):
        self.dtype, self.in_hbm = dtype, frozenset(in_hbm)
        self._buffers = TieredState(
            [lay.num_trainable for lay in layouts], dtype, GRADS, pin, device, in_hbm, nodes=nodes
        )

    def claim(self, block: int) -> Tensor:
        return self._buffers.blocks[block]

    def release(self, block: int) -> None:
        pass

    def fail(self, error: BaseException) -> None:
        pass

    def keep_in_hbm(self, in_hbm: Set[int]) -> None:
        self._buffers.keep_in_hbm(in_hbm)
        self.in_hbm = frozenset(in_hbm)

    @property
    def num_bytes(self) -> int:
        return self._buffers.num_bytes

    def close(self) -> None:
        self._buffers.close()


class RingGradients:
    """A few buffers per tier, each large enough for any block of that tier.

    Args:
        num_buffers: blocks of a tier whose gradients may be under way at once; each costs the largest block's bytes.
    """

    kept = False

    def __init__(
        self,
        layouts: Sequence[BlockLayout],
        dtype: torch.dtype,
        pin: bool,
        num_buffers: int,
        device: torch.device = CPU,
        in_hbm: Set[int] = NOWHERE,
        nodes: Nodes = anywhere,
    ):
        self.dtype, self.in_hbm, self._nodes = dtype, frozenset(in_hbm), nodes
        self._pin, self._num_buffers, self._device = pin, num_buffers, device
        self._sizes = [lay.num_trainable for lay in layouts]
        self._claimed: dict[int, Tensor] = {}
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._make()

    def _make(self) -> None:
        on_host = max((n for b, n in enumerate(self._sizes) if b not in self.in_hbm), default=0)
        on_device = max((self._sizes[b] for b in self.in_hbm), default=0)
        num = self._num_buffers
        numels, in_hbm = [on_host] * num + [on_device] * num, set(range(num, 2 * num))
        away = next((b for b in range(len(self._sizes)) if b not in self.in_hbm), 0)  # all its blocks are on one tier
        nodes = self._nodes(GRADS, away)
        self._buffers = TieredState(numels, self.dtype, GRADS, self._pin, self._device, in_hbm, nodes=lambda *_: nodes)
        self._free = {False: self._buffers.blocks[:num], True: self._buffers.blocks[num:]}  # by: on the device

    def claim(self, block: int) -> Tensor:
        with self._changed:
            if block not in self._claimed:
                free = self._free[block in self.in_hbm]
                self._changed.wait_for(lambda: free or self._error)
                if self._error:
                    raise self._error
                self._claimed[block] = free.pop()
            return self._claimed[block][: self._sizes[block]]

    def release(self, block: int) -> None:
        with self._changed:
            if block not in self._claimed:
                raise HorizonError(f"gradient buffer of block {block} was released twice")
            self._free[block in self.in_hbm].append(self._claimed.pop(block))
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def keep_in_hbm(self, in_hbm: Set[int]) -> None:
        self.close()
        self.in_hbm = frozenset(in_hbm)
        self._make()

    @property
    def num_bytes(self) -> int:
        return self._buffers.num_bytes

    def close(self) -> None:
        with self._changed:
            self._free, self._claimed = {False: [], True: []}, {}
        self._buffers.close()


def make_buffers(needs: MemoryNeeds, pin: bool, device: torch.device) -> KeptGradients | RingGradients:
    """The buffers that the plan has counted."""
    if needs.keeps_gradients:
        return KeptGradients(needs.layouts, needs.grad_dtype, pin, device, needs.in_hbm, needs.nodes)
    return RingGradients(needs.layouts, needs.grad_dtype, pin, RING_BUFFERS, device, needs.in_hbm, needs.nodes)
