"""The `nvme` tier: states in a folder on disk, moved by a few threads between there and staging in host memory.

Every move names the state it belongs to, in its error too. After the first failure nothing is moved any more: what was
to be written then is lost, and whoever waits for it is told.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from horizon.config.schema import NvmeEngine
from horizon.errors import TierError
from horizon.plan.disk import DISK_BLOCK, DiskMap, Place
from horizon.store.arena import Arena
from horizon.store.disk import PIECE, DirectFile, DiskEngine, takes_direct
from horizon.store.zarr import ZarrStates, has_tensorstore
from horizon.units import align_up

logger = logging.getLogger(__name__)

THREADS = 4  # at 16 MiB a call, two to four fill a disk
BOUNCE = 4 * PIECE  # bytes that go through at a time where whole disk blocks do not fit the caller's range

Done = Callable[[BaseException | None], None]
Observer = Callable[[str, int, int], AbstractContextManager[None]]  # what is done, block, bytes


def unobserved(what: str, block: int, num_bytes: int) -> AbstractContextManager[None]:
    """Nobody takes it down."""
    return nullcontext()


class Move(NamedTuple):
    """Bytes of a state between disk and memory, whole disk blocks."""

    place: Place
    offset: int  # in the state
    data: Tensor  # uint8, on the host
    write: bool


class NvmeTier:
    """The states of `disk_map`, zero at first.

    Attributes:
        observe: opened around every call to the engine; what it does takes a disk thread's time.

    Raises:
        BudgetError: the disk has no room.
        TierError: the folder cannot be used.
    """

    def __init__(self, folder: Path, engine: DiskEngine):
        self._folder, self._engine = folder, engine
        self.observe: Observer = unobserved
        self._error: BaseException | None = None
        self._pool = ThreadPoolExecutor(THREADS, "horizon-disk")
        self._bounce: Arena | None = None
        self._bouncing = threading.Lock()

    def start(self, moves: Sequence[Move], done: Done) -> None:
        """Begin these moves; `done` is called once, by a disk thread, with the first error or None."""
        pieces = [piece for move in moves for piece in self._pieces(move)]
        if not pieces:
            done(None)
            return
        group = _Group(len(pieces), done)
        for piece in pieces:
            self._pool.submit(self._move, piece, group)

    def run(self, moves: Sequence[Move]) -> None:
        """Make these moves and return when they are done; raises what went wrong."""
        over, errors = threading.Event(), list[BaseException]()

        def done(error: BaseException | None) -> None:
            errors.extend([error] if error else [])
            over.set()

        self.start(moves, done)
        over.wait()
        if errors:
            raise errors[0]

    def _pieces(self, move: Move) -> Iterator[Move]:
        size = self._engine.piece_bytes(move.place)
        start, end = move.offset, move.offset + move.data.numel()
        while start < end:
            stop = min(start - start % size + size, end)
            yield move._replace(offset=start, data=move.data[start - move.offset : stop - move.offset])
            start = stop

    def _move(self, piece: Move, group: _Group) -> None:
        try:
            if self._error is not None:
                raise self._error
            data = memoryview(piece.data.numpy())  # type: ignore[arg-type]
            with self.observe("write" if piece.write else "read", piece.place[1], len(data)):
                (self._engine.write if piece.write else self._engine.read)(piece.place, piece.offset, data)
        except Exception as error:
            self._error = self._error or _named(error, piece, self._folder)
            group.over(self._error)
        else:
            group.over(None)

    # ---- any range of a state, for what comes and goes parameter by parameter

    def read_range(self, place: Place, offset: int, into: Tensor) -> None:
        """Fill `into` (uint8, flat) with the state's bytes from `offset` on."""
        self._through_bounce(place, offset, into, write=False)

    def write_range(self, place: Place, offset: int, data: Tensor) -> None:
        """Store `data` (uint8, flat) from the state's byte `offset` on; what is around it stays."""
        self._through_bounce(place, offset, data, write=True)

    def _through_bounce(self, place: Place, offset: int, data: Tensor, write: bool) -> None:
        with self._bouncing:
            if self._bounce is None:
                self._bounce = Arena([BOUNCE], "nvme staging", pin=False)
            window = self._bounce.regions[0]
            done, end = 0, offset + data.numel()
            while done < data.numel():
                start = offset + done
                first = start - start % DISK_BLOCK
                stop = min(end, first + BOUNCE)
                staged = window[: align_up(stop, DISK_BLOCK) - first]
                part, mine = data[done : stop - offset], staged[start - first : stop - first]
                if write:
                    self._read_edges(place, first, start, stop, staged)
                    _copy(mine, part)
                    self.run([Move(place, first, staged, True)])
                else:
                    self.run([Move(place, first, staged, False)])
                    _copy(part, mine)
                done = stop - offset

    def _read_edges(self, place: Place, first: int, start: int, stop: int, staged: Tensor) -> None:
        """Bring in the disk blocks of which only a part is about to be written."""
        edges = []
        if start > first:
            edges.append(Move(place, first, staged[:DISK_BLOCK], False))
        if stop % DISK_BLOCK and not (edges and staged.numel() == DISK_BLOCK):
            edges.append(Move(place, first + staged.numel() - DISK_BLOCK, staged[-DISK_BLOCK:], False))
        self.run(edges)

    def close(self) -> None:
        """Wait for what is under way, then give all space back. Idempotent."""
        self._pool.shutdown(wait=True, cancel_futures=False)
        self._engine.close()
        if self._bounce is not None:
            self._bounce.close()
            self._bounce = None


