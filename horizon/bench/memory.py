"""Latency and bandwidth of a memory from a set of processors: numba kernels on pinned threads, over huge pages.

Latency is that of a pointer chase: every load's address is the value of the load before it, in an order that no
prefetcher follows. Bandwidth counts the bytes that a kernel asks for; a write that fetches its line first moves more.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from horizon.bench.places import Place, Processors, together
from horizon.report.measurements import Row, Setting
from horizon.store.arena import Arena

LINE = 64  # bytes of a cache line
WORD = 8
ACCESSES = {"read": 1, "write": 1, "mixed": 3}  # words moved an element; mixed: two reads and a write
LOADER_BLOCK = 256 << 10

Words: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured."""

    size: int  # bytes of the memory that bandwidth is measured on, more than any cache
    latency_sizes: tuple[int, ...]
    loads: int  # of a pointer chase
    blocks: tuple[int, ...]  # bytes read in one go before jumping elsewhere
    pauses_us: tuple[float, ...]  # of the threads that make the load
    repeats: int


def _read(words, order, block):  # type: ignore[no-untyped-def]
    total = np.int64(0)
    for k in range(order.size):
        part = words[order[k] * block : (order[k] + 1) * block]
        for i in range(part.size):
            total += part[i]
    return total


def _write(words, order, block):  # type: ignore[no-untyped-def]
    for k in range(order.size):
        part = words[order[k] * block : (order[k] + 1) * block]
        for i in range(part.size):
            part[i] = k
    return np.int64(0)


def _mixed(words, order, block):  # type: ignore[no-untyped-def]
    half = words.size // 2
    for k in range(order.size):
        first = order[k] * block
        target, source = words[first : first + block], words[half + first : half + first + block]
        for i in range(target.size):
            target[i] += source[i]
    return np.int64(0)


def _chase(following, start, num_loads):  # type: ignore[no-untyped-def]
    place = start
    for _ in range(num_loads):
        place = following[place]
    return place


@functools.cache
def kernel(name: str) -> Callable[..., Any]:
    """A compiled kernel: read, write, mixed (over blocks in a given order), or chase."""
    functions = {"read": _read, "write": _write, "mixed": _mixed, "chase": _chase}
    words = numba.types.Array(numba.int64, 1, "C")
    arguments = (words, numba.int64, numba.int64) if name == "chase" else (words, words, numba.int64)
    compiled: Callable[..., Any] = numba.njit(numba.int64(*arguments), nogil=True)(functions[name])
    return compiled


class Memory:
    """Words on a place; a context manager.

    Raises:
        BudgetError: the place has no room.
    """

    def __init__(self, place: Place, num_bytes: int):
        self._arena = Arena([num_bytes], f"measuring {place.name}", False, place.nodes)
        region = self._arena.regions[0]
        region.zero_()  # reading pages that nobody wrote would cost nothing
        self.words: Words = region.view(torch.int64).numpy()

    def __enter__(self) -> Words:
        return self.words

    def __exit__(self, *_: object) -> None:
        del self.words
        self._arena.close()


def latency(place: Place, processors: Processors, effort: Effort) -> Iterator[Row]:
    """Idle latency of loads by the size of what is loaded from."""
    for size in effort.latency_sizes:
        with Memory(place, size) as words:
            make_cycle(words)
            values, start = [], 0
            for _ in range(effort.repeats + 1):
                seconds, start = _chase_seconds(words, start, effort.loads, processors)
                values.append(seconds / effort.loads * 1e9)
            settings: dict[str, Setting] = {"cpus": processors.name, "size": size}
            yield Row.of("latency", place.name, settings, "ns", values[1:])


