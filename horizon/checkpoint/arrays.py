"""Arrays written to disk, chunk by chunk, through TensorStore: zarr3, little-endian, a crc32c behind every chunk.

Chunks are written past the page cache where the file system allows it, for the machine needs its memory for other
things, and are on disk when `finish` returns. TensorStore is imported with the first array.
`horizon.checkpoint.reading` reads them.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from horizon.checkpoint.format import CHUNK_BYTES, MANIFEST, ArraySpec, Chunk
from horizon.errors import CheckpointError, one_line
from horizon.optim.threads import available_cores
from horizon.units import MIB

# Being encoded or written; each may hold a second copy of itself. A fast disk wants many: on 16 cores 4 of them reached
# 0.65 of what raw writes reach, 16 of them 0.93.
CHUNKS_IN_FLIGHT = max(4, min(16, available_cores()))
LIBRARY_BYTES = 48 * MIB  # of code and small things, measured
_IO_THREADS, _COPY_THREADS = CHUNKS_IN_FLIGHT, CHUNKS_IN_FLIGHT // 2

Array = NDArray[Any]


class _Job(NamedTuple):
    spec: ArraySpec
    chunk: Chunk | None  # None: only create the array
    values: Tensor | None
    done: Callable[[], None]


class ArrayWriter:
    """Writes chunks of arrays into a checkpoint's folder, behind whoever asks for it, on threads of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stores: dict[ArraySpec, Any] = {}
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()  # None: the end, for one thread
        self._error: CheckpointError | None = None
        can_be_direct(folder)  # found out once, before several threads ask
        names = (f"horizon-checkpoint-write-{number}" for number in range(CHUNKS_IN_FLIGHT))
        self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    def create(self, spec: ArraySpec) -> None:
        """Have the array on disk even if it has no chunk."""
        self._jobs.put(_Job(spec, None, None, lambda: None))

    def write(self, spec: ArraySpec, chunk: Chunk, values: Tensor, done: Callable[[], None]) -> None:
        """Ask for a chunk to be written; `values`, in its shape, must not change until `done` is called.

        May be called from any thread, and calls `done` from others.

        Raises:
            CheckpointError: an earlier chunk could not be written; `done` will not be called.
        """
        self._raise_if_failed()
        self._jobs.put(_Job(spec, chunk, values, done))

    def give_up(self, error: CheckpointError) -> None:
        """Write nothing more of what was asked for, and fail with `error`."""
        self._error = self._error or error

    def finish(self) -> None:
        """Return when everything is on disk; nothing may be asked for any more. Idempotent.

        Raises:
            CheckpointError: something is not.
        """
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._raise_if_failed()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self._error is None:
                    self._do(job)
            except Exception as error:  # TensorStore's are of several kinds
                place = self._folder / job.spec.folder / ("" if job.chunk is None else job.chunk.file)
                failure = CheckpointError(
                    f"the checkpoint could not be written, {place}: {one_line(error)}; training can go on, and "
                    "earlier checkpoints are as they were"
                )
                failure.__cause__ = error
                self.give_up(failure)
            job.done()

    def _do(self, job: _Job) -> None:
        store = self._stores.get(job.spec)
        if store is None:  # another thread may be opening it, too, which does no harm
            store = self._stores[job.spec] = open_array(self._folder, job.spec, create=True)
        if job.chunk is not None and job.values is not None:
            values = as_array(job.values)
            store[job.chunk.index].write(values, can_reference_source_data_indefinitely=True).result()

    def _raise_if_failed(self) -> None:
        if self._error is not None:
            raise self._error


def open_array(folder: Path, spec: ArraySpec, create: bool = False) -> Any:
    """A TensorStore array of a checkpoint; what its zarr.json says must be what `spec` says."""
    import tensorstore

    return tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{folder}/{spec.folder}/"},
            "metadata": spec.zarr_metadata(),
            "store_data_equal_to_fill_value": True,
        },
        context=_context(can_be_direct(folder)),
        open=True,
        create=create,
    ).result()


@cache
def _context(direct: bool) -> Any:
    import tensorstore

    return tensorstore.Context(
        {
            "file_io_concurrency": {"limit": _IO_THREADS},
            "data_copy_concurrency": {"limit": _COPY_THREADS},
            "file_io_mode": {"mode": "direct" if direct else "default"},
        }
    )


@cache
def can_be_direct(folder: Path) -> bool:
    """Whether files in a checkpoint's folder can be read and written past the page cache: not on every file system."""
    probe = folder / MANIFEST
    is_new = not probe.exists()
    try:
        os.close(os.open(probe, os.O_DIRECT | (os.O_CREAT | os.O_WRONLY if is_new else os.O_RDONLY)))
    except OSError:
        return False
    finally:
        if is_new:
            probe.unlink(missing_ok=True)
    return True


def as_array(values: Tensor) -> Array:
    """A numpy view of a CPU tensor, in the data type that TensorStore knows it by."""
    if values.dtype is torch.bfloat16:
        import ml_dtypes

        return values.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return values.numpy()


def writing_bytes(num_bytes: int) -> int:
    """Host memory that TensorStore takes while a checkpoint of `num_bytes` is written, its code included."""
    return LIBRARY_BYTES + min(CHUNKS_IN_FLIGHT * CHUNK_BYTES, num_bytes)


def load_library() -> None:
    """Load TensorStore now, and not when a step would wait for it."""
    _context(True)
