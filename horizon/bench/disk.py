"""Reads and writes of a file past the page cache, by the number of requests under way and their size."""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from horizon.errors import DataError
from horizon.report.measurements import Row

PLACE = "disk"


def disk(
    folder: Path, file_bytes: int, depths: tuple[int, ...], blocks: tuple[int, ...], repeats: int, seconds: float
) -> Iterator[Row]:
    """Rows by access, depth and block size, on a file in `folder` that is removed afterwards.

    One measurement takes `seconds`, or less where the whole file has been moved before.

    Raises:
        DataError: the file cannot be made, written or read.
    """
    path = folder / f"horizon-bench-{os.getpid()}"
    try:
        direct = _create(path, file_bytes)
        for access in ("write", "read"):
            for block in blocks:
                for depth in depths:
                    values = [_rate(path, access, depth, block, file_bytes, direct, seconds) for _ in range(repeats)]
                    settings = {
                        "access": access, "depth": depth, "block": block, "io": "direct" if direct else "buffered",
                    }  # fmt: skip
                    yield Row.of("disk", PLACE, settings, "GB/s", values)
    except OSError as error:
        raise DataError(f"cannot measure the disk in {folder}: {error.strerror}; choose another with --disk") from error
    finally:
        path.unlink(missing_ok=True)


def _create(path: Path, file_bytes: int) -> bool:
    """Write the file once, so that reads find data; whether the file system takes O_DIRECT."""
    flags, direct = os.O_RDWR | os.O_CREAT | os.O_TRUNC, True
    try:
        handle = os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        handle, direct = os.open(path, flags, 0o600), False
    try:
        os.posix_fallocate(handle, 0, file_bytes)
        block = min(file_bytes, 16 << 20)
        buffer = _buffer(block)
        for offset in range(0, file_bytes, block):
            _whole(os.pwrite(handle, buffer, offset), block)
        os.fsync(handle)
    finally:
        os.close(handle)
    return direct


def _rate(path: Path, access: str, depth: int, block: int, file_bytes: int, direct: bool, limit_s: float) -> float:
    """GB/s of `depth` threads, each with one request under way."""
    offsets, lock = iter(range(0, file_bytes - block + 1, block)), threading.Lock()
    handle = os.open(path, os.O_RDWR | (os.O_DIRECT if direct else 0))
    moved, errors = [0] * depth, []
    started = time.perf_counter()

    def work(number: int) -> None:
        buffer = _buffer(block)
        try:
            while time.perf_counter() - started < limit_s:
                with lock:
                    offset = next(offsets, None)
                if offset is None:
                    return
                done = os.preadv(handle, [buffer], offset) if access == "read" else os.pwrite(handle, buffer, offset)
                _whole(done, block)
                moved[number] += block
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(depth)]
    try:
        if not direct:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if access == "write":
            os.fsync(handle)
        seconds = time.perf_counter() - started
    finally:
        os.close(handle)
    if errors:
        raise errors[0]
    return sum(moved) / seconds / 1e9


def _buffer(num_bytes: int) -> mmap.mmap:
    """Aligned as O_DIRECT asks for, and not zero."""
    buffer = mmap.mmap(-1, num_bytes)
    buffer[:] = bytes(range(256)) * (num_bytes // 256) + bytes(num_bytes % 256)
    return buffer


def _whole(done: int, expected: int) -> None:
    if done != expected:
        raise OSError(errno.EIO, f"{done} of {expected} bytes were moved")
