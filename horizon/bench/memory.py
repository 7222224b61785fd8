"""Latency and bandwidth of a memory from a set of processors: numba kernels on pinned threads, over huge pages.

Latency is that of a pointer chase: every load's address is the value of the load before it, in an order that no
prefetcher follows. Bandwidth counts the bytes that a kernel asks for; a write that fetches its line first moves more.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from horizon.bench.places import Place, Processors, last_cache_bytes, require_room, together
from horizon.report.measurements import Row, Setting
from horizon.store.arena import Arena

LINE = 64  # bytes of a cache line
WORD = 8
ACCESSES = {"read": 1, "write": 1, "mixed": 3}  # words moved an element; mixed: two reads and a write
LOADER_BLOCK = 64 << 10  # bytes between two pauses
LIMIT_S = 4.0  # of one row: with memory that slow it is repeated less often
LEAST_REPEATS = 2

Words: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured."""

    size: int  # bytes of the memory that bandwidth is measured on, at least
    caches: int  # times what the processors' last caches hold: the same
    latency_sizes: tuple[int, ...]
    loads: int  # of a pointer chase
    blocks: tuple[int, ...]  # bytes read in one go before jumping elsewhere
    pauses: tuple[int, ...]  # of the threads that make the load: rounds of arithmetic after each of their blocks
    repeats: int

    def beyond_caches(self, processors: Processors) -> int:
        """Bytes of memory of which these processors' caches hold little."""
        return max(self.size, self.caches * last_cache_bytes(processors.cpus))


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


def _load(words, order, block, shared, mine, pause):  # type: ignore[no-untyped-def]
    """Reads until `shared[0]` is set, and counts its blocks in `shared[mine]`."""
    total, noise, k = np.int64(0), np.int64(1), 0
    while shared[0] == 0:
        part = words[order[k] * block : (order[k] + 1) * block]
        for i in range(part.size):
            total += part[i]
        shared[mine] += 1
        k = (k + 1) % order.size
        for _ in range(pause):
            noise ^= noise << 13
            noise ^= noise >> 7
            noise ^= noise << 17
    return total + noise


def _chase(following, start, num_loads):  # type: ignore[no-untyped-def]
    place = start
    for _ in range(num_loads):
        place = following[place]
    return place


@functools.cache
def kernel(name: str) -> Callable[..., Any]:
    """A compiled kernel: read, write, mixed (over blocks in a given order), load, or chase."""
    words, number = numba.types.Array(numba.int64, 1, "C"), numba.int64
    over_blocks = words, words, number
    kernels: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "read": (_read, over_blocks),
        "write": (_write, over_blocks),
        "mixed": (_mixed, over_blocks),
        "load": (_load, (*over_blocks, words, number, number)),
        "chase": (_chase, (words, number, number)),
    }
    function, arguments = kernels[name]
    compiled: Callable[..., Any] = numba.njit(number(*arguments), nogil=True)(function)
    return compiled


def repeated(measure: Callable[[], float], repeats: int) -> list[float]:
    """Values after a first one that takes pages and fills caches; fewer where they would take longer than `LIMIT_S`."""
    measure()
    started, values = time.perf_counter(), list[float]()
    while len(values) < repeats and (
        len(values) < LEAST_REPEATS or time.perf_counter() - started < LIMIT_S
    ):  # fmt: skip
        values.append(measure())
    return values


class Memory:
    """Words on a place; a context manager.

    Raises:
        BudgetError: the place has no room.
    """

    def __init__(self, place: Place, num_bytes: int):
        require_room(num_bytes, place)
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
    for size in sorted({*effort.latency_sizes, effort.beyond_caches(processors)}):
        with Memory(place, size) as words:
            chase = Chase(words, processors, effort.loads)
            values = repeated(lambda: chase.seconds() / effort.loads * 1e9, effort.repeats)  # noqa: B023
            settings: dict[str, Setting] = {"cpus": processors.name, "size": size}
            yield Row.of("latency", place.name, settings, "ns", values)


