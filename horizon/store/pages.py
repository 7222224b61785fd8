"""Pages of states on nvme, on their way to their update and back.

    announced -> reading -> ready -> (updated) -> writing -> gone

A page takes a staging buffer from `reading` until it is written. Pages are read in the order in which they were
announced, as far ahead as buffers reach, and a page that is still being written from the step before is read when that
is over. Invariant: an update sees the bytes that the update before it has left, and a buffer is given to another page
only when its own is on disk.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from horizon.layout import BlockLayout
from horizon.plan.disk import Place, by_block, num_pages, page_range, page_spans, update_page_bytes
from horizon.plan.states import State
from horizon.store.arena import Arena
from horizon.store.ledger import Ledger
from horizon.store.nvme import Move, NvmeTier

Key = tuple[int, int]  # block, page


@dataclass(slots=True)
class _Page:
    buffer: Tensor
    ready: bool = False  # read, and nothing of it written back yet


class UpdatePages:
    """Staging for updates of the blocks that have states on nvme.

    Args:
        states: of which those in `places` are paged.
        loaded: those that go to the device.
        num_buffers: pages in memory at a time.

    Attributes:
        states: by block, the states that are paged.
    """

    def __init__(
        self, tier: NvmeTier, states: Sequence[State], loaded: Sequence[State], layouts: Sequence[BlockLayout],
        places: Collection[Place], ledger: Ledger, num_buffers: int,
    ) -> None:  # fmt: skip
        self._tier, self._layouts, self._ledger = tier, layouts, ledger
        self.states: dict[int, list[State]] = {}
        for state, block in by_block(states, layouts, places):
            if layouts[block].num_trainable:
                self.states.setdefault(block, []).append(state)
        self._read_by_loads = {block for block, paged in self.states.items() if not set(loaded).isdisjoint(paged)}
        size = update_page_bytes(states, layouts, places)
        self._arena = Arena([size] * num_buffers, "nvme staging", pin=False)
        self._free = list(self._arena.regions)
        self._wanted: deque[Key] = deque()
        self._pages: dict[Key, _Page] = {}
        self._announced = dict.fromkeys(self.states, 0)  # pages so far
        self._num_written = dict.fromkeys(self.states, 0)  # of these, on disk again
        self._then: dict[int, Callable[[], None]] = {}
        self._changed = threading.Condition()
        ledger.on_failure(lambda error: self._notify())

    def announce(self, block: int) -> None:
        """All pages of the block will be updated once more, after those announced before."""
        with self._changed:
            pages = range(num_pages(self._layouts[block]))
            self._wanted.extend((block, page) for page in pages)
            self._announced[block] += len(pages)
        self._read_ahead()

    def acquire(self, block: int, page: int) -> dict[str, Tensor]:
        """The numbers of a page by state, once they are read; the caller may change them until `release`.

        Raises:
            the ledger's failure.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ledger.failed or self._is_ready((block, page)))
            self._ledger.raise_if_failed()
            return self._views((block, page))

    def release(self, block: int, page: int) -> None:
        """The page is updated: it goes back to disk."""
        with self._changed:
            self._pages[block, page].ready = False
        self._tier.start(self._moves((block, page), write=True), partial(self._written, (block, page)))

    def when_loadable(self, block: int, then: Callable[[], None]) -> None:
        """Call `then` once loads see all released pages of the block, by this thread or one of the disk's."""
        with self._changed:
            if block in self._read_by_loads and self._is_under_way(block):
                self._then[block] = then
                return
        then()

    def wait_written(self) -> None:
        """Return when all announced pages are on disk; raises the ledger's failure."""
        with self._changed:
            self._changed.wait_for(lambda: self._ledger.failed or not any(map(self._is_under_way, self.states)))
        self._ledger.raise_if_failed()

    def announced(self) -> dict[int, int]:
        """By block, the pages announced so far."""
        with self._changed:
            return dict(self._announced)

    def wait_for(self, block: int, num_pages: int) -> None:
        """Return when so many of the block's pages are on disk; raises the ledger's failure.

        Unlike `wait_written` it does not wait for updates announced later, which may be waiting for the caller.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ledger.failed or self._num_written[block] >= num_pages)
        self._ledger.raise_if_failed()

    def stop(self) -> None:
        """Read nothing more."""
        with self._changed:
            self._wanted.clear()

    def close(self) -> None:
        """Give the staging back; nothing may be under way. Idempotent."""
        self._pages.clear()
        self._free.clear()
        self._arena.close()

    def _read_ahead(self) -> None:
        while (key := self._next()) is not None:
            self._tier.start(self._moves(key, write=False), partial(self._read, key))

    def _next(self) -> Key | None:
        """The next page to read, with a buffer, if there is one for it."""
        with self._changed:
            # One that has a buffer is at work, or on its way back to disk: it is read again after that.
            if not self._wanted or not self._free or self._wanted[0] in self._pages or self._ledger.failed:
                return None
            key = self._wanted.popleft()
            self._pages[key] = _Page(self._free.pop())
            return key

    def _read(self, key: Key, error: BaseException | None) -> None:
        if error is not None:
            self._ledger.fail(error)
            return
        with self._changed:
            self._pages[key].ready = True
            self._changed.notify_all()

    def _written(self, key: Key, error: BaseException | None) -> None:
        if error is not None:
            self._ledger.fail(error)
            return
        block, _ = key
        with self._changed:
            self._free.append(self._pages.pop(key).buffer)
            self._num_written[block] += 1
            then = None if self._is_under_way(block) else self._then.pop(block, None)
            self._changed.notify_all()
        self._read_ahead()
        if then is not None:
            then()

    def _is_under_way(self, block: int) -> bool:
        return self._num_written[block] < self._announced[block]

    def _is_ready(self, key: Key) -> bool:
        return key in self._pages and self._pages[key].ready

    def _moves(self, key: Key, write: bool) -> list[Move]:
        block, page = key
        buffer, moves, start = self._pages[key].buffer, [], 0
        for name, (offset, num_bytes) in page_spans(self.states[block], self._layouts[block], page).items():
            moves.append(Move((name, block), offset, buffer[start : start + num_bytes], write))
            start += num_bytes
        return moves

    def _views(self, key: Key) -> dict[str, Tensor]:
        block, page = key
        buffer, views, start = self._pages[key].buffer, {}, 0
        spans = page_spans(self.states[block], self._layouts[block], page)
        for state in self.states[block]:
            numbers = state.span(*page_range(self._layouts[block], page))
            num_bytes = (numbers.stop - numbers.start) * state.dtype.itemsize
            views[state.name] = buffer[start : start + num_bytes].view(state.dtype)
            start += spans[state.name][1]
        return views

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
