"""Device slots that blocks' masters pass through, once a walk: up, updated in place, and back down.

A slot moves through one cycle, and only `Slot.to` may move it:

    FREE -> LOADED -> IN_USE -> FREE

`loaded` is recorded on the fetch stream and compute waits for it. `free` is recorded behind the last use, a kernel on
compute or the write-back on drain, and fetch waits for it before the next load. What blocks compute with are copies in
other buffers, so a slot is free as soon as these are made, while the block still computes.

Blocks that another one borrows from are loaded once and kept on the device, each in a slot of its own: there a tied
embedding has both its users, and its updates need not cross the link.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from torch import Tensor

from horizon.layout import BlockLayout
from horizon.stream.streams import Streams
from horizon.stream.timeline import Cause
from horizon.zo.masters import Masters

UNKNOWN = -1  # version of a slot whose contents cannot be trusted


class Back(Enum):
    """Which blocks a walk sends back to the host, of those that it has updated."""

    NOTHING = auto()
    STREAMED = auto()  # not the kept ones, whose updates stay on the device
    ALL = auto()


class SlotState(Enum):
    """Where one slot is in its cycle."""

    FREE = auto()  # may be loaded, once `free` has passed
    LOADED = auto()  # copies issued on the fetch stream; waits for its block's turn
    IN_USE = auto()  # kernels that read and write the master are being issued


_NEXT = {
    SlotState.FREE: {SlotState.LOADED},
    SlotState.LOADED: {SlotState.IN_USE},
    SlotState.IN_USE: {SlotState.FREE},
}


@dataclass(slots=True)
class Slot:
    """One buffer and what it holds."""

    index: int
    flat: tuple[Tensor, ...]  # one tensor a state, as long as the largest block that it may hold
    state: SlotState = SlotState.FREE
    block: int | None = None
    version: int = UNKNOWN  # steps that the contents have seen
    loaded: Any = None
    free: Any = None

    def to(self, state: SlotState) -> None:
        """Move to `state`, or raise naming slot, block and both states."""
        if state not in _NEXT[self.state]:
            expected = " or ".join(sorted(s.name for s in _NEXT[self.state]))
            raise RuntimeError(
                f"slot {self.index} (block {self.block}) cannot go from {self.state.name} to {state.name}; "
                f"expected {expected}"
            )
        self.state = state


def kept_blocks(layouts: Sequence[BlockLayout]) -> frozenset[int]:
    """The blocks that others borrow from."""
    return frozenset(b.owner for layout in layouts for b in layout.borrowed)


class MasterSlots:
    """Loads the streamed blocks in their order, again and again, as far ahead as slots are free.

    Behind the last block of a walk come the first ones of the next, into all slots but one: what the caller brings to
    the device before that walk must not queue behind so many that the link then waits for compute to free a slot.

    Args:
        num_slots: 1 serialises everything; 3 have a block on its way up, one in use and one on its way down.
        make: gives the flat tensors of a slot of so many elements.
    """

    def __init__(self, streams: Streams, masters: Masters, num_slots: int, make: Callable[[int], tuple[Tensor, ...]]):
        layouts = masters.layouts
        self._streams, self._masters = streams, masters
        kept = kept_blocks(layouts)
        self._streamed = [layout.index for layout in layouts if layout.index not in kept]
        size = slot_elements(layouts, kept)
        # With no more slots than blocks no block is ever in two, and a slot is freed after its next block was written.
        self._slots = [Slot(i, make(size)) for i in range(min(num_slots, len(self._streamed)))]
        self._kept = {b: Slot(num_slots + i, make(layouts[b].num_elements)) for i, b in enumerate(sorted(kept))}
        self._queue: deque[Slot] = deque()  # loaded, in the order of the walk
        self._ahead = 0  # loads since the walk began, those issued before it included
        self._writing: tuple[Slot, int] | None = None

    def version(self, block: int) -> int:
        """Steps that the block has seen, where its newest bits are."""
        kept = self._kept.get(block)
        return self._masters.versions[block] if kept is None or kept.version == UNKNOWN else kept.version

    def begin(self) -> None:
        """A walk begins."""
        self._ahead = max(0, self._ahead - len(self._streamed))
        self._prefetch(len(self._streamed))

    def acquire(self, block: int) -> Slot:
        """The slot with the block's master, readable and writable by compute until `release`."""
        slot = self._kept.get(block)
        if slot is None:
            slot = self._next_slot(block)
        elif slot.version == UNKNOWN:
            slot.state = SlotState.FREE
            self._load(slot, block)
        with self._streams.waiting(Cause.link, "weights", block):
            self._streams.compute.wait_event(slot.loaded)
        if block not in self._kept:
            slot.to(SlotState.IN_USE)
        return slot

    def release(self, slot: Slot, back: Back) -> None:
        """All kernels that read or write the slot have been issued."""
        assert slot.block is not None
        done, is_kept = self._streams.compute.record_event(), slot.block in self._kept
        is_newer = slot.version > self._masters.versions[slot.block]
        if is_newer and (back is Back.ALL or (back is Back.STREAMED and not is_kept)):
            self._streams.drain.wait_event(done)
            done = self._write(slot, slot.version)
        if not is_kept:
            slot.free = done
            slot.to(SlotState.FREE)
            self._prefetch(len(self._streamed) + len(self._slots) - 1)

    def states(self, slot: Slot) -> tuple[Tensor, ...]:
        """The block's flat tensors in its slot."""
        assert slot.block is not None
        size = self._masters.layouts[slot.block].num_elements
        return tuple(flat[:size] for flat in slot.flat)

    def reset(self) -> None:
        """After a failure, all device work done: forget what is loaded; what was on its way to the host gets there."""
        if self._writing is not None:
            self._write(*self._writing)
            self._streams.synchronize()
        for slot in self._slots:
            slot.state, slot.block, slot.free = SlotState.FREE, None, None
        self._queue.clear()
        self._ahead = 0

    def _prefetch(self, limit: int) -> None:
        """Issue loads, up to so many since the walk began, while a slot is free."""
        for slot in self._slots:
            if slot.state is SlotState.FREE and self._ahead < limit:
                self._load(slot, self._streamed[self._ahead % len(self._streamed)])
                self._queue.append(slot)
                self._ahead += 1

    def _next_slot(self, block: int) -> Slot:
        slot = self._queue.popleft()
        if slot.block != block:
            raise RuntimeError(f"block {slot.block} was loaded where block {block} is the next visit")
        return slot

    def _load(self, slot: Slot, block: int) -> None:
        slot.to(SlotState.LOADED)
        fetch = self._streams.fetch
        if slot.free is not None:  # a kernel, or its way back to the host, may still need the contents
            fetch.wait_event(slot.free)
        slot.block, slot.version = block, self._masters.versions[block]
        with self._streams.moving(fetch, "weights", block):
            for target, source in zip(self.states(slot), self._masters.states[block], strict=True):
                self._streams.copy(fetch, target, source)
        slot.loaded = fetch.record_event()

    def _write(self, slot: Slot, version: int) -> Any:
        """Bits and version of a block change together: if anything interrupts, `reset` takes it up again.

        Bits that are frozen are on the host already.
        """
        self._writing = slot, version
        drain, block = self._streams.drain, slot.block
        assert block is not None
        if trained := self._masters.layouts[block].num_trainable:
            with self._streams.moving(drain, "weights", block):
                for target, source in zip(self._masters.states[block], self.states(slot), strict=True):
                    self._streams.copy(drain, target[:trained], source[:trained])
        self._masters.versions[block] = version
        self._writing = None
        return drain.record_event()


def slot_elements(layouts: Sequence[BlockLayout], kept: Set[int]) -> int:
    """Elements of a slot: those of the largest block that is streamed."""
    return max((layout.num_elements for layout in layouts if layout.index not in kept), default=0)
