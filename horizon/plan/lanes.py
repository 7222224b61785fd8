"""A step on its lanes: compute, fetch (host to device), drain (device to host), the update on the host and the disk.

Each lane does one thing after another. When a thing may begin is decided by the rules of `stream.slots`,
`stream.gradients`, `stream.boundaries`, `store.loads` and `optim.apply`, followed here in the order in which the host
issues a step; `horizon.plan.updates` has the lanes of the update and the disk.
The host itself takes no time but once a step; while it waits for something, it issues nothing. Pure arithmetic.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from horizon.plan.activations import LOOKAHEAD
from horizon.plan.disk import BOUNDARY_BUFFERS, LOAD_BUFFERS, UPDATE_PAGES
from horizon.plan.memory import DRAIN_SLOTS, RING_BUFFERS
from horizon.plan.spilled import SpilledBoundaries
from horizon.plan.updates import NOTHING, UpdateCost, Updates

SETTLING_STEPS = 3  # simulated before the one that counts, at most: by then every step is like the one before
CAUSES = "arithmetic", "link", "optimizer", "disk", "launch"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCost:
    """What one block asks of the lanes in a step; seconds."""

    load_s: float = 0.0  # its weights, host to device
    staging_s: float = 0.0  # reading from disk what is loaded
    forward_s: tuple[float, ...]  # by micro-batch
    backward_s: tuple[float, ...]  # by micro-batch, recomputation included; the head's forward is in it
    close_s: float = 0.0  # compute measures and casts the gradient
    drain_s: float = 0.0  # the gradient, device to host
    add_s: float = 0.0  # fetching the sums on the host that its gradient is added to, if there are some
    update: UpdateCost = NOTHING  # by the host, or on the device if the states are there
    buffers: tuple[int, ...] = ()  # blocks whose gradient buffers it fills: its own, if it has something to train
    offloads: bool = False  # what enters it waits on the host
    in_hbm: bool = False  # its states live on the device: nothing to load or to drain
    spill_s: float | None = None  # its gradient goes to disk when it has landed; None: it stays


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """A step to be simulated; seconds."""

    blocks: tuple[BlockCost, ...]  # the embedding, the layers, the head
    first: int = 0  # the lowest block with something to train, where backward ends
    weight_slots: int = 2
    turn_layers: int = 0  # the last so many, passed with the head micro-batch by micro-batch
    save_s: tuple[float, ...] = ()  # of an offloaded boundary on its way to the host, by micro-batch
    return_s: tuple[float, ...] = ()  # and back
    write_s: tuple[float, ...] = ()  # of an offloaded boundary to disk, if they go there
    read_s: tuple[float, ...] = ()  # and back
    as_landed: bool = False  # a block is updated when its gradient has landed; else all when the norm is known
    hbm_as_landed: bool = False  # the same for blocks in HBM
    ring: int | None = None  # gradient buffers on the host; None: one for every block
    page_buffers: int = UPDATE_PAGES  # pages of states on disk that are in memory at a time
    host_s: float = 0.0  # in which the host ends a step and begins the next, and issues nothing
    overlaps: bool = True  # copies run beside kernels


def run_steps(step: StepCost) -> dict[str, float]:
    """Seconds of one step in steady state: arithmetic, and what compute waits for: link, optimizer, disk, launch."""
    lanes = _Lanes(step)
    spent = lanes.run()
    for _ in range(SETTLING_STEPS):
        before, spent = spent, lanes.run()
        if all(math.isclose(spent[cause], before[cause], rel_tol=1e-9, abs_tol=1e-12) for cause in spent):
            break
    return spent


def step_seconds(step: StepCost) -> float:
    """All that `run_steps` says."""
    return sum(run_steps(step).values())


@dataclass(slots=True)
class _Lane:
    free: float = 0.0

    def run(self, ready: float, seconds: float) -> float:
        """Do something that takes `seconds`, not before `ready`; tells when it is done."""
        self.free = max(self.free, ready) + seconds
        return self.free


@dataclass(slots=True)
class _Slot:
    block: int | None = None
    loaded: float = 0.0
    released: float = 0.0
    late: str = "link"  # what its load had to wait for when it was free


class _Lanes:
    """Lanes, slots and versions between and during steps."""

    def __init__(self, step: StepCost):
        self._step, self._blocks, self._head = step, step.blocks, len(step.blocks) - 1
        self._compute, self._updates = _Lane(), Updates(step.page_buffers)
        self._fetch, self._drain = (_Lane(), _Lane()) if step.overlaps else (self._compute, self._compute)
        self._host = 0.0  # what the host issues from now on does not begin earlier
        self._spent: dict[str, float] = {}
        self._sources = [tuple(dict.fromkeys((b, *cost.buffers))) for b, cost in enumerate(self._blocks)]
        for block in range(len(self._blocks)):
            self._updates.settle(block, 0.0)
        self._turn = range(self._head - step.turn_layers, self._head)
        self._slots = [_Slot() for _ in range(step.weight_slots)]
        self._own = {block: _Slot() for block in self._turn}
        self._holding: dict[int, _Slot] = {}
        self._in_use: dict[int, _Slot] = {}
        self._visits: list[int] = []
        self._late: dict[int, str] = {}  # blocks that were not there yet when a slot was free for them, and why
        self._next = self._ahead = 0
        self._staging = [0.0] * LOAD_BUFFERS  # heap: when each buffer for loads from disk is free
        self._reader = 0.0  # when the thread that fills them is
        self._staged = -1, 0.0  # the visit that was read last, and when
        self._drained = [0.0] * DRAIN_SLOTS
        self._drain_slot = 0
        self._landed = [0.0] * len(self._blocks)
        self._claimed: dict[int, bool] = {}  # blocks whose gradient has a buffer of the ring: whether it is used now
        self._saved: dict[tuple[int, int], float] = {}
        self._returning: dict[tuple[int, int], float] = {}
        self._boundaries: SpilledBoundaries | None = None  # those on disk
        self._buffers: list[float] = []  # heap: when each for gradients on their way to disk is free
        self._written = [0.0] * len(self._blocks)  # when those are there
        self._order: deque[tuple[int, int]] = deque()

    def run(self) -> dict[str, float]:
        """One step; accounts for all its time on compute."""
        self._spent = dict.fromkeys(CAUSES, 0.0)
        back = range(self._turn.start - 1, self._step.first - 1, -1)
        self._begin([*range(self._head + 1), *back])
        for block in range(self._turn.start):
            self._forward(block)
        self._wait(max(self._written), "disk")  # until then the buffers are those of the step before
        self._turn_around()
        self._order = deque((b, m) for b in back if self._blocks[b].offloads for m in range(len(self._step.return_s)))
        if self._boundaries:
            self._boundaries.expect(self._order, self._host)
        self._bring_back()
        for block in back:
            self._backward(block)
        self._end()
        return self._spent

    # ---- passes

    def _forward(self, block: int) -> None:
        cost = self._blocks[block]
        self._acquire(block)
        if cost.offloads:
            for m, seconds in enumerate(self._step.save_s):
                if self._boundaries:
                    self._wait(self._boundaries.room(), "disk")
                self._saved[block, m] = self._copy(self._drain, self._compute.free, seconds)
                if self._boundaries:
                    self._boundaries.fill((block, m), self._saved[block, m])
        for m, seconds in enumerate(cost.forward_s):
            self._work(seconds)
            if cost.offloads:
                self._idle(self._saved[block, m], "link")  # the memory goes to the next kernel
        self._release(block)

    def _turn_around(self) -> None:
        """Each micro-batch up through the turn's layers and the head, and straight back."""
        last = len(self._blocks[self._head].backward_s) - 1
        for m in range(last + 1):
            for block in (*self._turn, self._head):
                if m == 0:
                    self._acquire(block)
                self._work(self._blocks[block].forward_s[m])
            if m == 0:
                self._wait_for_slot(self._head)
            for block in (self._head, *reversed(self._turn)):
                self._work(self._blocks[block].backward_s[m])
                if m == last:
                    self._close(block)

    def _close(self, block: int) -> None:
        """All micro-batches have come back through the block."""
        if block in self._own:
            self._wait_for_slot(block)
        self._work(self._blocks[block].close_s)
        self._land(block)
        self._release(block)

    def _backward(self, block: int) -> None:
        cost = self._blocks[block]
        self._acquire(block)
        self._wait_for_slot(block)
        if cost.add_s:
            ready = max(self._compute.free, self._landed[self._head])  # where the other share came from
            self._idle(self._copy(self._fetch, ready, cost.add_s), "link")
        for m, seconds in enumerate(cost.backward_s):
            if cost.offloads:
                if (block, m) not in self._returning:
                    self._bring_back(wait=True)
                self._idle(self._returning.pop((block, m)), "link")
                self._bring_back()
            self._work(seconds)
        self._close(block)

    def _wait_for_slot(self, block: int) -> None:
        """For what its gradient is drained from; a layer at the turn needs that at its end."""
        if not self._blocks[block].in_hbm:
            self._idle(self._drained[self._drain_slot], "link")

    def _bring_back(self, wait: bool = False) -> None:
        while self._order and len(self._returning) < LOOKAHEAD:
            if self._boundaries:
                there = self._boundaries.ready(self._order[0])
                if there > self._host and not wait:
                    return
                self._wait(there, "disk")
            key, wait = self._order.popleft(), False
            ready = max(self._compute.free, self._saved.pop(key))
            self._returning[key] = self._copy(self._fetch, ready, self._step.return_s[key[1]])
            if self._boundaries:
                self._boundaries.release(key, self._returning[key])

    # ---- gradients and updates

    def _land(self, block: int) -> None:
        """The block's gradient goes to the host, and is used there unless the norm is waited for."""
        cost = self._blocks[block]
        if cost.in_hbm:
            self._landed[block] = self._drain.run(self._compute.free, 0.0)
        else:
            for owner in cost.buffers:
                self._claim(owner)
            self._landed[block] = self._copy(self._drain, self._compute.free, cost.drain_s)
            self._drained[self._drain_slot] = self._landed[block]
            self._drain_slot = (self._drain_slot + 1) % DRAIN_SLOTS
            if cost.spill_s is not None and block in cost.buffers:
                self._written[block] = self._updates.use_disk(self._landed[block], cost.spill_s)
                heappush(self._buffers, self._written[block])
        if block in cost.buffers and (self._step.hbm_as_landed if cost.in_hbm else self._step.as_landed):
            if cost.in_hbm:  # beside the device's kernels
                self._updates.settle(block, self._landed[block] + cost.update.work_s)
            else:
                self._updates.submit(block, self._landed[block], cost.update)
            if block in self._claimed:
                self._claimed[block] = True

    def _claim(self, block: int) -> None:
        """Wait for a buffer of the ring, or on the way to disk, unless the block has one."""
        ring = self._step.ring
        if block in self._claimed:
            return
        if self._blocks[block].spill_s is not None:
            self._wait(heappop(self._buffers), "disk")
        elif ring is None:
            return
        elif len(self._claimed) == ring:
            first = next(b for b, in_use in self._claimed.items() if in_use)  # buffers are used in their order
            del self._claimed[first]
            self._wait(self._updates.updated(first), "optimizer")
        self._claimed[block] = False

    def _end(self) -> None:
        """The host waits for the last gradient, updates, and turns to the next step."""
        self._wait(max(self._compute.free, *self._landed), "link")
        for block, cost in enumerate(self._blocks):
            if cost.in_hbm and not self._step.hbm_as_landed:
                self._idle(self._compute.free + cost.update.work_s, "optimizer")  # ahead of the next forward
            elif not cost.in_hbm and not self._step.as_landed and block in cost.buffers:
                self._updates.submit(block, self._host, cost.update, self._written[block])
        self._wait(self._host + self._step.host_s, "launch")

    # ---- weights, as `stream.slots` has them

    def _begin(self, visits: Sequence[int]) -> None:
        self._visits = list(visits)
        self._next = self._ahead = 0
        self._claimed = {}  # the forward waits for the updates that use them
        self._buffers = [0.0] * RING_BUFFERS
        step = self._step
        if step.write_s:
            if self._boundaries:
                self._wait(self._boundaries.settled, "disk")
            disk = self._updates.use_disk
            self._boundaries = SpilledBoundaries(disk, step.write_s, step.read_s, BOUNDARY_BUFFERS)
        self._late = {}
        self._staged, self._reader = (-1, 0.0), max(self._reader, self._host)
        self._holding = {}  # they are of an older version
        for slot in (*self._slots, *self._own.values()):
            slot.block = None
        self._prefetch()

    def _acquire(self, block: int) -> None:
        if self._ahead <= self._next:
            self._prefetch(wait=True)
        if self._blocks[block].in_hbm:
            self._wait(self._up_to_date(block), "optimizer")
        else:
            slot = self._in_use[block] = self._holding[block]
            self._idle(slot.loaded, slot.late)
        self._next += 1
        self._prefetch()

    def _release(self, block: int) -> None:
        if block in self._in_use:
            self._in_use.pop(block).released = self._compute.free
        self._prefetch()

    def _prefetch(self, wait: bool = False) -> None:
        while self._ahead < len(self._visits):
            block = self._visits[self._ahead]
            if not self._blocks[block].in_hbm and block not in self._holding:
                slot = self._victim(block)
                if slot is None:
                    return
                must = wait and self._ahead == self._next
                for there, cause in ((self._up_to_date, "optimizer"), (self._read, "disk")):
                    if there(block) > self._host:
                        self._late[block] = cause
                        if not must:
                            return
                        self._wait(there(block), cause)
                self._load(slot, block)
            self._ahead += 1

    def _load(self, slot: _Slot, block: int) -> None:
        ready = slot.released
        if any(self._blocks[source].in_hbm for source in self._blocks[block].buffers):
            ready = max(ready, self._compute.free)  # their updates are kernels
        if slot.block is not None:
            del self._holding[slot.block]
        self._holding[block] = slot
        slot.block, slot.late = block, self._late.pop(block, "link")
        slot.loaded = self._copy(self._fetch, ready, self._blocks[block].load_s)
        if self._blocks[block].staging_s:
            heappush(self._staging, slot.loaded)

    def _up_to_date(self, block: int) -> float:
        """When the weights of the block, and those that it borrows, can be loaded."""
        return max(map(self._updates.published, self._sources[block]))

    def _read(self, block: int) -> float:
        """When what the next load brings from disk is in memory: read ahead, as far as buffers reach."""
        seconds = self._blocks[block].staging_s
        if not seconds:
            return 0.0
        if self._staged[0] != self._ahead:
            ready = max(self._reader, self._up_to_date(block), heappop(self._staging))
            self._reader = self._updates.use_disk(ready, seconds)
            self._staged = self._ahead, self._reader
        return self._staged[1]

    def _victim(self, block: int) -> _Slot | None:
        if block in self._own:
            return self._own[block]
        coming = self._visits[self._next : self._ahead]
        idle = [slot for slot in self._slots if slot.block not in self._in_use and slot.block not in coming]
        if len(idle) < 2:
            return idle[0] if idle else None
        later = self._visits[self._ahead :]
        return max(idle, key=lambda s: later.index(s.block) if s.block in later else len(later))

    # ---- time

    def _work(self, seconds: float) -> None:
        self._spent["arithmetic"] += seconds
        self._compute.free += seconds

    def _idle(self, until: float, cause: str) -> None:
        """Compute waits."""
        self._spent[cause] += max(0.0, until - self._compute.free)
        self._compute.free = max(self._compute.free, until)

    def _wait(self, until: float, cause: str) -> None:
        """The host waits, and compute does once it has nothing left to do."""
        if cause == "optimizer":  # while its threads wait for pages, the disk is to blame
            by_disk = self._updates.disk_wait(self._compute.free, until)
            self._spent["disk"] += by_disk
            self._spent["optimizer"] -= by_disk
        self._idle(until, cause)
        self._host = max(self._host, until)
        for lane in (self._fetch, self._drain):
            lane.free = max(lane.free, until)

    def _copy(self, lane: _Lane, ready: float, seconds: float) -> float:
        if lane is self._compute:
            self._idle(max(ready, lane.free) + seconds, "link")
            return lane.free
        return lane.run(ready, seconds)
