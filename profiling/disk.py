"""Time the engines of the nvme tier against raw access to the same disk.

    python profiling/disk.py --dir /path/on/the/disk --gib 4 --out results.jsonl

Raw: threads that read and write a preallocated file past the page cache, 16 MiB a call, with nothing around them. The
engines move what updates move: pages of an fp32 state (32 MiB), as many at a time as an update stages, through the
tier's own threads. `together` reads and writes at the same time, as steps do, and counts both. Rates are the best of
some rounds in which raw and engines take turns, because disks that others use are not the same from one second to the
next; the first writing of a file, which costs some file systems more, is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from step import facts

from horizon.config.schema import NvmeEngine
from horizon.plan.disk import UPDATE_PAGES, DiskMap, Region
from horizon.store.arena import Arena
from horizon.store.disk import PIECE
from horizon.store.nvme import Move, NvmeTier, open_nvme
from horizon.store.zarr import has_tensorstore
from horizon.units import GIB, MIB

PAGE = 32 * MIB
STATE = "exp_avg", 0
WRITES = {"read": (False,), "write": (True,), "together": (False, True)}


class Raw:
    """Calls to the system, on threads that each have a buffer in huge pages."""

    name = "raw"

    def __init__(self, folder: Path, num_bytes: int, num_threads: int):
        path = folder / f"raw-{os.getpid()}"
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600)
        path.unlink()
        os.posix_fallocate(self._fd, 0, num_bytes)
        self._num_bytes, self._pool = num_bytes, ThreadPoolExecutor(num_threads)
        self._buffers: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._memory = Arena([PIECE] * num_threads, "raw", pin=False)
        for region in self._memory.regions:
            region.copy_(torch.randint(0, 256, (PIECE,), dtype=torch.uint8))
            self._buffers.put(memoryview(region.numpy()))

    def _call(self, start: int, write: bool) -> None:
        buffer = self._buffers.get()
        done = (os.pwritev if write else os.preadv)(self._fd, [buffer], start)
        assert done == PIECE, done
        self._buffers.put(buffer)

    def move(self, writes: tuple[bool, ...]) -> None:
        calls = [(start, write) for start in range(0, self._num_bytes, PIECE) for write in writes]
        list(self._pool.map(lambda call: self._call(*call), calls))

    def close(self) -> None:
        self._pool.shutdown()
        os.close(self._fd)
        self._memory.close()


class Engine:
    """The tier with one of its engines."""

    def __init__(self, folder: Path, num_bytes: int, engine: NvmeEngine):
        self.name = str(engine)
        self._num_bytes = num_bytes
        self._tier: NvmeTier = open_nvme(str(folder), engine, DiskMap({STATE: Region(0, num_bytes, PAGE)}, num_bytes))
        self._staging = Arena([PAGE] * UPDATE_PAGES, "staging", pin=False)
        for region in self._staging.regions:
            region.copy_(torch.randint(0, 256, (PAGE,), dtype=torch.uint8))

    def move(self, writes: tuple[bool, ...]) -> None:
        free: queue.SimpleQueue[torch.Tensor | BaseException] = queue.SimpleQueue()
        for region in self._staging.regions:
            free.put(region)
        for start in range(0, self._num_bytes, PAGE):
            for write in writes:
                page = self._take(free)
                self._tier.start([Move(STATE, start, page, write)], lambda e, page=page: free.put(e or page))
        for _ in self._staging.regions:
            self._take(free)

    @staticmethod
    def _take(free: queue.SimpleQueue[torch.Tensor | BaseException]) -> torch.Tensor:
        page = free.get()
        if isinstance(page, BaseException):
            raise page
        return page

    def close(self) -> None:
        self._tier.close()
        self._staging.close()


def seconds(work: Callable[[], None]) -> tuple[float, float]:
    """(wall, processor) seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def measure(folder: Path, num_bytes: int, rounds: int, num_threads: int) -> Iterator[dict]:
    """A row for each engine and kind of access."""
    engines = [NvmeEngine.direct, *([NvmeEngine.tensorstore] if has_tensorstore() else [])]
    parts = [Raw(folder, num_bytes, num_threads), *(Engine(folder, num_bytes, engine) for engine in engines)]
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for part in parts:
        part.move((True,))
    for number in range(rounds):
        for what, writes in WRITES.items():
            for part in parts if number % 2 else reversed(parts):
                found.setdefault((part.name, what), []).append(seconds(lambda p=part, w=writes: p.move(w)))
    for part in parts:
        part.close()
    for (name, what), times in found.items():
        wall, processor = min(times)
        moved = num_bytes * len(WRITES[what])
        raw = moved / min(found["raw", what])[0]
        yield {
            "engine": name, "what": what, "gb_per_s": moved / wall / 1e9, "of_raw": moved / wall / raw,
            "cores": processor / wall, "gib": num_bytes / GIB, "rounds": rounds,
            "all_gb_per_s": [moved / one / 1e9 for one, _ in times],
        }  # fmt: skip


def main() -> None:
    """Print the rows, and append them to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="a folder on the disk")
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=4, help="of raw access")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    num_bytes = max(int(args.gib * GIB) // PAGE, 1) * PAGE
    print(f"{'engine':<14}{'what':<10}{'GB/s':>7}{'of raw':>8}{'cores':>7}")
    for row in measure(args.dir, num_bytes, args.rounds, args.threads):
        print(f"{row['engine']:<14}{row['what']:<10}{row['gb_per_s']:>7.2f}{row['of_raw']:>8.2f}{row['cores']:>7.2f}")
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps({**facts(), **row}) + "\n")


if __name__ == "__main__":
    main()
