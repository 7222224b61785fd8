"""The engines of the nvme tier against raw access to the same disk: what is left of it for states.

Raw are threads that read and write a file past the page cache, 16 MiB a call, with nothing around them. The engines
move what updates move: pages of an fp32 state, as many at a time as an update stages, through the tier's own threads.
"""

from __future__ import annotations

import errno
import mmap
import os
import queue
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from statistics import median
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from horizon.bench.disk import PLACE, create_file, make_buffer
from horizon.config.schema import NvmeEngine
from horizon.errors import DataError
from horizon.plan.disk import UPDATE_PAGES, DiskMap, Region
from horizon.report.measurements import RAW, Row, Setting, Skipped
from horizon.store.arena import Arena
from horizon.store.disk import PIECE, takes_direct
from horizon.store.nvme import THREADS, Move, open_nvme
from horizon.store.zarr import has_tensorstore
from horizon.units import MIB

PAGE = 32 * MIB
STATE = "exp_avg", 0
WRITES = {"read": (False,), "write": (True,), "both": (False, True)}  # of each page, one after the other

_Pages: TypeAlias = "queue.SimpleQueue[Tensor | BaseException]"


def nvme(folder: Path, num_bytes: int, repeats: int) -> Iterator[Row | Skipped]:
    """Rows by engine and access; `both` reads and writes at the same time, as steps do, and counts both.

    Raw and engines take turns, because disks that others use are not the same from one second to the next. The first
    writing of a file, which costs some file systems more, is not counted.

    Args:
        num_bytes: of each one's file, a multiple of 32 MiB.

    Raises:
        DataError: the file of raw access cannot be made, written or read.
        HorizonError: an engine cannot be used.
    """
    if not takes_direct(folder):
        reason = f"the file system of {folder} refuses direct I/O, so there is no raw access to compare with"
        yield Skipped(test="nvme", place=PLACE, reason=reason)
        return
    engines = [NvmeEngine.direct, *([NvmeEngine.tensorstore] if has_tensorstore() else [])]
    try:
        with ExitStack() as stack:
            parts: list[_Part] = [stack.enter_context(closing(Raw(folder, num_bytes, THREADS)))]
            parts += [stack.enter_context(closing(_Tier(folder, num_bytes, engine))) for engine in engines]
            found = _times(parts, repeats)
    except OSError as error:
        raise DataError(f"cannot measure the disk in {folder}: {error.strerror}; choose another with --disk") from error
    for part in parts:
        for access, writes in WRITES.items():
            times, cores = zip(*found[part.name, access], strict=True)
            raw = median(wall for wall, _ in found[RAW, access])
            also = {"of_raw": raw / median(times), "cores": median(cores)}
            values = [num_bytes * len(writes) / wall / 1e9 for wall in times]
            settings: dict[str, Setting] = {"engine": part.name, "access": access, "size": num_bytes}
            yield Row.of("nvme", PLACE, settings, "GB/s", values, also=also)


class _Part(Protocol):
    """What moves all of its file, one way or both."""

    @property
    def name(self) -> str: ...

    def move(self, writes: Sequence[bool]) -> None: ...


def _times(parts: Sequence[_Part], repeats: int) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(seconds, cores kept busy) of every turn, by name and access."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for part in parts:
        part.move((True,))
    for number in range(repeats):
        for access, writes in WRITES.items():
            for part in parts if number % 2 else reversed(parts):
                wall, processor = time.perf_counter(), time.process_time()
                part.move(writes)
                wall, processor = time.perf_counter() - wall, time.process_time() - processor
                found.setdefault((part.name, access), []).append((wall, processor / wall))
    return found


class Raw:
    """Calls to the system, on threads that each have a buffer in huge pages.

    Raises:
        OSError: the file cannot be made, or not for direct I/O.
    """

    name = RAW

    def __init__(self, folder: Path, num_bytes: int, num_threads: int):
        self._handle, direct = create_file(folder, num_bytes)
        if not direct:
            os.close(self._handle)
            raise OSError(errno.EINVAL, "its file system refuses direct I/O")
        self._num_bytes, self._pool = num_bytes, ThreadPoolExecutor(num_threads)
        self._buffers: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
        for _ in range(num_threads):
            self._buffers.put(make_buffer(PIECE))

    def move(self, writes: Sequence[bool]) -> None:
        """Every piece of the file, read or written for each of `writes`.

        Raises:
            OSError: a call failed, or moved less than it should.
        """
        calls = [(start, write) for start in range(0, self._num_bytes, PIECE) for write in writes]
        list(self._pool.map(lambda call: self._call(*call), calls))

    def _call(self, start: int, write: bool) -> None:
        buffer = self._buffers.get()
        try:
            done = (os.pwritev if write else os.preadv)(self._handle, [buffer], start)
        finally:
            self._buffers.put(buffer)
        if done != PIECE:
            raise OSError(errno.EIO, f"{done} of {PIECE} bytes at {start} were moved")

    def close(self) -> None:
        """Give the file back."""
        self._pool.shutdown()
        os.close(self._handle)


class _Tier:
    """The tier with one of its engines."""

    def __init__(self, folder: Path, num_bytes: int, engine: NvmeEngine):
        self.name = str(engine)
        self._num_bytes, self._staging = num_bytes, Arena([PAGE] * UPDATE_PAGES, "staging", pin=False)
        for region in self._staging.regions:  # with bytes that no disk can shorten
            region.copy_(torch.randint(0, 256, (PAGE,), dtype=torch.uint8))
        self._tier = open_nvme(str(folder), engine, DiskMap({STATE: Region(0, num_bytes, PAGE)}, num_bytes))

    def move(self, writes: Sequence[bool]) -> None:
        free: _Pages = queue.SimpleQueue()
        for region in self._staging.regions:
            free.put(region)
        for start in range(0, self._num_bytes, PAGE):
            for write in writes:
                page = _taken(free)
                self._tier.start([Move(STATE, start, page, write)], partial(_give, free, page))
        for _ in self._staging.regions:
            _taken(free)

    def close(self) -> None:
        self._tier.close()
        self._staging.close()


def _give(free: _Pages, page: Tensor, error: BaseException | None) -> None:
    free.put(error or page)


def _taken(free: _Pages) -> Tensor:
    page = free.get()
    if isinstance(page, BaseException):
        raise page
    return page
