"""Host space for offloaded boundary activations, taken first from gradient buffers that are idle meanwhile.

Which buffers may be borrowed, and when, stands at `horizon.plan.activations.borrow`. Only what does not fit there costs
memory of its own, which grows when needed and is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from horizon.plan.activations import BORROW_ALIGN, Key, borrow
from horizon.store.arena import Arena
from horizon.units import align_up


class OffloadSpace:
    """Byte regions on the host for offloaded boundaries; `nodes`: NUMA nodes of its own memory."""

    def __init__(self, pin: bool, nodes: Sequence[int] = ()):
        self._pin, self._nodes = pin, nodes
        self._own: Arena | None = None

    def regions(self, sizes: Mapping[Key, int], idle: Sequence[Tensor]) -> dict[Key, list[Tensor]]:
        """Byte regions for every key, one after the other as many bytes as it needs; valid until the next call.

        Args:
            sizes: bytes of each boundary.
            idle: per block its gradient buffer, or an empty tensor where it is not idle.
        """
        placed, homeless = borrow(sizes, [buffer.numel() * buffer.element_size() for buffer in idle])
        regions = {
            key: [idle[p.buffer].view(torch.uint8)[p.offset : p.offset + p.num_bytes] for p in pieces]
            for key, pieces in placed.items()
        }
        offset = 0
        space = self._own_space(sum(align_up(num_bytes, BORROW_ALIGN) for num_bytes in homeless.values()))
        for key, num_bytes in homeless.items():
            regions[key].append(space[offset : offset + num_bytes])
            offset += align_up(num_bytes, BORROW_ALIGN)
        return regions

    def _own_space(self, num_bytes: int) -> Tensor:
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        if self._own is None or self._own.regions[0].numel() < num_bytes:
            self.close()
            self._own = Arena([num_bytes], "offloaded activations", self._pin, self._nodes)
        return self._own.regions[0]

    def close(self) -> None:
        """Give its own memory back. Idempotent."""
        if self._own is not None:
            self._own.close()
            self._own = None
