"""Time the optimizer's update on the host against what its memory gives, for every format of the moments.

    python profiling/update.py --threads 4 8 12 15 16 --out results.jsonl

The yardstick is a sweep that reads and writes three fp32 arrays in place. The update is the real one: blocks in the
host store, gradients kept in bf16, chunks taken by the updater's threads, from `submit` until the last block is
published. GB/s count what an update has to read and write (26, 18 and 14.25 bytes a parameter). Medians, after one step
for warm-up; 1e9 parameters need 16 GB, and a minute on 16 cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numba
import numpy as np
import torch
from step import facts

from horizon.config.schema import Moments
from horizon.layout import ParamSpec, place_block
from horizon.optim.adamw import AdamW
from horizon.optim.states import UpdateStates, traffic, update_order
from horizon.optim.updater import CHUNK_ELEMENTS, Updater
from horizon.store.gradients import KeptGradients
from horizon.store.host import HostStore

BLOCK = 233_000_000  # parameters: a layer of a 7B model
WIDTH = 4096


@numba.njit(nogil=True)
def _sweep(a, b, c, value):
    for i in range(a.size):
        a[i] += value
        b[i] += value
        c[i] += value


def on_threads(num_threads: int, work: Callable[[int], None], num_items: int) -> None:
    """`work(i)` for each item, taken by threads one after another."""
    items, lock = iter(range(num_items)), threading.Lock()

    def take() -> None:
        while True:
            with lock:
                item = next(items, None)
            if item is None:
                return
            work(item)

    threads = [threading.Thread(target=take) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def seconds(work: Callable[[], None], repeats: int) -> float:
    """Median, after one for warm-up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def sweep(num_parameters: int, threads: list[int], repeats: int) -> Iterator[dict]:
    """Bandwidth of the yardstick; the arrays hold as much as the update's float32 moments do."""
    layout = place_block(0, "all", [ParamSpec("all", "all", (num_parameters,))])
    store = HostStore([layout], pin=False, pin_residual=False)
    halves = store.moments["exp_avg"][0].numpy(), store.moments["exp_avg_sq"][0].numpy()
    size = num_parameters // 2
    arrays = halves[0][:size], halves[0][size : 2 * size], halves[1][:size]
    chunks = -(-size // CHUNK_ELEMENTS)

    def piece(i: int) -> None:
        span = slice(i * CHUNK_ELEMENTS, (i + 1) * CHUNK_ELEMENTS)
        _sweep(*(array[span] for array in arrays), np.float32(1))

    piece(0)
    for num_threads in threads:
        took = seconds(lambda n=num_threads: on_threads(n, piece, chunks), repeats)
        yield {"what": "sweep", "threads": num_threads, "seconds": took, "gb_per_s": 24 * size / took / 1e9}
    store.close()


def update(moments: Moments, num_parameters: int, threads: list[int], repeats: int) -> Iterator[dict]:
    """Speed of the update with one format."""
    num_blocks = max(1, round(num_parameters / BLOCK))
    rows = num_parameters // num_blocks // WIDTH
    layouts = [
        place_block(i, f"block.{i}", [ParamSpec(f"{i}.w", "w", (rows, WIDTH)), ParamSpec(f"{i}.n", "n", (WIDTH,))])
        for i in range(num_blocks)
    ]
    num_parameters = sum(layout.num_trainable for layout in layouts)
    store = HostStore(layouts, pin=False, pin_residual=False, moments=moments)
    grads = KeptGradients(layouts, torch.bfloat16, pin=False)
    some = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    for layout in layouts:
        for tensor, size in ((store.weights[layout.index], 0.02), (grads.claim(layout.index), 1e-3)):
            for part in tensor.split(some.numel()):
                part.copy_(some[: part.numel()] * size)

    def states(block: int) -> UpdateStates:
        return UpdateStates.of_tensors(**store.states(block), grads=grads.claim(block))

    moved, step = sum(traffic(states(layout.index).arrays(), update_order(moments)) for layout in layouts), 0
    for num_threads in threads:
        updater = Updater(layouts, states, store.ledger, AdamW(moments=moments), num_threads, lambda _: None)

        def one(updater: Updater = updater) -> None:
            nonlocal step
            step += 1
            updater.submit(step, 1e-5, 1.0)
            updater.wait()

        took = seconds(one, repeats)
        updater.close()
        yield {
            "what": moments.value, "threads": num_threads, "seconds": took, "gparam_per_s": num_parameters / took / 1e9,
            "ns_per_parameter_and_thread": took * num_threads / num_parameters * 1e9,
            "bytes_per_parameter": moved / num_parameters, "gb_per_s": moved / took / 1e9,
        }  # fmt: skip
    grads.close()
    store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--parameters", type=float, default=1e9)
    parser.add_argument("--moments", nargs="+", type=Moments, default=list(Moments))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="append result rows (JSON lines) here")
    args = parser.parse_args()
    shared, num_parameters = facts(), int(args.parameters)
    best: dict[int, float] = {}

    def show(row: dict) -> None:
        best.setdefault(row["threads"], row["gb_per_s"])
        row["of_sweep"] = row["gb_per_s"] / best[row["threads"]]
        print(json.dumps(row), flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps({**row, "parameters": num_parameters, **shared}) + "\n")

    for row in sweep(num_parameters, args.threads, args.repeats):
        show(row)
    for moments in args.moments:
        for row in update(moments, num_parameters, args.threads, args.repeats):
            show(row)


if __name__ == "__main__":
    main()