def make_cycle(words: Words) -> None:
    """Fill with one cycle through all cache lines, in random order."""
    per_line = LINE // WORD
    order = np.random.default_rng(0).permutation(words.size // per_line) * per_line
    words[order] = np.roll(order, -1)


def _chase_seconds(words: Words, start: int, num_loads: int, processors: Processors) -> tuple[float, int]:
    chase, spent = kernel("chase"), []

    def work() -> None:
        started = time.perf_counter()
        place = chase(words, start, num_loads)
        spent.append((time.perf_counter() - started, place))

    together(processors.cpus[:1], [work])
    return spent[0]


def bandwidth(place: Place, processors: Processors, effort: Effort, threads: Sequence[int]) -> Iterator[Row]:
    """Bytes a second by kind of access, number of threads and block."""
    with Memory(place, effort.size) as words:
        for access in ACCESSES:
            for num_threads in threads:
                for block in effort.blocks:
                    yield _bandwidth_row(words, place, processors, effort.repeats, access, num_threads, block)


def _bandwidth_row(
    words: Words, place: Place, processors: Processors, repeats: int, access: str, num_threads: int, block: int
) -> Row:
    run, share, size = kernel(access), words.size // num_threads, block // WORD
    num_blocks = max(1, share // size // (2 if access == "mixed" else 1))
    dice = np.random.default_rng(0)
    works = []
    for i in range(num_threads):
        part, order = words[i * share : (i + 1) * share], dice.permutation(num_blocks).astype(np.int64)
        works.append(functools.partial(run, part, order, min(size, part.size)))
    moved = num_threads * num_blocks * min(size, share) * WORD * ACCESSES[access]
    values = [moved / together(processors.cpus, works) / 1e9 for _ in range(repeats + 1)]
    settings: dict[str, Setting] = {"cpus": processors.name, "access": access, "threads": num_threads, "block": block}
    return Row.of("bandwidth", place.name, settings, "GB/s", values[1:])


def loaded_latency(place: Place, processors: Processors, effort: Effort) -> Iterator[Row]:
    """Latency of one thread's loads while all other processors read from the same memory, with pauses or without."""
    num_loaders = len(processors.cpus) - 1
    with Memory(place, max(effort.latency_sizes)) as chased, Memory(place, effort.size) as loaded:
        make_cycle(chased)
        _, start = _chase_seconds(chased, 0, effort.loads, processors)
        for pause in effort.pauses_us:
            values, loads = [], []
            for _ in range(effort.repeats):
                seconds, start, moved = _under_load(chased, start, loaded, pause, effort.loads, processors)
                values.append(seconds / effort.loads * 1e9)
                loads.append(moved / seconds / 1e9)
            settings: dict[str, Setting] = {"cpus": processors.name, "loaders": num_loaders, "pause_us": pause}
            also = {"load_gb_per_s": sorted(loads)[len(loads) // 2]}
            yield Row.of("loaded latency", place.name, settings, "ns", values, also=also)


def _under_load(
    chased: Words, start: int, loaded: Words, pause_us: float, num_loads: int, processors: Processors
) -> tuple[float, int, int]:
    """(seconds of the chase, where it ended, bytes that the others have read meanwhile)."""
    chase, read, stop = kernel("chase"), kernel("read"), threading.Event()
    others, result = processors.cpus[1:], []
    size = min(LOADER_BLOCK // WORD, loaded.size)
    counts = [0] * len(others)

    def load(number: int) -> None:
        order, dice = np.zeros(1, dtype=np.int64), np.random.default_rng(number)
        turns = dice.integers(0, max(1, loaded.size // size), 4096)
        while not stop.is_set():
            order[0] = turns[counts[number] % turns.size]
            read(loaded, order, size)
            counts[number] += 1
            if pause_us:
                time.sleep(pause_us / 1e6)

    def work() -> None:
        time.sleep(0.01)  # the others are under way
        before, started = sum(counts), time.perf_counter()
        place = chase(chased, start, num_loads)
        seconds = time.perf_counter() - started
        result.append((seconds, place, (sum(counts) - before) * size * WORD))
        stop.set()

    together(processors.cpus, [work, *(functools.partial(load, i) for i in range(len(others)))])
    return result[0]
