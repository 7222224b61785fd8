"""Arrays read back from disk: some chunks at a time, each checked before anybody sees its numbers.

    disk -> room -> checksum -> whoever wants the numbers, all on one thread; other threads have other chunks

Files of chunks are read as `docs/checkpoint-format.md` describes them, past the page cache where the file system allows
it, into rooms that serve again for later chunks. TensorStore would give each chunk in new memory, by way of more new
memory, and that costs more than to read, check and copy it. What zarr.json must say is still TensorStore's to compare.

Invariant: there are `NUM_ROOMS` of them at most, whatever the size of the arrays.
"""

from __future__ import annotations

import errno
import os
import queue
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from horizon.checkpoint.arrays import CHUNKS_IN_FLIGHT, can_be_direct, open_array
from horizon.checkpoint.format import CRC_BYTES, DTYPES, ArraySpec, Chunk
from horizon.errors import CheckpointError, one_line
from horizon.store.arena import Arena
from horizon.units import align_up

# For a chunk of 64 MiB each. A thread needs 0.8 s of processor time for a GB, so that 4 keep up with most disks; on
# two cores 8 were no faster, and 16 slower.
NUM_ROOMS = max(4, CHUNKS_IN_FLIGHT // 2)
ALIGN = 4096  # of direct I/O

Use: TypeAlias = Callable[[int, Tensor], None]  # called with the first number's place in the flat array, and numbers


def read_arrays(folder: Path, reads: Iterable[tuple[ArraySpec, Use]]) -> None:
    """Read whole arrays and hand the numbers of each, chunk by chunk and flat, to its `Use`.

    That is called by several threads at once, in any order, and may keep the numbers until it returns. On an error, or
    Ctrl-C, chunks that are under way are finished and no other is begun.

    Raises:
        CheckpointError: naming the first array, in the order of `reads`, that is missing or damaged.
        What a `Use` raises, if no chunk before failed.
    """
    jobs = [(spec, chunk, use) for spec, use in reads for chunk in spec.chunks or (None,)]
    num_rooms = min(NUM_ROOMS, max(len(jobs), 1))
    room_bytes = max((_room_bytes(spec) for spec, _, _ in jobs), default=0)
    rooms: queue.SimpleQueue[Tensor] = queue.SimpleQueue()

    def work(job: tuple[ArraySpec, Chunk | None, Use]) -> None:
        spec, chunk, use = job
        room = rooms.get()
        try:
            _check_metadata(folder, spec)
            if chunk is not None:
                use(chunk.start, _read(folder, spec, chunk, room))
        finally:
            rooms.put(room)

    with closing(Arena([room_bytes] * num_rooms, "reading a checkpoint", pin=False)) as arena:
        for region in arena.regions:
            rooms.put(region)
        with ThreadPoolExecutor(num_rooms, "horizon-checkpoint-read") as pool:
            for _ in pool.map(work, jobs):  # in order: the first error comes first; leaving it cancels the rest
                pass


def read_chunks(folder: Path, spec: ArraySpec) -> Iterator[tuple[int, Tensor]]:
    """One array's chunks in order, as a `Use` gets them: numbers stay until the next ones are asked for.

    Raises:
        CheckpointError: naming the array, which is missing or damaged.
    """
    _check_metadata(folder, spec)
    with closing(Arena([_room_bytes(spec)], "reading a checkpoint", pin=False)) as arena:
        for chunk in spec.chunks:
            yield chunk.start, _read(folder, spec, chunk, arena.regions[0])


def _room_bytes(spec: ArraySpec) -> int:
    return align_up(spec.chunk_file_bytes, ALIGN)


def _check_metadata(folder: Path, spec: ArraySpec) -> None:
    try:
        open_array(folder, spec)
    except (ValueError, OSError) as error:
        raise damaged(folder, spec, one_line(error)) from error


def _read(folder: Path, spec: ArraySpec, chunk: Chunk, room: Tensor) -> Tensor:
    """The numbers of a chunk, in `room`, as they were written."""
    from horizon.checkpoint.crc32c import crc32c  # here: listing checkpoints has no use for numba

    size = spec.chunk_file_bytes
    try:
        _fill(room, folder / spec.folder / chunk.file, size, can_be_direct(folder))
    except OSError as error:
        raise damaged(folder, spec, one_line(error)) from error
    numbers, checksum = room[: size - CRC_BYTES], room[size - CRC_BYTES : size]
    if crc32c(numbers.numpy()) != int.from_bytes(checksum.numpy().tobytes(), "little"):
        raise damaged(folder, spec, f"{chunk.file} does not match its checksum")
    return numbers.view(DTYPES[spec.dtype])[: chunk.stop - chunk.start]  # behind them: what fills the last chunk up


def _fill(room: Tensor, path: Path, size: int, direct: bool) -> None:
    """Have the file's first `size` bytes in `room`; direct I/O asks for whole blocks, and stops where the file does."""
    descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    try:
        view, done = memoryview(room.numpy()), 0  # type: ignore[arg-type]
        while done < size:
            num_bytes = os.preadv(descriptor, [view[done:]], done)
            if not num_bytes:
                raise OSError(errno.EIO, f"it has {done} bytes instead of {size}", str(path))
            done += num_bytes
    finally:
        os.close(descriptor)


def check_files(folder: Path, spec: ArraySpec) -> None:
    """Raise a CheckpointError if a chunk's file is missing or has not the size that it must have."""
    for chunk in spec.chunks:
        try:
            size = (folder / spec.folder / chunk.file).stat().st_size
        except OSError as error:
            raise damaged(folder, spec, f"{chunk.file}: {error.strerror}") from error
        if size != spec.chunk_file_bytes:
            raise damaged(folder, spec, f"{chunk.file} has {size} bytes instead of {spec.chunk_file_bytes}")


def damaged(folder: Path, spec: ArraySpec, what: str) -> CheckpointError:
    """The error for an array that cannot be read."""
    return CheckpointError(f"{folder} is damaged at {spec.name} ({spec.kind}): {what}; use an earlier checkpoint")
