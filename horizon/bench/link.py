"""Copies between a GPU and each memory of the host, pinned and pageable."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch

from horizon.bench.places import Place
from horizon.report.measurements import Row
from horizon.store.arena import Arena
from horizon.stream.streams import Streams


def link(place: Place, sizes: Sequence[int], repeats: int) -> Iterator[Row]:
    """Rows by direction, kind of memory and bytes in one copy; needs a CUDA device."""
    streams = Streams.on(torch.device("cuda", torch.cuda.current_device()))
    for pin in (True, False):
        for size in sizes:
            arena = Arena([size], f"measuring {place.name}", pin, place.nodes)
            try:
                host, device = arena.regions[0].zero_(), streams.empty(size, dtype=torch.uint8)
                for direction, target, source in (("H2D", device, host), ("D2H", host, device)):
                    stream = streams.fetch if direction == "H2D" else streams.drain
                    values = []
                    for _ in range(repeats + 1):
                        streams.synchronize()
                        started = time.perf_counter()
                        streams.copy(stream, target, source)
                        streams.synchronize()
                        values.append(size / (time.perf_counter() - started) / 1e9)
                    settings = {"direction": direction, "memory": "pinned" if pin else "pageable", "size": size}
                    yield Row.of("link", place.name, settings, "GB/s", values[1:])
            finally:
                streams.synchronize()
                arena.close()
