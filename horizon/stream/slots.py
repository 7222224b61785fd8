"""Device slots that blocks' weights stream through.

A slot moves through one cycle, and only `Slot.to` may move it:

    EMPTY -> LOADING -> READY -> IN_USE -> READY -> (LOADING another block ...)

A released block stays readable until its slot is loaded again, so the turn-around of a step (the last blocks of
the forward are the first of the backward) costs no second transfer. `loaded` is recorded on the fetch stream when
the bytes have landed and compute waits for it; `released` is recorded on the compute stream after the last kernel
that reads them and fetch waits for it before overwriting.

A block whose states are in HBM is computed with where it is, without a load, when blocks compute in bf16. In fp32 its
halves are joined in a slot, as if they came from the host. What is on nvme comes from the buffers of
`horizon.store.loads`, which are told the walk ahead of the slots.

The layers at the turn of a step are resident together. Each has a slot of its own, so that none can be in the way of
another's load.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor

from horizon.layout import BlockLayout
from horizon.models.blocks import block_parameters
from horizon.plan.disk import load_parts
from horizon.plan.memory import in_place, slot_elements
from horizon.store.host import HostStore
from horizon.store.split import join_master
from horizon.stream.streams import Streams
from horizon.stream.timeline import Cause


class SlotState(Enum):
    """Where one slot is in its cycle."""

    EMPTY = auto()  # holds no block
    LOADING = auto()  # copies issued on the fetch stream
    READY = auto()  # holds a block nobody is reading; compute may acquire it, a load may replace it
    IN_USE = auto()  # kernels that read the block are being issued


_NEXT = {
    SlotState.EMPTY: {SlotState.LOADING},
    SlotState.LOADING: {SlotState.READY},
    SlotState.READY: {SlotState.IN_USE, SlotState.LOADING},
    SlotState.IN_USE: {SlotState.READY},
}


@dataclass(slots=True)
class Slot:
    """One buffer and what it holds."""

    index: int
    flat: Tensor  # [largest block's slot elements], the dtype blocks compute in
    halves: tuple[Tensor, ...] | None  # staging for what the master consists of when computing in fp32
    state: SlotState = SlotState.EMPTY
    block: int | None = None
    version: int = -1
    loaded: Any = None
    released: Any = None
    late: Cause = Cause.link  # what the load had to wait for, other than the bytes before it
    params: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # views, made once per block

    def to(self, state: SlotState) -> None:
        """Move to `state`, or raise naming slot, block and both states."""
        if state not in _NEXT[self.state]:
            expected = " or ".join(sorted(s.name for s in _NEXT[self.state]))
            raise RuntimeError(
                f"slot {self.index} (block {self.block}) cannot go from {self.state.name} to {state.name}; "
                f"expected {expected}"
            )
        self.state = state


class WeightSlots:
    """Walks a given sequence of block visits, loading ahead as far as the slots reach.

    Args:
        num_slots: 1 serialises copies and kernels; each further slot loads one block further ahead and costs the
            largest block's bytes on the device.
        dtype: bfloat16 loads the weights; float32 also loads their residual, if there is one, and joins them.
        turn: blocks that have a slot of their own, beside those.
    """

    def __init__(
        self, streams: Streams, store: HostStore, num_slots: int, dtype: torch.dtype, turn: Collection[int] = ()
    ):
        self._streams, self._store, self._dtype = streams, store, dtype
        self.make(num_slots, turn)
        self._visits: list[int] = []
        self._version = 0
        self._next = 0  # visit to acquire next
        self._ahead = 0  # first visit not loaded yet
        self._in_use: dict[int, Slot] = {}  # by block
        self._late: dict[int, Cause] = {}  # blocks that were not there yet when a slot was free for them, and why

    def make(self, num_slots: int, turn: Collection[int] = ()) -> None:
        """So many slots, for the blocks as they are placed now, and one for each block of `turn`."""
        self._num_slots = num_slots
        store, resident = self._store, in_place(self._store.in_hbm, self._dtype)
        size = slot_elements(store.layouts, {*resident, *turn})
        self._slots = [self._new_slot(i, size) for i in range(self._num_slots)]
        own = [b for b in turn if b not in resident]
        self._own = {b: self._new_slot(num_slots + i, store.layouts[b].num_slot_elements) for i, b in enumerate(own)}
        first = num_slots + len(own)
        self._in_place = {b: _slot_in_place(first + i, store, b) for i, b in enumerate(sorted(resident))}

    def free(self) -> None:
        """Give the memory back, until `make`."""
        self._slots, self._own, self._in_place = [], {}, {}

    def _new_slot(self, index: int, size: int) -> Slot:
        flat = self._streams.empty(size, dtype=self._dtype)
        if self._dtype is torch.bfloat16:
            return Slot(index, flat, None)
        high = self._streams.empty(size, dtype=torch.bfloat16)
        if not self._store.residual:
            return Slot(index, flat, (high,))
        return Slot(index, flat, (high, self._streams.empty(size, dtype=torch.int16)))

    def begin(self, visits: list[int], version: int) -> None:
        """Start a walk over `visits` (block numbers) that needs the blocks' weights at `version`."""
        if self._in_use:
            raise RuntimeError(f"a walk begins while block {next(iter(self._in_use))} is in use")
        self._visits, self._version = visits, version
        self._next = self._ahead = 0
        self._late.clear()
        if self._store.loads is not None:
            self._store.loads.begin(visits, version, self._held(visits))
        self.prefetch()

    def reset(self) -> None:
        """Forget everything after a failed step; the buffers stay."""
        for slot in (*self._slots, *self._own.values()):
            slot.state, slot.block, slot.version = SlotState.EMPTY, None, -1
        for slot in self._in_place.values():
            slot.state = SlotState.READY
        self._visits, self._in_use = [], {}
        if self._store.loads is not None:
            self._store.loads.stop()

    def prefetch(self, wait: bool = False) -> None:
        """Issue loads for coming visits while a slot is free and the weights are up to date.

        Args:
            wait: if the very next visit's weights are still being updated, wait for them.
        """
        while self._ahead < len(self._visits):
            block = self._visits[self._ahead]
            if block not in self._in_place and self._holding(block) is None:
                slot, must = self._victim(block), wait and self._ahead == self._next
                if slot is None or not self._up_to_date(block, must) or not self._staged(block, must):
                    return
                self._load(slot, block)
            if self._store.loads is not None:
                self._store.loads.done(self._ahead)
            self._ahead += 1

    def acquire(self) -> tuple[int, dict[str, Tensor]]:
        """The next visit's block number and its parameters, readable by compute until `release` of that block."""
        if self._ahead <= self._next:
            self.prefetch(wait=True)
        block = self._visits[self._next]
        slot = self._in_place.get(block)
        if slot is not None:
            self._wait_for_update(block)
        else:
            slot = self._holding(block)
            if slot is None:
                raise RuntimeError(f"block {block} was not loaded although it is the next visit")
            with self._streams.waiting(slot.late, "weights", block):
                self._streams.compute.wait_event(slot.loaded)
        self._streams.timeline.enter(Cause.arithmetic, self._pass(), block)
        slot.to(SlotState.IN_USE)
        self._in_use[block] = slot
        self._next += 1
        self.prefetch()
        return block, slot.params[block]

    def release(self, block: int) -> None:
        """All kernels reading an acquired block have been issued."""
        slot = self._in_use.pop(block)
        if block not in self._in_place:
            slot.released = self._streams.compute.record_event()
        self._streams.timeline.enter(Cause.launch, "issuing")
        slot.to(SlotState.READY)
        self.prefetch()

    @contextmanager
    def visit(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """The next block of the walk, resident while open."""
        block, params = self.acquire()
        yield block, params
        self.release(block)

    def visits(self, blocks: Sequence[int], version: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Begin a walk over `blocks`, each of which is resident until the next one is asked for."""
        self.begin(list(blocks), version)

        def resident() -> Iterator[tuple[int, dict[str, Tensor]]]:
            for _ in blocks:
                with self.visit() as visited:
                    yield visited

        return resident()

    def _pass(self) -> str:
        """What the visit about to begin is part of."""
        block = self._visits[self._next]
        if block == len(self._store.layouts) - 1:
            return "head"
        return "backward" if block in self._visits[: self._next] else "forward"

    def _holding(self, block: int) -> Slot | None:
        slots = [self._own[block]] if block in self._own else self._slots
        return next((s for s in slots if s.block == block and s.version == self._version), None)

    def _victim(self, block: int) -> Slot | None:
        """The slot to load `block` into: its own or, not in use and not loaded for a coming visit, that needed last."""
        if block in self._own:
            return self._own[block]
        waiting = self._visits[self._next : self._ahead]
        idle = [
            s
            for s in self._slots
            if s.state is not SlotState.IN_USE and not (s.version == self._version and s.block in waiting)
        ]
        return max(idle, key=self._next_use, default=None)

    def _next_use(self, slot: Slot) -> int:
        if slot.block is None or slot.version != self._version or slot.block not in self._visits[self._ahead :]:
            return len(self._visits)
        return self._visits.index(slot.block, self._ahead)

    def _up_to_date(self, block: int, wait: bool) -> bool:
        """Whether the block and those that it borrows from have seen all updates."""
        sources = _sources(self._store.layouts[block])
        if all(self._store.ledger.version(source) >= self._version for source in sources):
            return True
        self._late[block] = Cause.optimizer
        if wait:
            self._wait_for_update(block)
        return wait

    def _staged(self, block: int, wait: bool) -> bool:
        """Whether what a load of the next visit needs in pinned memory is there."""
        loads = self._store.loads
        if loads is None or block not in loads.blocks or loads.is_ready(self._ahead):
            return True
        sources, on_nvme = _sources(self._store.layouts[block]), self._store.on_nvme
        from_disk = any(("weights", b) in on_nvme or ("residual", b) in on_nvme for b in sources)
        cause = self._late[block] = Cause.disk if from_disk else Cause.link  # else the host is copying it
        if wait:
            with self._streams.waiting(cause, "weights", block):
                loads.wait(self._ahead)
        return wait

    def _held(self, visits: Sequence[int]) -> set[int]:
        """Visits that will find their block in a slot: no more others were between than there are slots beside it."""
        through_slots = [(i, b) for i, b in enumerate(visits) if b not in self._in_place and b not in self._own]
        held, last = set(), dict[int, int]()
        for position, (visit, block) in enumerate(through_slots):
            between = {b for _, b in through_slots[last.get(block, position) + 1 : position]}
            if block in last and len(between) < self._num_slots:
                held.add(visit)
            last[block] = position
        return held

    def _wait_for_update(self, block: int) -> None:
        with self._streams.waiting(Cause.optimizer, "update", block):
            for source in _sources(self._store.layouts[block]):
                self._store.ledger.wait(source, self._version)

    def _load(self, slot: Slot, block: int) -> None:
        slot.to(SlotState.LOADING)
        fetch = self._streams.fetch
        if slot.released is not None:  # kernels of the previous block may still be reading
            fetch.wait_event(slot.released)
        if not self._store.in_hbm.isdisjoint(_sources(self._store.layouts[block])):
            fetch.wait_event(self._streams.compute.record_event())  # their updates are kernels there
        slot.block, slot.version, slot.late = block, self._version, self._late.pop(block, Cause.link)
        size = self._store.layouts[block].num_slot_elements
        with self._streams.moving(fetch, "weights", block):
            if slot.halves is None:
                self._copy_block("weights", block, slot.flat)
            else:
                for name, half in zip(("weights", "residual"), slot.halves, strict=False):
                    self._copy_block(name, block, half)
                with self._streams.running(fetch):
                    _join([half[:size] for half in slot.halves], slot.flat[:size])
        slot.loaded = fetch.record_event()
        if self._store.loads is not None:
            self._store.loads.done(self._ahead, slot.loaded)
        slot.to(SlotState.READY)
        if block not in slot.params:
            slot.params[block] = block_parameters(self._store.layouts[block], slot.flat)

    def _copy_block(self, name: str, block: int, target: Tensor) -> None:
        state, loads = self._store.weights if name == "weights" else self._store.residual, self._store.loads
        for part in load_parts(self._store.layouts[block]):
            source = None
            if loads is not None and block in loads.blocks:
                source = loads.source(self._ahead, name, part)
            if source is None:
                source = state[part.owner][part.start : part.stop]
            self._bring(source, part.owner, target[part.target : part.target + part.stop - part.start])

    def _bring(self, source: Tensor, owner: int, target: Tensor) -> None:
        """Copy across the link or, from a block in HBM, within the device."""
        if owner not in self._store.in_hbm:
            self._streams.copy(self._streams.fetch, target, source)
            return
        with self._streams.running(self._streams.fetch):
            target.copy_(source, non_blocking=True)


def _join(halves: Sequence[Tensor], values: Tensor) -> None:
    """Fill `values` (float32) from both halves of a split master, or from bf16 weights that are the master."""
    if len(halves) == 1:
        values.copy_(halves[0])
    else:
        join_master(halves[0], halves[1], out=values)


def _sources(layout: BlockLayout) -> set[int]:
    """The blocks that a block's parameters come from."""
    return {layout.index, *(b.owner for b in layout.borrowed)}


def _slot_in_place(index: int, store: HostStore, block: int) -> Slot:
    """What stands for a slot where a block's weights are on the device already."""
    layout, weights = store.layouts[block], store.weights
    params = {p.spec.local_name: weights[block][p.offset : p.end].view(p.spec.shape) for p in layout.params}
    for b in layout.borrowed:
        params[b.local_name] = weights[b.owner][b.param.offset : b.param.end].view(b.param.spec.shape)
    return Slot(index, weights[block], None, SlotState.READY, block, params={block: params})
