"""Arrays that wait on nvme: through a few buffers to disk as they come, and back ahead of when they are needed.

    filling -> written to disk -> gone
    asked for -> read from disk -> in use -> gone

An array is a whole region of the tier's file. It takes a buffer while it is filled and until it is written, and again
from when it is read until it is released. What was filled first gives its buffer up first, which makes the writing
bounded: whoever fills the next array waits for it. `expect` says what will be asked for and in which order; that is
read ahead as far as buffers reach, and what has one still when its turn comes keeps it. Invariant: a buffer is given to
another array only when its own is on disk and not in use, or released, and no copy to or from the device uses it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial

from torch import Tensor

from horizon.plan.disk import DISK_BLOCK, DiskMap, Place
from horizon.store.arena import Arena
from horizon.store.ledger import Ledger
from horizon.store.loads import Event
from horizon.store.nvme import Move, NvmeTier
from horizon.units import align_up


class _Phase(Enum):
    """What happens to an array that has a buffer."""

    FILLING = auto()  # the buffer alone has it, or a part of it
    WRITING = auto()  # on its way to disk; the buffer may be read
    WRITTEN = auto()  # on disk, too: the buffer may be taken away
    READING = auto()  # on its way back
    WANTED = auto()  # the buffer has it, until it is released


@dataclass(slots=True)
class _Buffer:
    data: Tensor  # uint8, whole disk blocks
    used: Event | None = None  # the last copy out of it, to the device


@dataclass(slots=True)
class _Held:
    buffer: _Buffer
    phase: _Phase
    kept: bool = False  # asked for, or about to be: the buffer stays when it is written
    released: bool = False  # while it was moving

    @property
    def moves(self) -> bool:
        return self.phase in (_Phase.WRITING, _Phase.READING)


class Spill:
    """Arrays on nvme and the buffers that they pass through. Any thread may call.

    The arrays of `disk_map` are named by their places. A failure is recorded in `ledger`, and raised by whoever waits.

    Args:
        tier: its file; closed with this.
        pin: register the buffers with CUDA.
        nodes: NUMA nodes of the buffers.
    """

    def __init__(
        self, tier: NvmeTier, disk_map: DiskMap, num_buffers: int, ledger: Ledger, pin: bool, nodes: Sequence[int] = ()
    ) -> None:
        self._tier, self._ledger = tier, ledger
        self._capacity = {place: region.num_bytes for place, region in disk_map.regions.items()}
        self._sizes: Mapping[Place, int] = self._capacity
        self._arena = Arena([disk_map.largest] * num_buffers, "nvme staging", pin, nodes)
        # One thread, for it waits for the device: what it begins, the threads of the tier do.
        self._starter = ThreadPoolExecutor(1, "horizon-spill")
        self._changed = threading.Condition()  # guards everything below
        self._free = [_Buffer(region) for region in self._arena.regions]
        self._held: dict[Place, _Held] = {}
        self._filled: deque[Place] = deque()  # that have a buffer still, the oldest first
        self._wanted: deque[Place] = deque()  # expected, and without a buffer that is kept; in order
        ledger.on_failure(lambda error: self._notify())

    @property
    def num_bytes(self) -> int:
        """Host bytes held."""
        return self._arena.num_bytes

    def holds(self, sizes: Mapping[Place, int]) -> bool:
        """Whether there is room for arrays of these bytes."""
        return all(num_bytes <= self._capacity.get(place, -1) for place, num_bytes in sizes.items())

    def begin(self, sizes: Mapping[Place, int] | None = None) -> None:
        """Forget what has a buffer; what is on disk stays. No array may be in use.

        `sizes`: bytes that arrays have from now on, instead of all that there is room for.
        """
        with self._changed:
            self._wanted.clear()
            self._wait(lambda: not any(held.moves for held in self._held.values()))
            self._free += [held.buffer for held in self._held.values()]
            self._held.clear()
            self._filled.clear()
            if sizes is not None:
                self._sizes = {place: align_up(num_bytes, DISK_BLOCK) for place, num_bytes in sizes.items()}

    def claim(self, place: Place) -> Tensor:
        """The array's buffer (uint8, whole disk blocks), to be filled; one that is expected has its bytes.

        Waits until there is a buffer, or the array is read. Claiming again returns the same.

        Raises:
            the ledger's failure.
        """
        with self._changed:
            if place not in self._held and place not in self._wanted:
                self._wait(lambda: place in self._held or self._can_spare())
                if place not in self._held:
                    self._held[place] = _Held(self._spare(), _Phase.FILLING)
            self._wait(lambda: place in self._held and self._held[place].phase is not _Phase.READING)
            buffer = self._held[place].buffer
        if buffer.used is not None:
            buffer.used.synchronize()
            buffer.used = None
        return buffer.data[: self._sizes[place]]

    def filled(self, place: Place, event: Event) -> None:
        """The claimed buffer has all of the array after `event`: it goes to disk."""
        with self._changed:
            self._held[place].phase = _Phase.WRITING
            self._held[place].kept = False
            self._filled.append(place)
            self._start(place, event, write=True)

    def expect(self, order: Sequence[Place]) -> None:
        """All of these will be asked for, in about this order, and each released, or filled again, then."""
        with self._changed:
            self._wanted = deque(order)
            self._read_ahead()

    def is_ready(self, place: Place) -> bool:
        """Whether the array can be used, or filled, without a wait."""
        with self._changed:
            if place in self._held:
                return self._held[place].phase is not _Phase.READING
            return place not in self._wanted and self._can_spare()

    def fetch(self, place: Place) -> Tensor:
        """The array, uint8, until it is released; waits until it is read. Raises the ledger's failure."""
        with self._changed:
            if place in self._held:
                self._keep(place)
            elif place not in self._wanted:
                self._wanted.appendleft(place)
                self._read_ahead()
        return self.claim(place)

    def release(self, place: Place, event: Event | None = None) -> None:
        """The array is no longer needed once `event` has been reached."""
        with self._changed:
            held = self._held.get(place)
            if held is None:  # it was written, and its buffer taken away
                return
            held.buffer.used = event
            if held.moves:
                held.released = True
            else:
                self._give_back(place)
            self._read_ahead()

    def read(self, place: Place, offset: int, into: Tensor) -> None:
        """Fill `into` (uint8, flat) with bytes of an array that was written, from `offset` on."""
        with self._changed:
            self._wait(lambda: place not in self._held or self._held[place].phase is not _Phase.WRITING)
        self._tier.read_range(place, offset, into)

    def close(self) -> None:
        """Wait for what is under way, then give buffers and file back. Idempotent."""
        with self._changed:
            self._wanted.clear()
        self._starter.shutdown(wait=True)
        self._tier.close()
        with self._changed:
            self._free, self._held = [], {}
            self._filled.clear()
        self._arena.close()

    # ---- with the lock held

    def _wait(self, until: Callable[[], bool]) -> None:
        self._changed.wait_for(lambda: self._ledger.failed or until())
        self._ledger.raise_if_failed()

    def _oldest(self) -> Place | None:
        """The array whose buffer goes next."""
        return next((place for place in self._filled if not self._held[place].kept), None)

    def _can_spare(self) -> bool:
        oldest = self._oldest()
        return bool(self._free) or (oldest is not None and self._held[oldest].phase is _Phase.WRITTEN)

    def _spare(self) -> _Buffer:
        if not self._free:
            oldest = self._oldest()
            assert oldest is not None
            self._give_back(oldest)
        return self._free.pop()

    def _keep(self, place: Place) -> None:
        self._held[place].kept = True
        if place in self._wanted:
            self._wanted.remove(place)

    def _give_back(self, place: Place) -> None:
        self._free.append(self._held.pop(place).buffer)
        if place in self._filled:
            self._filled.remove(place)
        self._changed.notify_all()

    def _read_ahead(self) -> None:
        while self._wanted and not self._ledger.failed:
            place = self._wanted[0]
            if place not in self._held:
                if not self._can_spare():
                    return
                buffer = self._spare()
                self._held[place], after, buffer.used = _Held(buffer, _Phase.READING), buffer.used, None
                self._start(place, after, write=False)
            self._keep(place)

    def _start(self, place: Place, after: Event | None, write: bool) -> None:
        data = self._held[place].buffer.data[: self._sizes[place]]
        self._starter.submit(self._begin_move, Move(place, 0, data, write), after)

    # ---- other threads

    def _begin_move(self, move: Move, after: Event | None) -> None:
        try:
            if after is not None:
                after.synchronize()
            self._tier.start([move], partial(self._moved, move.place))
        except BaseException as error:  # whoever waits for the array must hear of it
            self._ledger.fail(error)

    def _moved(self, place: Place, error: BaseException | None) -> None:
        if error is not None:
            self._ledger.fail(error)
            return
        with self._changed:
            held = self._held[place]
            held.phase = _Phase.WRITTEN if held.phase is _Phase.WRITING else _Phase.WANTED
            if held.released:
                self._give_back(place)
            self._changed.notify_all()
            self._read_ahead()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
