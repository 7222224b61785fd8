"""Blocks that the device cannot copy from where they are, on their way there: read ahead into pinned buffers.

They are on nvme, or in host memory that CUDA refuses to register, from which no copy runs beside kernels.

The walk over a step's blocks says what is needed when. A visit's bytes are read when the block's version is published,
which is after they were written, and they are given to that visit of that walk alone. So no load can see another
version, and a buffer is read into again only after the copy out of it is over.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from horizon.layout import BlockLayout
from horizon.plan.disk import LoadPart, Place, load_buffer_bytes, staged_parts
from horizon.plan.states import State
from horizon.store.arena import Arena
from horizon.store.ledger import Ledger
from horizon.store.nvme import Move


class Event(Protocol):
    """A point in a stream's work, as in `horizon.stream.streams`."""

    def synchronize(self) -> None:
        """Block the calling thread until the point has been reached."""


@dataclass(slots=True)
class _Buffer:
    data: Tensor
    copied: Event | None = None  # out of it, to the device


class StagedLoads:
    """Staging for loads.

    All methods are called by the thread that drives the device.

    Args:
        read: fills memory with bytes of states, and returns when that is done.
        states: those that go to the device.
        places: which of them are staged.
        pin: register the buffers with CUDA.
        num_buffers: blocks in memory at a time.

    Attributes:
        blocks: whose loads are staged.
    """

    def __init__(
        self, read: Callable[[Sequence[Move]], None], states: Sequence[State], layouts: Sequence[BlockLayout],
        places: Collection[Place], ledger: Ledger, pin: bool, num_buffers: int,
    ) -> None:  # fmt: skip
        self._read, self._ledger = read, ledger
        self._types = {state.name: state.dtype for state in states}
        self._parts = {lay.index: staged_parts(states, lay, places)[0] for lay in layouts}
        self.blocks = frozenset(block for block, parts in self._parts.items() if parts)
        self._sources = {b: {b, *(p.part.owner for p in parts)} for b, parts in self._parts.items()}
        self._arena = Arena([load_buffer_bytes(states, layouts, places)] * num_buffers, "nvme staging", pin)
        self._changed = threading.Condition()  # guards everything below
        self._free = [_Buffer(region) for region in self._arena.regions]
        self._visits: Sequence[int] = ()
        self._version = self._walk = 0
        self._wanted: deque[int] = deque()  # visits, in order
        self._reading: int | None = None
        self._dropped = False  # what is being read is of no use any more
        self._ready: dict[int, _Buffer] = {}
        self._closed = False
        self._thread: threading.Thread | None = None
        ledger.on_failure(lambda error: self._notify())

    def begin(self, visits: Sequence[int], version: int, held: Collection[int]) -> None:
        """Start a walk over `visits` that needs `version`; the visits `held` will find their block on the device."""
        with self._changed:
            self._forget()
            self._visits, self._version = visits, version
            self._wanted.extend(i for i, b in enumerate(visits) if b in self.blocks and i not in held)
            if self._wanted and self._thread is None:
                self._thread = threading.Thread(target=self._read_ahead, name="horizon-read-ahead", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def is_ready(self, visit: int) -> bool:
        """Whether the visit's bytes are read."""
        return visit in self._ready

    def wait(self, visit: int) -> None:
        """Return when the visit's bytes are read; raises the ledger's failure, at once, if there is one."""
        with self._changed:
            if visit not in self._ready and visit != self._reading and visit not in self._wanted:
                self._wanted.appendleft(visit)  # it was held to be on the device
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._ledger.failed or visit in self._ready)
        self._ledger.raise_if_failed()

    def source(self, visit: int, state: str, part: LoadPart) -> Tensor | None:
        """The numbers of a part of a ready visit's load; None if they are not staged."""
        data = self._ready[visit].data
        for staged in self._parts[self._visits[visit]]:
            if staged.state == state and staged.part == part:
                first, dtype = staged.place + staged.skip, self._types[state]
                return data[first : first + (part.stop - part.start) * dtype.itemsize].view(dtype)
        return None

    def done(self, visit: int, copied: Event | None = None) -> None:
        """The visit needs its bytes no more once `copied` has been reached; None: it did not need them."""
        with self._changed:
            buffer = self._ready.pop(visit, None)
            if buffer is not None:
                buffer.copied = copied
                self._free.append(buffer)
            elif visit == self._reading:
                self._dropped = True
            elif visit in self._wanted:
                self._wanted.remove(visit)
            self._changed.notify_all()

    def stop(self) -> None:
        """Forget the walk; what is being read then is dropped."""
        with self._changed:
            self._forget()

    def close(self) -> None:
        """End the thread, then give the buffers back; versions that are waited for must be published or failed."""
        with self._changed:
            self._forget()
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._free.clear()
        self._arena.close()

    def _forget(self) -> None:
        self._walk += 1
        self._reading = None
        self._wanted.clear()
        self._free += self._ready.values()
        self._ready.clear()

    # ---- the thread

    def _read_ahead(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._ledger.failed or self._can_read())
                if self._closed or self._ledger.failed:
                    return
                walk, version, visit = self._walk, self._version, self._wanted.popleft()
                block, buffer = self._visits[visit], self._take_buffer()
                self._reading, self._dropped = visit, False
            try:
                self._fill(buffer, block, version)
            except BaseException as error:  # whoever waits for the bytes must hear of it
                self._ledger.fail(error)
                return
            with self._changed:
                self._reading = None
                if walk == self._walk and not self._dropped:
                    self._ready[visit] = buffer
                else:
                    self._free.append(buffer)
                self._changed.notify_all()

    def _take_buffer(self) -> _Buffer:
        """A free buffer, or that of the visit that is furthest away, which is read again later."""
        if not self._free:
            last = max(self._ready)
            self._free.append(self._ready.pop(last))
            self._wanted.appendleft(last)
        return self._free.pop()

    def _fill(self, buffer: _Buffer, block: int, version: int) -> None:
        if buffer.copied is not None:
            buffer.copied.synchronize()
            buffer.copied = None
        for source in self._sources[block]:
            self._ledger.wait(source, version)
        self._read(
            [
                Move((p.state, p.part.owner), p.offset, buffer.data[p.place : p.place + p.num_bytes], False)
                for p in self._parts[block]
            ]
        )

    def _can_read(self) -> bool:
        return bool(self._wanted) and bool(self._free or self._wanted[0] < max(self._ready, default=-1))

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
