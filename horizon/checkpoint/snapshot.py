"""A snapshot: the states of all blocks as they are after one step, read while training goes on.

Threads of its own set the states aside, chunk by chunk, in the order in which the optimizer will overwrite them; from
there they go to the disk. An update of the next step that comes to a block first sets aside what is left of that block
itself, and only then begins. So a block is copied once, nobody waits for the disk as long as there is staging, and what
is read is always of the snapshot's version.

Invariant: no block is overwritten before all of it was set aside, or the snapshot was given up.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from horizon.checkpoint.arrays import as_array
from horizon.checkpoint.format import DTYPES, ArraySpec, Chunk, StateArray
from horizon.checkpoint.staging import Staging
from horizon.errors import CheckpointError
from horizon.store.arena import Arena
from horizon.store.host import HostStore
from horizon.stream.streams import Streams
from horizon.units import MIB

BOUNCE_BYTES = 16 * MIB  # for each thread, that states in HBM (pinned, then) and on nvme come through


class Write(Protocol):
    """Where chunks go; see `horizon.checkpoint.arrays.ArrayWriter.write`."""

    def __call__(self, spec: ArraySpec, chunk: Chunk, values: Tensor, done: Callable[[], None]) -> None:
        """`values` stay as they are until `done` is called."""


@dataclass(frozen=True, slots=True)
class _Piece:
    array: StateArray
    chunk: Chunk


class Snapshot:
    """The states at `version`, which every block has reached or is about to.

    Args:
        arrays: what to set aside, block after block in the order in which they will be overwritten.
        read: fills a tensor with a chunk's numbers; see `StateReader`.

    Attributes:
        stall_s: for how long updates have waited until a block was set aside,
        room_s: and for how long of that because the staging was full.
    """

    def __init__(
        self,
        version: int,
        arrays: Iterable[StateArray],
        store: HostStore,
        staging: Staging,
        read: Callable[[StateArray, Chunk, Tensor], None],
        write: Write,
    ) -> None:
        self.version, self.stall_s, self.room_s = version, 0.0, 0.0
        self._ledger, self._staging, self._read, self._write = store.ledger, staging, read, write
        self._changed = threading.Condition()  # guards everything below
        self._waiting: dict[int, deque[_Piece]] = {}
        for array in arrays:
            self._waiting.setdefault(array.block, deque()).extend(_Piece(array, c) for c in array.spec.chunks)
        self._under_way: Counter[int] = Counter()  # pieces of a block that are being set aside
        self._urgent: int | None = None  # a block that an update waits for
        self._error: BaseException | None = None

    def copy_all(self, num_threads: int = 1) -> None:
        """Set aside whatever no update asks for first; returns when nothing is left.

        Raises:
            CheckpointError: the snapshot was given up.
            HorizonError: the updates that lead to this version have failed.
        """

        def copy() -> None:
            while (piece := self._take()) is not None:
                self._set_aside(piece)

        names = [f"horizon-checkpoint-copy-{number}" for number in range(1, num_threads)]
        helpers = [threading.Thread(target=copy, name=name, daemon=True) for name in names]
        for helper in helpers:
            helper.start()
        copy()
        for helper in helpers:
            helper.join()
        self.settle()
        if self._error is not None:
            raise self._error

    def before_update(self, block: int) -> None:
        """Return when the states of `block` may be overwritten. Never raises: a save that fails harms no update."""
        if self._ledger.version(block) < self.version:
            return  # the update that leads to this version
        with self._changed:
            if self._is_aside(block):
                return
            self._urgent = block
        started = time.perf_counter()
        room_s = 0.0
        while (piece := self._take(block)) is not None:
            room_s += self._set_aside(piece)
        with self._changed:
            self._changed.wait_for(lambda: self._is_aside(block))
            self.stall_s += time.perf_counter() - started
            self.room_s += room_s

    def settle(self) -> None:
        """Return when nothing more is read from any block."""
        with self._changed:
            self._changed.wait_for(lambda: not any(self._under_way.values()) and (self._error or not self._left()))

    def give_up(self, error: BaseException) -> None:
        """Set nothing more aside."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _is_aside(self, block: int) -> bool:
        return not self._under_way[block] and (self._error is not None or not self._waiting.get(block))

    def _left(self) -> bool:
        return any(self._waiting.values())

    def _take(self, block: int | None = None) -> _Piece | None:
        """The next piece of `block`, or (None) of the block that is needed first."""
        with self._changed:
            if block is None:
                block = self._urgent
                if block is None or not self._waiting.get(block):
                    block = next((b for b, pieces in self._waiting.items() if pieces), None)
            if block is None or self._error is not None or not self._waiting.get(block):
                return None
            self._under_way[block] += 1
            return self._waiting[block].popleft()

    def _set_aside(self, piece: _Piece) -> float:
        """Copy a piece and hand it on; seconds that it took to find room. What fails ends the snapshot."""
        spec, chunk, started = piece.array.spec, piece.chunk, time.perf_counter()
        room_s = 0.0
        try:
            self._ledger.wait(piece.array.block, self.version)
            region = self._staging.acquire((chunk.stop - chunk.start) * DTYPES[spec.dtype].itemsize)
            room_s = time.perf_counter() - started
            if region is None:
                raise CheckpointError("the save was given up")
            values = region.view(DTYPES[spec.dtype])
            try:
                self._read(piece.array, chunk, values)
                shape = [part.stop - part.start for part in chunk.index]
                self._write(spec, chunk, values.view(shape), lambda: self._staging.release(region))
            except BaseException:
                self._staging.release(region)
                raise
        except BaseException as error:
            self.give_up(error)
        finally:
            with self._changed:
                self._under_way[piece.array.block] -= 1
                self._changed.notify_all()
        return room_s


