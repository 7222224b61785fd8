"""Offloaded boundaries on nvme in a simulated step, passing through their buffers as `horizon.store.spill` has it.

One takes a buffer while it is filled and until it is written, and again from when it is read until it is on the device.
What was filled first gives its buffer up first, but for what backward wants before a buffer is free for it. Pure
arithmetic.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

Key = tuple[int, int]  # block, micro-batch


class SpilledBoundaries:
    """The boundaries of one step.

    Args:
        disk: takes (from when on, seconds) of the disk; gives when that is done.
        write_s: of a boundary, by micro-batch.
        read_s: and back.
        buffers: boundaries in memory at a time.
    """

    def __init__(
        self, disk: Callable[[float, float], float], write_s: Sequence[float], read_s: Sequence[float], buffers: int
    ):
        self._disk, self._write_s, self._read_s, self._buffers = disk, write_s, read_s, buffers
        self._written: dict[Key, float] = {}  # those in a buffer, the oldest first, and when they are on disk
        self._wanted: deque[Key] = deque()  # that have no buffer yet
        self._ready: dict[Key, float] = {}  # the others: when they are in memory
        self._stays: dict[Key, float] = {}  # of these, those that never left: when they are on disk, too

    @property
    def settled(self) -> float:
        """When all that never left its buffer is on disk, and another step may begin."""
        return max([0.0, *self._written.values(), *self._stays.values()])

    def room(self) -> float:
        """When there is a buffer to be filled."""
        return 0.0 if len(self._written) < self._buffers else next(iter(self._written.values()))

    def fill(self, key: Key, at: float) -> None:
        """The boundary is in its buffer at that time, and goes to disk."""
        if len(self._written) == self._buffers:
            del self._written[next(iter(self._written))]
        self._written[key] = self._disk(at, self._write_s[key[1]])

    def expect(self, order: Iterable[Key], now: float) -> None:
        """From now on they are wanted in this order, each until it is released."""
        self._wanted = deque(order)
        spare = [now] * (self._buffers - len(self._written))
        while self._wanted and (self._wanted[0] in self._written or spare or self._written):
            if self._wanted[0] not in self._written and not spare:
                spare.append(max(now, self._written.pop(next(iter(self._written)))))
            self._read_next(spare)

    def ready(self, key: Key) -> float:
        """When the boundary is in memory; those before it were released."""
        return self._ready[key]

    def release(self, key: Key, at: float) -> None:
        """The boundary is on the device at that time: its buffer goes to what is wanted next."""
        spare = [max(at, self._stays.get(key, 0.0))]
        while self._wanted and spare:
            self._read_next(spare)

    def _read_next(self, spare: list[float]) -> None:
        key = self._wanted.popleft()
        if key in self._written:
            self._ready[key], self._stays[key] = 0.0, self._written.pop(key)
        else:
            self._ready[key] = self._disk(spare.pop(), self._read_s[key[1]])
