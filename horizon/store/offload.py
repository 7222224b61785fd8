"""Host space for offloaded boundary activations, taken first from gradient buffers that are idle meanwhile.

Which buffers may be borrowed, and when, stands at `horizon.plan.activations.borrow`. Only what does not fit there costs
memory of its own, which grows when needed and is kept. It is cut where a registration ends, and so is what lies there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from horizon.plan.activations import BORROW_ALIGN, Key, borrow
from horizon.store.arena import PIECE, Arena
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
            regions[key] += cut(space, offset, offset + num_bytes)
            offset += align_up(num_bytes, BORROW_ALIGN)
        return regions

    def _own_space(self, num_bytes: int) -> Sequence[Tensor]:
        if num_bytes == 0:
            return ()
        if self._own is None or sum(region.numel() for region in self._own.regions) < num_bytes:
            self.close()
            sizes = [min(PIECE, num_bytes - start) for start in range(0, num_bytes, PIECE)]
            self._own = Arena(sizes, "offloaded activations", self._pin, self._nodes)
        return self._own.regions

    def close(self) -> None:
        """Give its own memory back. Idempotent."""
        if self._own is not None:
            self._own.close()
            self._own = None


def cut(regions: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """Bytes `start` to `stop` of regions that follow each other."""
    found = []
    for region in regions:
        if start < region.numel() and stop > 0:
            found.append(region[max(start, 0) : stop])
        start, stop = start - region.numel(), stop - region.numel()
    return found
