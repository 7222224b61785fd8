"""Host space for offloaded boundary activations, taken first from gradient buffers that are idle meanwhile.

A boundary that enters block b is written after the previous step's updates of blocks below b are done (the forward
waited for them) and read back before gradients of blocks below b are drained. So it may lie in the kept gradient
buffers of blocks below b. Only what does not fit there costs memory of its own, which grows when needed and is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from horizon.store.arena import Arena
from horizon.units import align_up

Key = tuple[int, int]  # block, micro-batch
ALIGN = 256


def borrow(sizes: Mapping[Key, int], idle: Sequence[int]) -> tuple[dict[Key, tuple[int, int]], list[Key]]:
    """Place boundaries in idle gradient buffers.

    Args:
        sizes: bytes of each boundary.
        idle: bytes of each block's gradient buffer, 0 where it is not idle.

    Returns:
        (buffer's block, byte offset) per placed boundary, and the keys that found no room.
    """
    used = [0] * len(idle)
    placed: dict[Key, tuple[int, int]] = {}
    homeless = []
    for key in sorted(sizes):
        need = align_up(sizes[key], ALIGN)
        home = next((b for b in range(key[0]) if used[b] + need <= idle[b]), None)
        if home is None:
            homeless.append(key)
        else:
            placed[key] = home, used[home]
            used[home] += need
    return placed, homeless


def own_bytes(sizes: Mapping[Key, int], idle: Sequence[int]) -> int:
    """Host bytes needed beyond what can be borrowed."""
    return sum(align_up(sizes[key], ALIGN) for key in borrow(sizes, idle)[1])


class OffloadSpace:
    """Byte regions on the host for offloaded boundaries."""

    def __init__(self, pin: bool):
        self._pin = pin
        self._own: Arena | None = None

    def regions(self, sizes: Mapping[Key, int], idle: Sequence[Tensor]) -> dict[Key, Tensor]:
        """A byte region for every key, valid until the next call.

        Args:
            sizes: bytes of each boundary.
            idle: per block its gradient buffer, or an empty tensor where it is not idle.
        """
        placed, homeless = borrow(sizes, [buffer.numel() * buffer.element_size() for buffer in idle])
        regions = {
            key: idle[block].view(torch.uint8)[offset : offset + sizes[key]] for key, (block, offset) in placed.items()
        }
        offset = 0
        space = self._own_space(sum(align_up(sizes[key], ALIGN) for key in homeless))
        for key in homeless:
            regions[key] = space[offset : offset + sizes[key]]
            offset += align_up(sizes[key], ALIGN)
        return regions

    def _own_space(self, num_bytes: int) -> Tensor:
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        if self._own is None or self._own.regions[0].numel() < num_bytes:
            self.close()
            self._own = Arena([num_bytes], "offloaded activations", self._pin)
        return self._own.regions[0]

    def close(self) -> None:
        """Give its own memory back. Idempotent."""
        if self._own is not None:
            self._own.close()
            self._own = None
