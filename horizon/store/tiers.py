"""One kind of state, a flat tensor per block, on the tier that the placement names: host memory, or the device's.

Of a block that has the state on nvme there is an empty tensor here: `horizon.store.nvme` holds it.

On CPU the `hbm` tier is ordinary memory, so that what moves blocks and updates them there runs without a GPU, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set

import torch
from torch import Tensor

from horizon.errors import BudgetError
from horizon.store.arena import Arena
from horizon.units import format_bytes

NOWHERE: frozenset[int] = frozenset()
Nodes = Callable[[str, int], tuple[int, ...]]  # NUMA nodes of a state of a block; none: where the kernel puts it


def anywhere(state: str, block: int) -> tuple[int, ...]:
    """Host memory without a choice of nodes."""
    return ()


class TieredState:
    """A flat tensor per block, zero at first.

    Args:
        numels: elements of each block.
        purpose: named in errors, and in the question to `nodes`.
        pin: register what lies on the host with CUDA.
        device: whose memory the hbm tier is.
        in_hbm: blocks that lie there.
        on_nvme: blocks that have nothing here, and stay where they are.
        nodes: NUMA nodes of each other block.

    Attributes:
        blocks: the tensors by block number; the list stays the same when blocks move.

    Raises:
        BudgetError: a tier has no room.
        ConfigError: memory cannot be bound to the nodes.
    """

    def __init__(
        self, numels: Sequence[int], dtype: torch.dtype, purpose: str, pin: bool, device: torch.device,
        in_hbm: Set[int], on_nvme: Set[int] = NOWHERE, nodes: Nodes = anywhere,
    ):  # fmt: skip
        numels = [0 if block in on_nvme else num for block, num in enumerate(numels)]
        self._numels, self._dtype, self._purpose, self._pin, self._device = numels, dtype, purpose, pin, device
        self._nodes = nodes
        self._arenas: list[Arena] = []
        self._homes: dict[int, tuple[Arena, int]] = {}  # arena and region on the host
        self.blocks: list[Tensor] = []
        try:
            self._allocate(in_hbm)
        except BaseException:
            self.close()
            raise

    def _allocate(self, in_hbm: Set[int]) -> None:
        """One arena for the blocks on the same nodes."""
        of_nodes: dict[tuple[int, ...], list[int]] = {}
        for block in range(len(self._numels)):
            if block not in in_hbm:
                of_nodes.setdefault(self._nodes(self._purpose, block), []).append(block)
        for nodes, blocks in of_nodes.items():
            sizes = [self._numels[block] * self._dtype.itemsize for block in blocks]
            self._arenas.append(Arena(sizes, self._purpose, self._pin, nodes))
            self._homes |= {block: (self._arenas[-1], region) for region, block in enumerate(blocks)}
        for block in range(len(self._numels)):
            arena, region = self._homes.get(block, (None, 0))
            self.blocks.append(self._on_device(block) if arena is None else arena.regions[region].view(self._dtype))

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
            nodes = self._nodes(self._purpose, block)
            arena = Arena([self._numels[block] * self._dtype.itemsize], self._purpose, self._pin, nodes)
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
