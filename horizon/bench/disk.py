"""Reads and writes of a file past the page cache, by the number of requests under way and their size.

Requests follow one another through the file. Compiled code makes them: small ones would else wait for Python's lock.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
import numpy as np

from horizon.errors import DataError
from horizon.report.measurements import Row
from horizon.store.arena import HUGE_PAGE

PLACE = "disk"
BATCH = 1 << 20  # bytes that are moved between two looks at the clock


def disk(
    folder: Path, file_bytes: int, depths: tuple[int, ...], blocks: tuple[int, ...], repeats: int, seconds: float
) -> Iterator[Row]:
    """Rows by access, depth and block size, on a file in `folder` that has no name, so that nothing of it can be left.

    One measurement takes `seconds`, or less where the whole file has been moved before.

    Raises:
        DataError: the file cannot be made, written or read.
    """
    try:
        handle, direct = create_file(folder, file_bytes)
        try:
            for access in ("write", "read"):
                for block in blocks:
                    for depth in depths:
                        buffers = [make_buffer(block) for _ in range(depth)]
                        values = [_rate(handle, access, buffers, file_bytes, direct, seconds) for _ in range(repeats)]
                        settings = {
                            "access": access, "depth": depth, "block": block, "io": "direct" if direct else "buffered",
                        }  # fmt: skip
                        yield Row.of("disk", PLACE, settings, "GB/s", values)
        finally:
            os.close(handle)
    except OSError as error:
        raise DataError(f"cannot measure the disk in {folder}: {error.strerror}; choose another with --disk") from error


def create_file(folder: Path, file_bytes: int) -> tuple[int, bool]:
    """A file that was written once, so that reads find data, and whether the file system takes O_DIRECT."""
    path, flags, direct = folder / f"horizon-bench-{os.getpid()}", os.O_RDWR | os.O_CREAT | os.O_TRUNC, True
    try:
        handle = os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        handle, direct = os.open(path, flags, 0o600), False
    try:
        path.unlink()
        os.posix_fallocate(handle, 0, file_bytes)
        buffer = make_buffer(min(file_bytes, 16 << 20))
        for offset in range(0, file_bytes, len(buffer)):
            if os.pwrite(handle, buffer, offset) != len(buffer):
                raise _failure("write", handle, buffer, offset)
        os.fsync(handle)
    except BaseException:
        os.close(handle)
        raise
    return handle, direct


@functools.cache
def requests(access: str) -> Callable[..., Any]:
    """Compiled: makes `count` requests, each `stride` bytes behind the one before, and says how many were whole."""
    libc = ctypes.CDLL(None)
    move = libc.pread if access == "read" else libc.pwrite
    move.argtypes, move.restype = (ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_ssize_t), ctypes.c_ssize_t

    def make(handle, address, size, offset, stride, count):  # type: ignore[no-untyped-def]
        for i in range(count):
            if move(handle, address, size, offset + i * stride) != size:
                return i
        return count

    whole = numba.int64
    compiled: Callable[..., Any] = numba.njit(whole(numba.int32, numba.uint64, *[whole] * 4), nogil=True)(make)
    return compiled


def _rate(
    handle: int, access: str, buffers: Sequence[mmap.mmap], file_bytes: int, direct: bool, limit_s: float
) -> float:
    """GB/s of as many threads as there are buffers, each with one request under way."""
    make, depth, block = requests(access), len(buffers), len(buffers[0])
    moved, errors, stop = [0] * depth, list[OSError](), threading.Event()

    def work(number: int) -> None:
        offsets, done = range(number * block, file_bytes - block + 1, depth * block), 0
        address = np.frombuffer(buffers[number], dtype=np.uint8).ctypes.data
        while done < len(offsets) and not stop.is_set() and time.perf_counter() - started < limit_s:
            count = min(max(1, BATCH // block), len(offsets) - done)
            whole = make(handle, address, block, offsets[done], depth * block, count)
            done += whole
            if whole < count:
                errors.append(_failure(access, handle, buffers[number], offsets[done]))
                break
        moved[number] = done * block

    threads = [threading.Thread(target=work, args=(i,)) for i in range(depth)]
    if not direct:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:  # interrupted or not, nobody uses the file any more
        stop.set()
        for thread in threads:
            if thread.is_alive():
                thread.join()
    if errors:
        raise errors[0]
    if access == "write":
        os.fsync(handle)
    return sum(moved) / (time.perf_counter() - started) / 1e9


def make_buffer(num_bytes: int) -> mmap.mmap:
    """Aligned as O_DIRECT asks for, in huge pages (4 KiB ones were seen to halve the rate), and not zero."""
    buffer = mmap.mmap(-1, num_bytes)
    if num_bytes >= HUGE_PAGE:
        with suppress(OSError):  # a kernel without them
            buffer.madvise(mmap.MADV_HUGEPAGE)
    buffer[:] = bytes(range(256)) * (num_bytes // 256) + bytes(num_bytes % 256)
    return buffer


def _failure(access: str, handle: int, buffer: mmap.mmap, offset: int) -> OSError:
    """Why a request was not whole: made again, where the system says it."""
    try:
        done = os.preadv(handle, [buffer], offset) if access == "read" else os.pwrite(handle, buffer, offset)
    except OSError as error:
        return error
    return OSError(errno.EIO, f"{done} of {len(buffer)} bytes were moved")
