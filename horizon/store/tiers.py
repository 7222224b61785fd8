"""One kind of state, a flat tensor per block, on the tier that the placement names: host memory, or the device's.

Of a block that has the state on nvme there is an empty tensor here: `horizon.store.nvme` holds it.

On CPU the `hbm` tier is ordinary memory, so that what moves blocks and updates them there runs without a GPU, too.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

import torch
from torch import Tensor

from horizon.errors import BudgetError
from horizon.store.arena import Arena
from horizon.units import format_bytes

NOWHERE: frozenset[int] = frozenset()


class TieredState:
    """A flat tensor per block, zero at first.

    Args:
        numels: elements of each block.
        purpose: named in errors.
        pin: register what lies on the host with CUDA.
        device: whose memory the hbm tier is.
        in_hbm: blocks that lie there.
        on_nvme: blocks that have nothing here, and stay where they are.

    Attributes:
        blocks: the tensors by block number; the list stays the same when blocks move.

    Raises:
        BudgetError: a tier has no room.
    """

    def __init__(
        self, numels: Sequence[int], dtype: torch.dtype, purpose: str, pin: bool, device: torch.device,
        in_hbm: Set[int], on_nvme: Set[int] = NOWHERE,
    ):  # fmt: skip
        numels = [0 if block in on_nvme else num for block, num in enumerate(numels)]
        self._numels, self._dtype, self._purpose, self._pin, self._device = numels, dtype, purpose, pin, device
        sizes = [0 if b in in_hbm else n * dtype.itemsize for b, n in enumerate(numels)]
        arena = Arena(sizes, purpose, pin)
        self._arenas = [arena]
        self._homes = {b: (arena, b) for b in range(len(numels)) if b not in in_hbm}  # arena and region on the host
        self.blocks: list[Tensor] = []
        try:
            for block, region in enumerate(arena.regions):
                self.blocks.append(self._on_device(block) if block in in_hbm else region.view(dtype))
        except BaseException:
            self.close()
            raise

    @property
    def num_bytes(self) -> int:
        """Host bytes held."""
        return sum(arena.num_bytes for arena in self._arenas)

    @property
    def pinned(self) -> bool:
        """Whether copies between what lies on the host and the device are asynchronous."""
        return all(arena.pinned for arena in self._arenas)

    def keep_in_hbm(self, in_hbm: Set[int]) -> None:
        """Have exactly these blocks on the device: bits are copied, memory that they leave is given back."""
        for block in range(len(self.blocks)):
            if (block in in_hbm) is (block in self._homes):
                self._move(block)

    def _move(self, block: int) -> None:
        home = self._homes.get(block)
        if home is None:
            arena = Arena([self._numels[block] * self._dtype.itemsize], self._purpose, self._pin)
            self._arenas.append(arena)
            self.blocks[block] = arena.regions[0].view(self._dtype).copy_(self.blocks[block])
            self._homes[block] = arena, 0
        else:
            self.blocks[block] = self._on_device(block).copy_(self.blocks[block])
            del self._homes[block]
            arena, region = home
            arena.release(region)
            if not any(arena is other for other, _ in self._homes.values()):
                arena.close()
                self._arenas.remove(arena)

    def _on_device(self, block: int) -> Tensor:
        num_elements = self._numels[block]
        try:
            return torch.zeros(num_elements, dtype=self._dtype, device=self._device)
        except torch.cuda.OutOfMemoryError as error:
            raise BudgetError(
                f"the device has no {format_bytes(num_elements * self._dtype.itemsize)} left for {self._purpose} of "
                f"block {block}; use a smaller memory.hbm_blocks, or memory.policy=dram"
            ) from error

    def close(self) -> None:
        """Give all memory back. Idempotent."""
        self.blocks.clear()
        self._homes.clear()
        for arena in self._arenas:
            arena.close()
