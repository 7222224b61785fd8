"""What is on the `nvme` tier: where it lies in a file, and what staging in host memory it passes through.

Direct I/O moves whole disk blocks: addresses, offsets and lengths are multiples of `DISK_BLOCK`. A state of a block is
one region of the file. Updates bring it in by *pages*: the same range of elements of every state, so that a staged page
holds all that an update of these elements needs. Loads to the device bring whole blocks. Gradients and offloaded
boundaries have files of their own, and move whole. Pure arithmetic.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from horizon.config.schema import Tier
from horizon.layout import BlockLayout
from horizon.plan.states import State
from horizon.units import MIB, align_up

DISK_BLOCK = 4096  # bytes; what O_DIRECT asks for on every disk in use
LARGE_REGION = 2 * MIB  # regions of this size begin at multiples of it
PAGE_ELEMENTS = 1 << 23  # 32 MiB of an fp32 state; multiples of 2**16 keep pages of all states at whole disk blocks
UPDATE_PAGES = 12  # staged for updates at a time: read ahead, being updated, being written
LOAD_BUFFERS = 2  # blocks staged on their way to the device at a time
BOUNDARY_BUFFERS = 4  # offloaded boundaries staged at a time: being filled, being written; being read, being used
BOUNDARY_PIECE = 16 * MIB  # of a boundary, that moves at a time

Place = tuple[str, int]  # state, block
Placement = Mapping[Place, Tier]  # of states of blocks on the host that are not in dram


class Region(NamedTuple):
    """Bytes of the file."""

    offset: int
    num_bytes: int  # the state's, padded to whole disk blocks
    page_bytes: int  # of a full page of it


@dataclass(frozen=True, slots=True)
class DiskMap:
    """The regions of a file."""

    regions: Mapping[Place, Region]
    num_bytes: int  # of the file

    @property
    def largest(self) -> int:
        """Bytes of the largest region."""
        return max((region.num_bytes for region in self.regions.values()), default=0)


def on_tier(placed: Placement, tier: Tier) -> frozenset[Place]:
    """What is on a tier of the host other than dram."""
    return frozenset(place for place, where in placed.items() if where is tier)


def by_block(
    states: Iterable[State], layouts: Iterable[BlockLayout], places: Collection[Place]
) -> Iterator[tuple[State, int]]:
    """(state, block) of those places, block by block."""
    states = tuple(states)
    for layout in layouts:
        for state in states:
            if (state.name, layout.index) in places:
                yield state, layout.index


def map_disk(states: Sequence[State], layouts: Sequence[BlockLayout], places: Collection[Place]) -> DiskMap:
    """Lay out the file: block by block, each state of a block in a region of its own."""
    regions, end = {}, 0
    for state, block in by_block(states, layouts, places):
        size = align_up(state.num_bytes(layouts[block]), DISK_BLOCK)
        offset = align_up(end, LARGE_REGION if size >= LARGE_REGION else DISK_BLOCK)
        regions[state.name, block] = Region(offset, size, PAGE_ELEMENTS // state.group * state.dtype.itemsize)
        end = offset + size
    return DiskMap(regions, end)


def boundary_place(block: int, micro_batch: int) -> Place:
    """What an offloaded boundary on nvme is called; each is written apart, so that no two share a piece."""
    return f"activations.{micro_batch}", block


def map_boundaries(sizes: Mapping[tuple[int, int], int]) -> DiskMap:
    """Lay out a file for boundaries; `sizes`: bytes by (block, micro-batch)."""
    regions, end = {}, 0
    for (block, micro_batch), num_bytes in sorted(sizes.items()):
        size = align_up(num_bytes, DISK_BLOCK)
        regions[boundary_place(block, micro_batch)] = Region(end, size, BOUNDARY_PIECE)
        end += size
    return DiskMap(regions, end)


def num_pages(layout: BlockLayout) -> int:
    """Pages in which a block's trainable elements are updated."""
    return -(-layout.num_trainable // PAGE_ELEMENTS)


def page_range(layout: BlockLayout, page: int) -> tuple[int, int]:
    """(first, end) of the trainable elements of a page."""
    return page * PAGE_ELEMENTS, min((page + 1) * PAGE_ELEMENTS, layout.num_trainable)


def page_spans(states: Iterable[State], layout: BlockLayout, page: int) -> dict[str, tuple[int, int]]:
    """By state, (offset in its region, bytes to the end of a disk block) of a page."""
    spans = {}
    for state in states:
        numbers = state.span(*page_range(layout, page))
        size = state.dtype.itemsize
        spans[state.name] = numbers.start * size, align_up((numbers.stop - numbers.start) * size, DISK_BLOCK)
    return spans


def paged_bytes(states: Sequence[State], layout: BlockLayout, places: Collection[Place]) -> int:
    """Bytes that an update of the block reads from disk, and writes."""
    paged = [state for state, _ in by_block(states, [layout], places)]
    spans = (page_spans(paged, layout, page) for page in range(num_pages(layout)))
    return sum(num_bytes for of_page in spans for _, num_bytes in of_page.values())


def update_page_bytes(states: Sequence[State], layouts: Sequence[BlockLayout], places: Collection[Place]) -> int:
    """Bytes of one staged page: enough for any page of any block; 0 where updates stage nothing."""
    paged: dict[int, list[State]] = {}
    for state, block in by_block(states, layouts, places):
        paged.setdefault(block, []).append(state)
    sizes = [
        sum(num_bytes for _, num_bytes in page_spans(of_block, layouts[block], 0).values())
        for block, of_block in paged.items()
        if layouts[block].num_trainable
    ]
    return max(sizes, default=0)


class LoadPart(NamedTuple):
    """Elements of one block's state that a load brings to a slot."""

    owner: int
    start: int  # in the owner
    stop: int
    target: int  # in the slot


def load_parts(layout: BlockLayout) -> list[LoadPart]:
    """What a slot that holds the block is filled from: the block itself, and what it borrows."""
    borrowed = [LoadPart(b.owner, b.param.offset, b.param.end, b.offset) for b in layout.borrowed]
    return [LoadPart(layout.index, 0, layout.num_elements, 0), *borrowed]


class StagedPart(NamedTuple):
    """Whole disk blocks around a part of a load, and where they are put in a staging buffer; bytes."""

    state: str
    part: LoadPart
    offset: int  # in the region
    num_bytes: int
    place: int  # in the buffer
    skip: int  # before the part's first byte


def staged_parts(
    loaded: Sequence[State], layout: BlockLayout, places: Collection[Place]
) -> tuple[list[StagedPart], int]:
    """What of a load of the block is staged, one after the other in a buffer, and the bytes of that buffer.

    Args:
        loaded: the states that go to the device; every element of a block has one number of each.
        places: what the device cannot copy from where it is.
    """
    parts, place = [], 0
    for state in loaded:
        size = state.dtype.itemsize
        for part in load_parts(layout):
            if (state.name, part.owner) in places and part.stop > part.start:
                skip = part.start * size % DISK_BLOCK
                num_bytes = align_up(skip + (part.stop - part.start) * size, DISK_BLOCK)
                parts.append(StagedPart(state.name, part, part.start * size - skip, num_bytes, place, skip))
                place += num_bytes
    return parts, place


def staged_places(
    on_nvme: Collection[Place], pageable: Collection[str], layouts: Iterable[BlockLayout], in_hbm: Collection[int]
) -> frozenset[Place]:
    """What the device cannot copy from where it is: on disk, or of a state that CUDA refuses to register."""
    on_host = [layout.index for layout in layouts if layout.index not in in_hbm]
    return frozenset(on_nvme) | {(name, block) for name in pageable for block in on_host}


def load_buffer_bytes(loaded: Sequence[State], layouts: Sequence[BlockLayout], places: Collection[Place]) -> int:
    """Bytes of a buffer for any load that is staged."""
    return max((staged_parts(loaded, layout, places)[1] for layout in layouts), default=0)


def loaded_states(states: Sequence[State], compute_dtype: torch.dtype) -> list[State]:
    """The states that go to the device: weights, and in fp32 what makes them exact."""
    return [s for s in states if s.name == "weights" or (s.name == "residual" and compute_dtype is torch.float32)]