class _Group:
    """Moves that are over together."""

    def __init__(self, num: int, done: Done):
        self._left, self._done, self._error = num, done, None
        self._lock = threading.Lock()

    _error: BaseException | None

    def over(self, error: BaseException | None) -> None:
        with self._lock:
            self._left -= 1
            self._error = self._error or error
            last = self._left == 0
        if last:
            self._done(self._error)


def _named(error: Exception, piece: Move, folder: Path) -> Exception:
    """What a user is told of a move that failed."""
    if not isinstance(error, OSError):
        return error
    state, block = piece.place
    doing = "writing" if piece.write else "reading"
    failure = TierError(
        f"{doing} {state} of block {block} in memory.nvme_dir={folder} failed ({error.strerror or error}): the states "
        "on disk are lost, go on from the last checkpoint; check the disk, or set another memory.nvme_dir"
    )
    failure.__cause__ = error
    return failure


def open_nvme(folder: str, engine: NvmeEngine, disk_map: DiskMap) -> NvmeTier:
    """The tier in a folder, with the engine that is asked for.

    Raises: as the engine does.
    """
    path, engine = Path(folder), NvmeEngine(engine)
    if engine is NvmeEngine.tensorstore or (engine is NvmeEngine.auto and has_tensorstore() and not takes_direct(path)):
        logger.info("states on nvme are zarr3 arrays in %s, written by tensorstore", folder)
        return NvmeTier(path, ZarrStates(path, disk_map))
    return NvmeTier(path, DirectFile(path, disk_map))


class NvmeFolder(NamedTuple):
    """Where files of the tier are made, one for each kind of thing there: each is as large as it will be."""

    path: str
    engine: NvmeEngine
    observe: Observer = unobserved

    def open(self, disk_map: DiskMap) -> NvmeTier:
        """A new file, all zeros; raises as `open_nvme`."""
        tier = open_nvme(self.path, self.engine, disk_map)
        tier.observe = self.observe
        return tier


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous host tensor, flat."""
    return tensor.view(-1).view(torch.uint8)


def _copy(target: Tensor, source: Tensor) -> None:
    """Copy host bytes; not by torch, whose threads would queue behind the update's.

    On two busy cores 16 MiB took 6 ms by torch, 2 so.
    """
    np.copyto(target.numpy(), source.numpy())
