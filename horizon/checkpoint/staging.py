"""Staging: a bounded piece of host memory in which parts of states wait for the disk.

Regions are handed out and given back in any order. Whoever asks while there is no room waits until there is, which is
how a disk that does not keep up slows the update down instead of filling the host's memory.
"""

from __future__ import annotations

import threading

from torch import Tensor

from horizon.store.arena import Arena
from horizon.units import MIB, align_up

ALIGN = 4096  # the unit of direct I/O
TOUCHED = 64 * MIB  # at a time


class Staging:
    """`num_bytes` of host memory; every method may be called from any thread."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = align_up(num_bytes, ALIGN)
        self._arena = Arena([self.num_bytes], "checkpoint staging", pin=False)
        self._free = [(0, self.num_bytes)]  # (start, bytes), by start, none beside another
        self._changed = threading.Condition()
        self._closed = False
        self._toucher = threading.Thread(target=self._touch, name="horizon-checkpoint-touch", daemon=True)
        self._toucher.start()

    def acquire(self, num_bytes: int) -> Tensor | None:
        """A region, uint8 [num_bytes] (at least 1), once there is room; None when it was closed.

        Raises:
            ValueError: there will never be room.
        """
        size = align_up(num_bytes, ALIGN)
        if size > self.num_bytes:
            raise ValueError(f"{num_bytes} bytes do not fit a staging of {self.num_bytes}")
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._find(size) is not None)
            place = None if self._closed else self._find(size)
            if place is None:
                return None
            start, room = self._free[place]
            self._free[place : place + 1] = [(start + size, room - size)] if room > size else []
            return self._arena.regions[0][start : start + num_bytes]

    def release(self, region: Tensor) -> None:
        """Give a region back."""
        with self._changed:
            if self._closed:
                return
            start = region.data_ptr() - self._arena.regions[0].data_ptr()
            self._free = _joined([*self._free, (start, align_up(region.numel(), ALIGN))])
            self._changed.notify_all()

    def close(self) -> None:
        """Wake whoever waits and give the memory back; nobody may be using a region."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._toucher.join()
        self._arena.close()

    def _touch(self) -> None:
        """Have the pages there before a save wants them: new ones come at 4 to 7 GiB/s, and it copies at 30 GB/s."""
        for start in range(0, self.num_bytes, TOUCHED):
            if self._closed or not self._arena.populate(start, min(start + TOUCHED, self.num_bytes)):
                return

    def _find(self, size: int) -> int | None:
        return next((place for place, (_, room) in enumerate(self._free) if room >= size), None)


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans by their start, those that touch made one."""
    joined: list[tuple[int, int]] = []
    for start, size in sorted(spans):
        if joined and sum(joined[-1]) == start:
            joined[-1] = joined[-1][0], joined[-1][1] + size
        else:
            joined.append((start, size))
    return joined
