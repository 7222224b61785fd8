"""Buffers that gradients wait in for their update: one per block, or a short ring.

Exact clipping makes all gradients wait for the global norm, so they are *kept* (2 B/param in bf16). Without
clipping a block's update starts as soon as its gradient has landed, and a *ring* of a few buffers is enough.
The executor claims a block's buffer before writing it; the optimizer releases it after the update. A buffer is on the
tier of its block's states: on the host, where the gradient is drained to, or on the device, where it stays. Kept
gradients may wait on nvme instead: they go there through a ring as well, and come back through it for their update.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence, Set
from typing import Protocol

import torch
from torch import Tensor

from horizon.errors import HorizonError
from horizon.layout import BlockLayout
from horizon.plan.disk import Place
from horizon.plan.memory import GRADS, RING_BUFFERS, MemoryNeeds
from horizon.store.ledger import Ledger
from horizon.store.loads import Event
from horizon.store.nvme import NvmeFolder, as_bytes
from horizon.store.spill import Spill
from horizon.store.tiers import NOWHERE, Nodes, TieredState, anywhere

CPU = torch.device("cpu")


class GradientBuffers(Protocol):
    """Where gradients wait."""

    dtype: torch.dtype
    kept: bool  # gradients stay readable until the next backward
    on_nvme: frozenset[int]  # blocks whose gradients go to disk and come back

    @property
    def in_hbm(self) -> frozenset[int]:
        """Blocks whose buffers are on the device."""

    def begin(self, order: Sequence[int], adds: bool) -> None:
        """A backward is about to claim these blocks, in this order; no update of them is under way.

        `adds`: to what is in their buffers, else that is void.
        """

    def claim(self, block: int) -> Tensor:
        """The block's buffer, [num_trainable]; waits until one is free. Claiming again returns the same."""

    def filled(self, block: int, event: Event) -> None:
        """After `event` the block's whole gradient is in its buffer."""

    def expect_updates(self) -> None:
        """All blocks will be updated, in order."""

    def gradient(self, block: int) -> Tensor:
        """The block's gradient, [num_trainable], for its update, until it is released."""

    def read(self, block: int, start: int, stop: int) -> Tensor:
        """Elements of the block's kept gradient, a new fp32 tensor on the CPU."""

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
    """A buffer for every block but those in `elsewhere`."""

    kept = True
    on_nvme: frozenset[int] = NOWHERE

    def __init__(
        self,
        layouts: Sequence[BlockLayout],
        dtype: torch.dtype,
        pin: bool,
        device: torch.device = CPU,
        in_hbm: Set[int] = NOWHERE,
        nodes: Nodes = anywhere,
        elsewhere: Set[int] = NOWHERE,
    ):
        self.dtype, self.in_hbm = dtype, frozenset(in_hbm)
        numels = [lay.num_trainable for lay in layouts]
        self._buffers = TieredState(numels, dtype, GRADS, pin, device, in_hbm, elsewhere, nodes)

    def begin(self, order: Sequence[int], adds: bool) -> None:
        pass

    def claim(self, block: int) -> Tensor:
        return self._buffers.blocks[block]

    def filled(self, block: int, event: Event) -> None:
        pass

    def expect_updates(self) -> None:
        pass

    def gradient(self, block: int) -> Tensor:
        return self.claim(block)

    def read(self, block: int, start: int, stop: int) -> Tensor:
        return self.claim(block)[start:stop].to("cpu", torch.float32, copy=True)

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
    on_nvme: frozenset[int] = NOWHERE

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

    def begin(self, order: Sequence[int], adds: bool) -> None:
        pass

    def claim(self, block: int) -> Tensor:
        with self._changed:
            if block not in self._claimed:
                free = self._free[block in self.in_hbm]
                self._changed.wait_for(lambda: free or self._error)
                if self._error:
                    raise self._error
                self._claimed[block] = free.pop()
            return self._claimed[block][: self._sizes[block]]

    def filled(self, block: int, event: Event) -> None:
        pass

    def expect_updates(self) -> None:
        pass

    def gradient(self, block: int) -> Tensor:
        return self.claim(block)

    def read(self, block: int, start: int, stop: int) -> Tensor:
        raise HorizonError("a ring keeps no gradients")

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