def make_cycle(words: Words) -> None:
    """Fill with one cycle through all cache lines, in random order."""
    per_line = LINE // WORD
    order = np.random.default_rng(0).permutation(words.size // per_line) * per_line
    words[order] = np.roll(order, -1)


class Chase:
    """A thread on the first of the processors that follows a cycle through memory, each time from where it was."""

    def __init__(self, words: Words, processors: Processors, num_loads: int):
        make_cycle(words)
        self._words, self._cpus, self._num_loads, self._place = words, processors.cpus[:1], num_loads, 0

    def run(self) -> float:
        """Seconds of `num_loads` loads, on the calling thread."""
        started = time.perf_counter()
        self._place = kernel("chase")(self._words, self._place, self._num_loads)
        return time.perf_counter() - started

    def seconds(self) -> float:
        """The same, on the processor."""
        spent = list[float]()
        together(self._cpus, [lambda: spent.append(self.run())])
        return spent[0]


def bandwidth(place: Place, processors: Processors, effort: Effort, threads: Sequence[int]) -> Iterator[Row]:
    """Bytes a second by kind of access, number of threads and block."""
    with Memory(place, effort.beyond_caches(processors)) as words:
        for access in ACCESSES:
            for num_threads in threads:
                for block in effort.blocks:
                    if _blocks_of(words, access, num_threads, block):
                        yield _bandwidth_row(words, place, processors, effort.repeats, access, num_threads, block)


def _blocks_of(words: Words, access: str, num_threads: int, block: int) -> int:
    """How many blocks a thread works on: `mixed` has half of its share to read from, and half to update."""
    return words.size // num_threads // (block // WORD) // (2 if access == "mixed" else 1)


def _bandwidth_row(
    words: Words, place: Place, processors: Processors, repeats: int, access: str, num_threads: int, block: int
) -> Row:
    run, share, size = kernel(access), words.size // num_threads, block // WORD
    num_blocks, dice = _blocks_of(words, access, num_threads, block), np.random.default_rng(0)
    works = []
    for i in range(num_threads):
        order = dice.permutation(num_blocks).astype(np.int64)
        works.append(functools.partial(run, words[i * share : (i + 1) * share], order, size))
    moved = num_threads * num_blocks * block * ACCESSES[access]
    values = repeated(lambda: moved / together(processors.cpus, works) / 1e9, repeats)
    settings: dict[str, Setting] = {"cpus": processors.name, "access": access, "threads": num_threads, "block": block}
    return Row.of("bandwidth", place.name, settings, "GB/s", values)


def loaded_latency(place: Place, processors: Processors, effort: Effort) -> Iterator[Row]:
    """Latency of one thread's loads while all other processors read from the same memory, with pauses or without."""
    size = effort.beyond_caches(processors)
    with Memory(place, size) as chased, Memory(place, size) as loaded:
        chase = Chase(chased, processors, effort.loads)
        for pause in effort.pauses:
            loads = list[float]()

            def nanoseconds(pause: int = pause, loads: list[float] = loads) -> float:
                seconds, moved = _under_load(chase, loaded, pause, processors)
                loads.append(moved / seconds / 1e9)
                return seconds / effort.loads * 1e9

            values = repeated(nanoseconds, effort.repeats)
            settings: dict[str, Setting] = {
                "cpus": processors.name, "loaders": len(processors.cpus) - 1, "pause": pause,
            }  # fmt: skip
            also = {"load_gb_per_s": statistics.median(loads[1:])}
            yield Row.of("loaded latency", place.name, settings, "ns", values, also=also)


def _under_load(chase: Chase, loaded: Words, pause: int, processors: Processors) -> tuple[float, int]:
    """(seconds of the chase, bytes that the others have read meanwhile); the others run without Python's lock."""
    read, size, cpus = kernel("load"), min(LOADER_BLOCK // WORD, loaded.size), processors.cpus
    shared, result = np.zeros(len(cpus) * LINE // WORD, dtype=np.int64), list[tuple[float, int]]()  # a line for each
    counts = shared[LINE // WORD :: LINE // WORD]

    def load(number: int) -> None:
        order = np.random.default_rng(number).permutation(loaded.size // size).astype(np.int64)
        read(loaded, order, size, shared, (number + 1) * LINE // WORD, pause)

    def work() -> None:
        try:
            while not counts.all():  # until each is under way
                time.sleep(1e-3)
            before = counts.sum()
            seconds = chase.run()
            result.append((seconds, int(counts.sum() - before) * size * WORD))
        finally:
            shared[0] = 1

    together(cpus, [work, *(functools.partial(load, i) for i in range(len(cpus) - 1))])
    return result[0]
