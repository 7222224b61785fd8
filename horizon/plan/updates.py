"""Updates on the host and the disk that they share with loads: two lanes of a simulated step (`horizon.plan.lanes`).

Updates run one after another, in the order in which they are asked for. What of a block is on nvme comes to them in
pages, as `horizon.store.pages` has it: a page takes a staging buffer from when it is read until it is written. A
gradient on nvme comes when the update of one before it gives a buffer back, as `horizon.store.gradients` has it. The
disk does one thing after another, what was asked of it first: reads of pages as far ahead as buffers reach, pages
written back, gradients, what passes and loads ask for. Nothing is worked out before somebody asks what comes of it.
Pure arithmetic.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
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
    gradient_s: float | None = None  # of reading its gradient; 0: it is in its buffer still; None: it never left

    @property
    def waits_for_disk(self) -> bool:
        """Whether it needs something from there."""
        return self.pages > 0 or self.gradient_s is not None


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
        self._staged: deque[tuple[float, _Page]] = deque()  # pages that were read, and when; their gradient was not
        self._spilled: dict[int, float] = {}  # gradients of updates to come: when their buffer is on disk
        self._unread: deque[tuple[int, float]] = deque()  # those that wait for a buffer, and seconds of reading them
        self._reads: deque[tuple[float, int, float]] = deque()  # from when on one is read, whose, seconds
        self._gradients: dict[int, float] = {}  # when they are in memory
        self._written: deque[tuple[float, _Page]] = deque()  # pages that go back, and from when on
        self._disk = self._threads = 0.0  # when they are free
        self._updated: dict[int, float] = {}
        self._published: dict[int, float] = {}
        self._busy: deque[tuple[float, float]] = deque()  # from, to: of the threads, on what the disk brought

    def submit(self, block: int, ready: float, cost: UpdateCost, written: float = 0.0) -> None:
        """Update the block after those submitted before, and not before `ready`.

        `written`: when its gradient is on disk, if it goes there.
        """
        self._updated.pop(block, None)
        self._published.pop(block, None)
        pages = max(1, cost.pages)
        if cost.gradient_s is not None:
            self._spilled[block] = written
            if cost.gradient_s:
                self._unread.append((block, cost.gradient_s))
            else:
                self._gradients[block] = ready
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

    def use_disk(self, ready: float, seconds: float) -> float:
        """Read or write something else from `ready` on; gives when that is done."""
        while self._next()[0] <= ready:
            self._advance()
        return self._use_disk(ready, seconds)

    def disk_wait(self, start: float, end: float) -> float:
        """Of the time from `start` to `end` that somebody waits for an update, what no thread works: all disk.

        `start` must not go back.
        """
        if not self._busy:
            return 0.0
        while self._busy and self._busy[0][1] <= start:
            self._busy.popleft()
        at_work = sum(max(0.0, min(stop, end) - max(begin, start)) for begin, stop in self._busy)
        return max(0.0, end - start - at_work)

    def _until(self, known: dict[int, float], block: int) -> float:
        while block not in known:
            self._advance()
        return known[block]

    def _next(self) -> tuple[float, Callable[[float], None]]:
        """When the next thing is asked of the disk, and what does it; inf: nothing is left."""
        write = self._written[0][0] if self._written else math.inf
        gradient = self._reads[0][0] if self._reads else math.inf
        read = math.inf
        if self._wanted:
            page = self._wanted[0]
            read = page.asked if not page.cost.pages else max(page.asked, self._free[0]) if self._free else math.inf
        found = (write, self._write), (gradient, self._read_gradient), (read, self._read)
        return min(found, key=lambda asked: asked[0])

    def _advance(self) -> None:
        at, act = self._next()
        act(at)

    def _read_gradient(self, at: float) -> None:
        _, block, seconds = self._reads.popleft()
        self._gradients[block] = self._use_disk(at, seconds)
        self._work()

    def _read(self, at: float) -> None:
        page = self._wanted.popleft()
        if page.cost.pages:
            heappop(self._free)
            at = self._use_disk(at, page.cost.read_s / page.share)
        self._staged.append((at, page))
        self._work()

    def _work(self) -> None:
        """Do what needs nothing from disk any more."""
        while self._staged:
            ready, page = self._staged[0]
            if page.cost.gradient_s is not None:
                if page.block not in self._gradients:
                    return
                ready = max(ready, self._gradients[page.block])
            self._staged.popleft()
            self._work_on(page, ready)

    def _work_on(self, page: _Page, ready: float) -> None:
        begin = max(self._threads, ready)
        self._threads = begin + page.cost.work_s / page.share
        if page.cost.waits_for_disk:
            joins = bool(self._busy) and self._busy[-1][1] == begin
            self._busy.append((self._busy.pop()[0] if joins else begin, self._threads))
        if page.cost.pages:
            self._written.append((self._threads, page))
        if page.last:
            self._updated[page.block] = self._threads
            self._give_back(page.block)
            if not page.cost.loaded:
                self._published[page.block] = self._threads

    def _give_back(self, block: int) -> None:
        """Its gradient's buffer, if it has one of those that others wait for."""
        if block in self._spilled:
            free = max(self._threads, self._spilled.pop(block))
            del self._gradients[block]
            if self._unread:
                self._reads.append((free, *self._unread.popleft()))

    def _write(self, at: float) -> None:
        _, page = self._written.popleft()
        done = self._use_disk(at, page.cost.write_s / page.share)
        heappush(self._free, done)
        if page.last and page.cost.loaded:
            self._published[page.block] = done

    def _use_disk(self, ready: float, seconds: float) -> float:
        self._disk = max(self._disk, ready) + seconds
        return self._disk