class StateReader:
    """Copies numbers of blocks' flat states to host memory, wherever they lie, without taking device memory.

    From a device they come on a stream of its own, some at a time through a little pinned memory. From nvme they come
    through the tier, beside the pages of updates; the halves of a master some at a time, too.

    Args:
        num_threads: that may copy from a device or from nvme at the same time; others wait for their turn.
    """

    def __init__(self, store: HostStore, streams: Streams, num_threads: int = 1) -> None:
        self._store, self._streams, self._num_threads = store, streams, num_threads
        self._stream = torch.cuda.Stream(streams.device) if streams.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._bounce: Arena | None = None
        self._free: queue.SimpleQueue[tuple[Tensor, Tensor]] = queue.SimpleQueue()  # for two halves each
        self._num_pages: dict[int, int] = {}  # by block, those that must be on nvme before it is read

    @property
    def on_gpu(self) -> bool:
        """Whether states may be in device memory."""
        return self._stream is not None

    def make_room(self) -> None:
        """Have the memory that states come through; a save that begins does not wait for its pages, then."""
        if self._bounce is None and (self._store.on_nvme or self.on_gpu):
            self._bounce = Arena([BOUNCE_BYTES // 2] * (2 * self._num_threads), "checkpoint copies", pin=self.on_gpu)
            for pair in zip(self._bounce.regions[::2], self._bounce.regions[1::2], strict=True):
                self._free.put(pair)

    def begin(self) -> None:
        """What is read from now on comes after all that the device and the updates were told to do so far."""
        if self._store.pages is not None:
            self._num_pages = self._store.pages.announced()
        if self._stream is not None:
            for stream in (self._streams.compute, self._streams.update):
                self._stream.wait_event(stream.record_event())

    def read(self, array: StateArray, chunk: Chunk, out: Tensor) -> None:
        """Fill `out`, flat, with a chunk's numbers: of a state, or masters joined from both halves."""
        start, stop = array.start + chunk.start, array.start + chunk.stop
        states = self._store.states(array.block)
        sources = {name: states[name] for name in array.states}
        on_nvme = {name for name in sources if (name, array.block) in self._store.on_nvme}
        if not on_nvme and all(source.device.type == "cpu" for source in sources.values()):
            _combine([source[start:stop] for source in sources.values()], out)
            return
        if on_nvme and array.block in self._num_pages:
            assert self._store.pages is not None
            self._store.pages.wait_for(array.block, self._num_pages[array.block])
        size = BOUNCE_BYTES // 2 // max(source.itemsize for source in sources.values())
        pair = self._free.get()
        try:
            for first in range(start, stop, size):
                span = slice(first, min(first + size, stop))
                parts = []
                for (name, source), region in zip(sources.items(), pair, strict=False):
                    part = region.view(source.dtype)[: span.stop - first]
                    if name in on_nvme:
                        self._store.read_nvme(array.block, name, first, part)
                    else:
                        part = self._fetch(source[span], part)
                    parts.append(part)
                _combine(parts, out[first - start : span.stop - start])
        finally:
            self._free.put(pair)

    def _fetch(self, source: Tensor, region: Tensor) -> Tensor:
        """The numbers in host memory: where they are, or in `region`."""
        if self._stream is None or source.device.type == "cpu":
            return source
        with self._streams.running(self._stream):
            region.copy_(source, non_blocking=True)
            copied = self._stream.record_event()
        copied.synchronize()  # the CPU reads them next
        return region

    def close(self) -> None:
        """Give the memory back."""
        if self._bounce is not None:
            self._bounce.close()
            self._bounce = None


def _combine(sources: list[Tensor], out: Tensor) -> None:
    """Copy one state, or join two halves as `join_master` does; not by torch, which would start threads for it."""
    if len(sources) == 1:
        np.copyto(as_array(out), as_array(sources[0]))
        return
    from horizon.optim.kernel import join_numba  # here: a plan looks at saves, and has no use for numba

    high, low = (source.view(torch.int16).numpy() for source in sources)
    join_numba(high, low, out.view(torch.int32).numpy())
