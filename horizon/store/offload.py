"""Space for offloaded boundary activations: on the host, or in a file on nvme.

On the host it is taken first from gradient buffers that are idle meanwhile. Which buffers may be borrowed, and when,
stands at `horizon.plan.activations.borrow`. Only what does not fit there costs memory of its own, which grows when
needed and is kept. It is cut where a registration ends, and so is what lies there. On nvme all pass through a few
buffers, which borrow nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from horizon.plan.activations import BORROW_ALIGN, Key, borrow
from horizon.plan.disk import BOUNDARY_BUFFERS, boundary_place, map_boundaries
from horizon.store.arena import PIECE, Arena
from horizon.store.ledger import Ledger
from horizon.store.loads import Event
from horizon.store.nvme import NvmeFolder
from horizon.store.spill import Spill
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


class Away(Protocol):
    """Where the offloaded boundaries of one step are, bytes in pieces that follow each other."""

    def __contains__(self, key: Key) -> bool:
        """Whether the boundary leaves the device."""

    def is_ready(self, key: Key) -> bool:
        """Whether `claim` would not wait."""

    def claim(self, key: Key) -> Sequence[Tensor]:
        """Host memory to fill with the boundary, or which has it, once it was filled; valid until the release."""

    def filled(self, key: Key, event: Event) -> None:
        """After `event` the claimed memory has the boundary."""

    def expect(self, order: Sequence[Key]) -> None:
        """These will be claimed in this order, each for the last time."""

    def release(self, key: Key, event: Event) -> None:
        """The boundary is no longer needed after `event`."""


class HostRegions:
    """Boundaries in host memory of their own."""

    def __init__(self, regions: Mapping[Key, Sequence[Tensor]]):
        self._regions = regions

    def __contains__(self, key: Key) -> bool:
        return key in self._regions

    def is_ready(self, key: Key) -> bool:
        return True

    def claim(self, key: Key) -> Sequence[Tensor]:
        return self._regions[key]

    def filled(self, key: Key, event: Event) -> None:
        pass

    def expect(self, order: Sequence[Key]) -> None:
        pass

    def release(self, key: Key, event: Event) -> None:
        pass


class SpilledBoundaries:
    """Boundaries on nvme, which pass through a few buffers of host memory."""

    def __init__(self, spill: Spill, sizes: Mapping[Key, int]):
        self._spill, self._keys = spill, sizes.keys()
        spill.begin({boundary_place(*key): num_bytes for key, num_bytes in sizes.items()})

    def __contains__(self, key: Key) -> bool:
        return key in self._keys

    def is_ready(self, key: Key) -> bool:
        return self._spill.is_ready(boundary_place(*key))

    def claim(self, key: Key) -> Sequence[Tensor]:
        return (self._spill.claim(boundary_place(*key)),)

    def filled(self, key: Key, event: Event) -> None:
        self._spill.filled(boundary_place(*key), event)

    def expect(self, order: Sequence[Key]) -> None:
        self._spill.expect([boundary_place(*key) for key in order])

    def release(self, key: Key, event: Event) -> None:
        self._spill.release(boundary_place(*key), event)


class OffloadFile:
    """A file for boundaries, made when steps need it, and again for those that find no room in it.

    Args:
        pin: register its staging with CUDA.
        nodes: NUMA nodes of that.
    """

    def __init__(self, nvme: NvmeFolder, ledger: Ledger, pin: bool, nodes: Sequence[int] = ()):
        self._nvme, self._ledger, self._pin, self._nodes = nvme, ledger, pin, nodes
        self._spill: Spill | None = None

    def make_room(self, sizes: Mapping[Key, int]) -> SpilledBoundaries:
        """Room for the boundaries of a step, of these bytes; what was there is gone.

        Raises:
            BudgetError: the disk has none.
        """
        if self._spill is None or not self._spill.holds({boundary_place(*key): size for key, size in sizes.items()}):
            self.close()
            disk_map = map_boundaries(sizes)
            file = self._nvme.open(disk_map)
            self._spill = Spill(file, disk_map, BOUNDARY_BUFFERS, self._ledger, self._pin, self._nodes)
        return SpilledBoundaries(self._spill, sizes)

    def close(self) -> None:
        """Give staging and file back. Idempotent."""
        if self._spill is not None:
            self._spill.close()
            self._spill = None


def cut(regions: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """Bytes `start` to `stop` of regions that follow each other."""
    found = []
    for region in regions:
        if start < region.numel() and stop > 0:
            found.append(region[max(start, 0) : stop])
        start, stop = start - region.numel(), stop - region.numel()
    return found
