"""Copies between a GPU and each memory of the host, pinned and pageable, one at a time, and within the GPU's own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch

from horizon.bench.places import Place, require_room
from horizon.errors import BudgetError
from horizon.report.measurements import Row, Setting, Skipped
from horizon.store.arena import Arena
from horizon.stream.streams import Streams
from horizon.units import format_bytes

BATCH = 8  # copies within the device between two looks at the clock: one is as short as a launch
UNPINNED = "CUDA refuses to register it; raise ulimit -l, or the container's memlock limit"


def link(place: Place, streams: Streams, sizes: Sequence[int], repeats: int) -> Iterator[Row | Skipped]:
    """Rows by direction, kind of memory and bytes in one copy, or why memory cannot be pinned.

    The time is from before a copy is issued to when its end is known: small copies are mostly that.

    Raises:
        BudgetError: host or device has no room.
    """
    for pin in (True, False):
        for size in sizes:
            require_room(size, place)
            _require_device_room(streams, size)
            arena = Arena([size], f"measuring {place.name}", pin, place.nodes)
            try:
                if pin and not arena.pinned:
                    yield Skipped(test="link", place=f"{place.name}, pinned", reason=UNPINNED)
                    break
                yield from _copies(place, streams, arena, size, repeats)
            finally:
                streams.synchronize()
                arena.close()
    streams.release_memory()


def within(streams: Streams, size: int, repeats: int) -> Iterator[Row]:
    """A row of copies from device memory to device memory: bytes that are read, and as many that are written.

    Raises:
        BudgetError: the device has no room.
    """
    _require_device_room(streams, 2 * size)
    source, target = (streams.empty(size, dtype=torch.uint8) for _ in range(2))
    values = []
    for _ in range(repeats + 1):
        streams.synchronize()
        started = time.perf_counter()
        for _ in range(BATCH):
            target.copy_(source)
        streams.synchronize()
        values.append(2 * BATCH * size / (time.perf_counter() - started) / 1e9)
    yield Row.of("hbm", "hbm", {"size": size}, "GB/s", values[1:])
    del source, target
    streams.release_memory()


def _require_device_room(streams: Streams, size: int) -> None:
    """Raise a BudgetError where the device has no room; what was tried is kept for what comes next."""
    try:
        streams.empty(size, dtype=torch.uint8)
    except torch.OutOfMemoryError as error:
        raise BudgetError(f"the device has no room for {format_bytes(size)}; stop what else runs on it") from error


def _copies(place: Place, streams: Streams, arena: Arena, size: int, repeats: int) -> Iterator[Row]:
    host, device = arena.regions[0].zero_(), streams.empty(size, dtype=torch.uint8)
    for direction, stream, target, source in (
        ("H2D", streams.fetch, device, host), ("D2H", streams.drain, host, device),
    ):  # fmt: skip
        values = []
        for _ in range(repeats + 1):  # the first makes what the driver needs
            streams.synchronize()
            started = time.perf_counter()
            streams.copy(stream, target, source)
            streams.synchronize()
            values.append(size / (time.perf_counter() - started) / 1e9)
        settings: dict[str, Setting] = {
            "direction": direction, "memory": "pinned" if arena.pinned else "pageable", "size": size,
        }  # fmt: skip
        yield Row.of("link", place.name, settings, "GB/s", values[1:])
