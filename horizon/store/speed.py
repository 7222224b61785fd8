"""How fast the nvme tier moves states: tried on its own engine and threads, in pieces as its states have them."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import lru_cache

from horizon.config.schema import NvmeEngine
from horizon.errors import HorizonError
from horizon.plan.cost import DiskRates
from horizon.plan.disk import DiskMap, Region
from horizon.store.arena import Arena
from horizon.store.nvme import Move, NvmeTier, open_nvme
from horizon.units import MIB

logger = logging.getLogger(__name__)

SAMPLE = 128 * MIB  # that is moved at a time, at most
BUFFER = 32 * MIB  # a page of an fp32 state
TIMES = 2  # each way, the better of which counts


def measure_disk(tier: NvmeTier, disk_map: DiskMap) -> DiskRates:
    """The speed of a tier whose states hold nothing yet: zeros before and after.

    Raises:
        TierError: the disk does not do it.
    """
    arena = Arena([BUFFER], "measuring the disk", pin=False)
    buffer, left, writes = arena.regions[0], SAMPLE, list[Move]()
    for place, region in disk_map.regions.items():
        size = min(region.num_bytes, region.page_bytes, BUFFER, left)
        writes += [Move(place, 0, buffer[:size], True)] if size else []
        left -= size
    try:
        buffer.fill_(1)  # some disks have a quicker way with zeros
        tier.run(writes)  # what was never written is slow to write, and quick to read
        write = _bytes_per_s(tier, writes)
        read = _bytes_per_s(tier, [move._replace(write=False) for move in writes])
        buffer.zero_()
        tier.run(writes)
    finally:
        arena.close()
    return DiskRates(read, write)


def _bytes_per_s(tier: NvmeTier, moves: Sequence[Move]) -> float:
    best = 0.0
    for _ in range(TIMES):
        started = time.perf_counter()
        tier.run(moves)
        seconds = max(time.perf_counter() - started, 1e-9)
        best = max(best, sum(move.data.numel() for move in moves) / seconds)
    return best


@lru_cache(maxsize=8)
def probe_disk(folder: str, engine: NvmeEngine, num_bytes: int = SAMPLE) -> DiskRates | None:
    """The speed of a tier in a folder, on a file that is gone afterwards; None, with a warning, where it cannot be had.

    Measured once per process.
    """
    regions = {(f"piece {start}", 0): Region(start, BUFFER, BUFFER) for start in range(0, num_bytes, BUFFER)}
    disk_map = DiskMap(regions, num_bytes)
    try:
        tier = open_nvme(folder, engine, disk_map)
        try:
            return measure_disk(tier, disk_map)
        finally:
            tier.close()
    except HorizonError as error:
        logger.warning("the disk's speed is not known: %s", error)
        return None
