"""What reading a checkpoint back takes: an engine saves one, another restores it several times; raw reads beside it.

    python profiling/loading.py --shape qwen2.5-3b --folder /scratch
    python profiling/loading.py --shape qwen2.5-0.5b --device cpu --folder /dev/shm/loading

A row for each time. The first one fills memory that nobody has touched yet, where the device does not have it pinned;
the later ones are what reading itself takes. `cpu_s` is processor time of all threads, `system_s` of that in the
kernel, where new memory counts, too. The raw speed is that of direct reads of the same files, 8 at a time.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import queue
import resource
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from step import SHAPES, facts

import horizon
from horizon.units import GIB, MIB

BLOCK, THREADS = 64 * MIB, 8


def raw_reads(folder: Path) -> float:
    """Bytes per second of direct reads of all chunks into buffers that are there already; the better of two."""
    buffers: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
    for _ in range(THREADS):
        buffers.put(mmap.mmap(-1, BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE))

    def read(path: Path) -> int:
        buffer, descriptor = buffers.get(), os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            return os.preadv(descriptor, [buffer], 0)
        finally:
            os.close(descriptor)
            buffers.put(buffer)

    speeds, paths = [], [*folder.glob("arrays/*/*/c*")]
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(2):
            began = time.perf_counter()
            num_bytes = sum(pool.map(read, paths))
            speeds.append(num_bytes / (time.perf_counter() - began))
    return max(speeds)


def processor() -> tuple[float, float]:
    """Seconds of all threads so far: (everything, in the kernel)."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime, used.ru_stime


def measure(args: argparse.Namespace) -> list[dict]:
    """A row for each time that the checkpoint was restored."""
    folder, rows = args.folder / "checkpoint", []
    with horizon.Engine.from_config(SHAPES[args.shape], device=args.device, self_check=False) as engine:
        row = engine.save_checkpoint(folder).wait()
        raw = raw_reads(folder)
        print(f"{row.num_bytes / GIB:.2f} GiB; raw reads {raw / 1e9:.2f} GB/s", flush=True)
    with horizon.Engine.from_config(SHAPES[args.shape], device=args.device, self_check=False) as engine:
        for number in range(args.times):
            before, began = processor(), time.perf_counter()
            engine.restore(folder)
            seconds = time.perf_counter() - began
            cpu_s, system_s = (now - then for now, then in zip(processor(), before, strict=True))
            rows.append(
                {"system": "loading", "time": number, "num_bytes": row.num_bytes, "seconds": seconds,
                 "bytes_per_s": row.num_bytes / seconds, "cpu_s": cpu_s, "system_s": system_s,
                 "raw_disk_bytes_per_s": raw, "load": os.getloadavg()[0]}
            )  # fmt: skip
            print(f"{seconds:.2f} s, {row.num_bytes / seconds / 1e9:.2f} GB/s, processor {cpu_s:.2f} s", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-3b")
    parser.add_argument("--folder", type=Path, default=Path("loading-bench"), help="on the disk to measure")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--out", type=Path, help="append the rows (JSON lines) here")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    try:
        rows = [{"shape": args.shape, "device": args.device, **row, **facts()} for row in measure(args)]
    finally:
        shutil.rmtree(args.folder / "checkpoint", ignore_errors=True)
    if args.out:
        with args.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