class SpilledGradients:
    """Kept gradients, those of `spilled` blocks on nvme.

    Args:
        in_memory: the buffers of the other blocks.
        spill: passes the spilled ones through a ring.
    """

    kept = True

    def __init__(
        self, in_memory: KeptGradients, spill: Spill, layouts: Sequence[BlockLayout], spilled: Collection[int]
    ):
        self._in_memory, self._spill, self.dtype = in_memory, spill, in_memory.dtype
        self._sizes = {lay.index: lay.num_trainable for lay in layouts}
        self.on_nvme = frozenset(spilled)

    @property
    def in_hbm(self) -> frozenset[int]:
        """Blocks whose buffers are on the device."""
        return self._in_memory.in_hbm

    def begin(self, order: Sequence[int], adds: bool) -> None:
        self._spill.begin()
        if adds:
            self._spill.expect(self._places(order))

    def claim(self, block: int) -> Tensor:
        if block not in self.on_nvme:
            return self._in_memory.claim(block)
        return self._numbers(block, self._spill.claim((GRADS, block)))

    def filled(self, block: int, event: Event) -> None:
        if block in self.on_nvme:
            self._spill.filled((GRADS, block), event)

    def expect_updates(self) -> None:
        self._spill.expect(self._places(sorted(self.on_nvme)))

    def gradient(self, block: int) -> Tensor:
        if block not in self.on_nvme:
            return self._in_memory.gradient(block)
        return self._numbers(block, self._spill.fetch((GRADS, block)))

    def read(self, block: int, start: int, stop: int) -> Tensor:
        if block not in self.on_nvme:
            return self._in_memory.read(block, start, stop)
        numbers = torch.empty(stop - start, dtype=self.dtype)
        self._spill.read((GRADS, block), start * self.dtype.itemsize, as_bytes(numbers))
        return numbers.float()

    def release(self, block: int) -> None:
        if block in self.on_nvme:
            self._spill.release((GRADS, block))

    def fail(self, error: BaseException) -> None:
        """The ledger tells who waits for a buffer."""

    def keep_in_hbm(self, in_hbm: Set[int]) -> None:
        self._in_memory.keep_in_hbm(in_hbm)

    @property
    def num_bytes(self) -> int:
        return self._in_memory.num_bytes + self._spill.num_bytes

    def close(self) -> None:
        self._spill.close()
        self._in_memory.close()

    def _places(self, blocks: Sequence[int]) -> list[Place]:
        return [(GRADS, block) for block in blocks if block in self.on_nvme]

    def _numbers(self, block: int, data: Tensor) -> Tensor:
        return data.view(self.dtype)[: self._sizes[block]]


def make_buffers(
    needs: MemoryNeeds, pin: bool, device: torch.device, ledger: Ledger, nvme: NvmeFolder
) -> GradientBuffers:
    """The buffers that the plan has counted.

    Raises:
        BudgetError: a tier has no room for them.
    """
    spilled, on_disk = needs.grads_on_nvme, needs.gradient_map
    if not needs.keeps_gradients:
        return RingGradients(needs.layouts, needs.grad_dtype, pin, RING_BUFFERS, device, needs.in_hbm, needs.nodes)
    kept = KeptGradients(needs.layouts, needs.grad_dtype, pin, device, needs.in_hbm, needs.nodes, spilled)
    if not spilled:
        return kept
    try:
        nodes = needs.nodes(GRADS, min(spilled))
        spill = Spill(nvme.open(on_disk), on_disk, RING_BUFFERS, ledger, pin, nodes)
    except BaseException:
        kept.close()
        raise
    return SpilledGradients(kept, spill, needs.layouts, spilled)
