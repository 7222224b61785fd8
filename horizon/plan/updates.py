"""Updates on the host and the disk that they share with loads: two lanes of a simulated step (`horizon.plan.lanes`).

Updates run one after another, in the order in which they are asked for. What of a block is on nvme comes to them in
pages, as `horizon.store.pages` has it: a page takes a staging buffer from when it is read until it is written. The disk
does one thing after another, what was asked of it first: reads of pages as far ahead as buffers reach, pages written
back, blocks read for a load. Nothing is worked out before somebody asks what comes of it. Pure arithmetic.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateCost:
    """What the update of a block takes; seconds."""

    work_s: float = 0.0  # of the update's threads; 0: nothing to train
    pages: int = 0  # in which its states come from disk; 0: none of them are there
    read_s: float = 0.0  # of all pages together
    write_s: float = 0.0
    loaded: bool = False  # loads read from disk what the update writes there, and wait until it is


NOTHING = UpdateCost()


class _Page(NamedTuple):
    """A part of a block's update; without states on disk, all of it."""

    block: int
    asked: float
    cost: UpdateCost
    last: bool

    @property
    def share(self) -> int:
        return max(1, self.cost.pages)


class Updates:
    """Both lanes; `buffers`: pages in memory at a time."""

    def __init__(self, buffers: int):
        self._free = [0.0] * buffers  # heap: when each buffer is
        self._wanted: deque[_Page] = deque()
        self._written: deque[tuple[float, _Page]] = deque()  # pages that go back, and from when on
        self._disk = self._threads = 0.0  # when they are free
        self._updated: dict[int, float] = {}
        self._published: dict[int, float] = {}
        self._work: deque[tuple[float, float]] = deque()  # from, to: of the threads, on pages

    def submit(self, block: int, ready: float, cost: UpdateCost) -> None:
        """Update the block after those submitted before, and not before `ready`."""
        self._updated.pop(block, None)
        self._published.pop(block, None)
        pages = max(1, cost.pages)
        self._wanted.extend(_Page(block, ready, cost, page == pages - 1) for page in range(pages))

    def settle(self, block: int, at: float) -> None:
        """The block is up to date since then, without an update here."""
        self._updated[block] = self._published[block] = at

    def updated(self, block: int) -> float:
        """When its last update is done, which gives its gradient's buffer back."""
        return self._until(self._updated, block)

    def published(self, block: int) -> float:
        """When loads can see that update."""
        return self._until(self._published, block)

    def read(self, ready: float, seconds: float) -> float:
        """Read for a load from `ready` on; gives when that is done."""
        while self._next()[0] <= ready:
            self._advance()
        return self._use_disk(ready, seconds)

    def disk_wait(self, start: float, end: float) -> float:
        """Of the time from `start` to `end` that somebody waits for an update, what no thread works: all disk.

        `start` must not go back.
        """
        if not self._work:
            return 0.0
        while self._work and self._work[0][1] <= start:
            self._work.popleft()
        at_work = sum(max(0.0, min(stop, end) - max(begin, start)) for begin, stop in self._work)
        return max(0.0, end - start - at_work)

    def _until(self, known: dict[int, float], block: int) -> float:
        while block not in known:
            self._advance()
        return known[block]

    def _next(self) -> tuple[float, bool]:
        """When the next thing is asked of the disk, and whether it is a write; inf: nothing is left."""
        write = self._written[0][0] if self._written else math.inf
        read = math.inf
        if self._wanted:
            page = self._wanted[0]
            read = page.asked if not page.cost.pages else max(page.asked, self._free[0]) if self._free else math.inf
        return (write, True) if write <= read else (read, False)

    def _advance(self) -> None:
        at, writes = self._next()
        if writes:
            _, page = self._written.popleft()
            self._write(at, page)
        elif self._wanted[0].cost.pages:
            heappop(self._free)
            page = self._wanted.popleft()
            self._work_on(page, self._use_disk(at, page.cost.read_s / page.share))
        else:
            self._work_on(self._wanted.popleft(), at)

    def _work_on(self, page: _Page, ready: float) -> None:
        begin = max(self._threads, ready)
        self._threads = begin + page.cost.work_s / page.share
        if page.cost.pages:
            joins = bool(self._work) and self._work[-1][1] == begin
            self._work.append((self._work.pop()[0] if joins else begin, self._threads))
            self._written.append((self._threads, page))
        if page.last:
            self._updated[page.block] = self._threads
            if not page.cost.loaded:
                self._published[page.block] = self._threads

    def _write(self, at: float, page: _Page) -> None:
        done = self._use_disk(at, page.cost.write_s / page.share)
        heappush(self._free, done)
        if page.last and page.cost.loaded:
            self._published[page.block] = done

    def _use_disk(self, ready: float, seconds: float) -> float:
        self._disk = max(self._disk, ready) + seconds
        return self._disk
