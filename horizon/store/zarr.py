"""The portable engine of the `nvme` tier: zarr3 arrays written by TensorStore, where direct I/O is not available.

Every state of a block is an array of bytes, in chunks that are pages or parts of one: updates write whole chunks.
TensorStore makes a new file of each chunk it writes. A chunk that was never written reads as zeros; one that was and
is gone is an error. The arrays live in a folder of their own, which `close` removes; after a kill it stays.
"""

from __future__ import annotations

import errno
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from horizon.errors import BudgetError, ConfigError, TierError
from horizon.plan.disk import DiskMap, Place
from horizon.store.disk import PIECE, takes_direct
from horizon.units import format_bytes

FILE_THREADS, COPY_THREADS = 4, 2


def has_tensorstore() -> bool:
    """Whether the package is installed."""
    return find_spec("tensorstore") is not None


class ZarrStates:
    """Arrays of bytes in a new folder below `folder`.

    Raises:
        ConfigError: tensorstore is not installed.
        BudgetError: the disk has no room for them.
        TierError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, disk_map: DiskMap):
        if not has_tensorstore():
            raise ConfigError(
                "memory.nvme_engine=tensorstore needs the package of that name (pip install tensorstore); "
                "install it, or set memory.nvme_engine=direct"
            )
        self._map = disk_map
        self._root = folder / f"horizon-{os.getpid()}-{os.urandom(4).hex()}.zarr"
        direct = takes_direct(folder)
        free = shutil.disk_usage(folder).free
        if free < disk_map.num_bytes:
            raise BudgetError(
                f"memory.nvme_dir={folder} has no room for {format_bytes(disk_map.num_bytes)} of states "
                f"({format_bytes(free)} are free); free space there, or keep more states in dram"
            )
        try:
            self._root.mkdir()
            self._arrays = {place: self._open(place, direct) for place in disk_map.regions}
        except (OSError, ValueError) as error:
            self.close()
            reason = str(error).splitlines()[0]
            raise TierError(f"memory.nvme_dir={folder} cannot hold states ({reason}); set another") from error
        self._written: set[tuple[Place, int]] = set()

    def _open(self, place: Place, direct: bool) -> Any:
        import tensorstore

        state, block = place
        chunk = self.piece_bytes(place)
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{self._root}/{block}.{state}/"},
            "metadata": {
                "shape": [self._map.regions[place].num_bytes],
                "data_type": "uint8",
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [chunk]}},
                "codecs": [{"name": "bytes"}],
            },
            "fill_missing_data_reads": False,
            "store_data_equal_to_fill_value": True,
            "context": {
                "file_io_sync": False,
                "file_io_mode": {"mode": "direct" if direct else "default"},
                "file_io_concurrency": {"limit": FILE_THREADS},
                "data_copy_concurrency": {"limit": COPY_THREADS},
            },
        }
        return tensorstore.open(spec, create=True, open=True).result()

    def piece_bytes(self, place: Place) -> int:
        region = self._map.regions[place]
        return min(region.page_bytes, region.num_bytes, PIECE)

    def read(self, place: Place, offset: int, into: memoryview) -> None:
        target = np.frombuffer(into, np.uint8)
        if (place, offset // self.piece_bytes(place)) not in self._written:
            target[:] = 0
            return
        target[:] = self._done(self._arrays[place][offset : offset + len(target)].read())

    def write(self, place: Place, offset: int, data: memoryview) -> None:
        size, source = self.piece_bytes(place), np.frombuffer(data, np.uint8)
        start = offset - offset % size
        stop = min(start + size, self._map.regions[place].num_bytes)
        if len(source) < stop - start:  # what is around it in its chunk stays
            whole = np.empty(stop - start, np.uint8)
            self.read(place, start, memoryview(whole))  # type: ignore[arg-type]
            whole[offset - start : offset - start + len(source)] = source
            source = whole
        self._done(self._arrays[place][start:stop].write(source))
        self._written.add((place, start // size))

    @staticmethod
    def _done(future: Any) -> Any:
        try:
            return future.result()
        except Exception as error:  # what TensorStore raises for a file that is gone, or a disk that is full
            raise OSError(errno.EIO, str(error).splitlines()[0]) from error

    def close(self) -> None:
        self._arrays = {}
        shutil.rmtree(self._root, ignore_errors=True)
