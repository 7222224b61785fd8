"""Engines that move bytes between memory and a folder on disk; the `nvme` tier runs one on a few threads of its own.

`DirectFile` is one file past the page cache: what is read and written is exactly what the disk does, with next to no
work for the processor. It has no name: whatever ends the process, its space is given back.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from horizon.errors import BudgetError, TierError
from horizon.plan.disk import DISK_BLOCK, DiskMap, Place, Region
from horizon.units import MIB, format_bytes

logger = logging.getLogger(__name__)

PIECE = 16 * MIB  # that one thread moves by one call


class DiskEngine(Protocol):
    """Moves bytes of the states on disk. Any thread may call; what is never written reads as zeros."""

    def piece_bytes(self, place: Place) -> int:
        """Pieces of a state begin at multiples of this, and none is longer."""

    def read(self, place: Place, offset: int, into: memoryview) -> None:
        """Fill `into` from byte `offset` of a state on; addresses and sizes are whole disk blocks.

        Raises:
            OSError: the disk does not give them.
        """

    def write(self, place: Place, offset: int, data: memoryview) -> None:
        """Store `data` from byte `offset` of a state on; as `read`."""

    def close(self) -> None:
        """Give the space back. Idempotent."""


class DirectFile:
    """One preallocated file in `folder`, read and written past the page cache where its file system can do that.

    Raises:
        BudgetError: the disk has no room for it.
        TierError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, disk_map: DiskMap):
        self._regions: Mapping[Place, Region] = disk_map.regions
        self._fd = -1
        path = folder / f"horizon-{os.getpid()}-{os.urandom(4).hex()}.states"
        try:
            self._fd, self.direct = _open(path)
            os.unlink(path)
            if disk_map.num_bytes:
                os.posix_fallocate(self._fd, 0, disk_map.num_bytes)
        except OSError as error:
            self.close()
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise BudgetError(
                    f"memory.nvme_dir={folder} has no room for {format_bytes(disk_map.num_bytes)} of states "
                    f"({error.strerror}); free space there, or keep more states in dram"
                ) from error
            raise TierError(f"memory.nvme_dir={folder} cannot hold states ({error.strerror}); set another") from error
        if not self.direct:
            logger.warning("%s refuses O_DIRECT: states on nvme go through the page cache, which takes memory", folder)

    def piece_bytes(self, place: Place) -> int:
        return PIECE

    def read(self, place: Place, offset: int, into: memoryview) -> None:
        self._check(place, offset, into)
        start, done = self._regions[place].offset + offset, 0
        while done < len(into):
            done += _progress(os.preadv(self._fd, [into[done:]], start + done), "read")

    def write(self, place: Place, offset: int, data: memoryview) -> None:
        self._check(place, offset, data)
        start, done = self._regions[place].offset + offset, 0
        while done < len(data):
            done += _progress(os.pwritev(self._fd, [data[done:]], start + done), "written")

    def _check(self, place: Place, offset: int, data: memoryview) -> None:
        """A move that is misplaced would destroy another state."""
        if offset < 0 or offset + len(data) > self._regions[place].num_bytes or offset % DISK_BLOCK:
            raise RuntimeError(
                f"{place} has {self._regions[place].num_bytes} bytes: {len(data)} at {offset} are not in it"
            )

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _open(path: Path) -> tuple[int, bool]:
    """(descriptor, past the page cache)."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        path.unlink(missing_ok=True)  # some file systems create it first
        return os.open(path, flags, 0o600), False


def _progress(num_bytes: int, what: str) -> int:
    if num_bytes == 0 or num_bytes % DISK_BLOCK:
        raise OSError(errno.EIO, f"only {num_bytes} bytes were {what}")
    return num_bytes


def takes_direct(folder: Path) -> bool:
    """Whether files there can be moved past the page cache.

    Raises:
        TierError: the folder cannot be written to.
    """
    path = folder / f"horizon-{os.getpid()}-{os.urandom(4).hex()}.probe"
    try:
        fd, direct = _open(path)
    except OSError as error:
        raise TierError(f"memory.nvme_dir={folder} cannot hold states ({error.strerror}); set another") from error
    os.close(fd)
    path.unlink()
    return direct
