import functools
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from horizon.bench import memory, places
from horizon.bench.memory import Effort, Memory, bandwidth, kernel, latency, loaded_latency, make_cycle, repeated
from horizon.bench.places import (
    Place,
    Processors,
    find_places,
    find_processors,
    last_cache_bytes,
    require_room,
    together,
)
from horizon.errors import BudgetError
from horizon.plan.topology import Node, Topology, read_topology
from horizon.units import GIB, KIB, MIB

TINY = Effort(
    size=256 * KIB, caches=0, latency_sizes=(8 * KIB, 64 * KIB), loads=2000, blocks=(4 * KIB, 64 * KIB),
    pauses=(1000, 0), repeats=2,
)  # fmt: skip
HERE = find_processors(read_topology())[0]
DRAM = Place("dram node 0")


def test_a_chase_visits_every_line_once_before_it_is_back():
    words = np.zeros(8 * 100, dtype=np.int64)
    make_cycle(words)
    chase, seen, place = kernel("chase"), [], 0
    for _ in range(100):
        seen.append(place)
        place = chase(words, place, 1)
    assert place == 0 and sorted(seen) == list(range(0, 800, 8))
    assert chase(words, 0, 100) == 0 and chase(words, 0, 99) == seen[-1]
    assert np.abs(np.diff(seen)).min() > 0 and len(set(np.diff(seen))) > 20  # no stride to follow


def test_kernels_touch_the_blocks_they_are_given_and_no_others():
    words, some = np.arange(64, dtype=np.int64), np.array([3, 1], dtype=np.int64)
    assert kernel("read")(words, some, 8) == words[8:16].sum() + words[24:32].sum()
    kernel("write")(words, some, 8)
    assert list(words[24:32]) == [0] * 8 and list(words[8:16]) == [1] * 8
    assert list(words[:8]) == list(range(8)) and list(words[32:]) == list(range(32, 64))
    before = words.copy()
    kernel("mixed")(words, np.array([2], dtype=np.int64), 8)
    before[16:24] += before[48:56]
    assert np.array_equal(words, before)


def test_a_load_runs_without_pythons_lock_counts_its_blocks_and_ends_when_told():
    words, order, shared = np.ones(64, dtype=np.int64), np.array([1, 0]), np.zeros(16, dtype=np.int64)
    thread = threading.Thread(target=functools.partial(kernel("load"), words, order, 32, shared, 8, 10), daemon=True)
    thread.start()
    while shared[8] < 3:
        time.sleep(1e-3)
    shared[0] = 1
    thread.join(30)
    assert not thread.is_alive() and shared[8] >= 3 and shared.sum() == 1 + shared[8]


def test_a_pause_makes_the_load_less():
    def blocks(pause):
        words, order, shared = np.ones(64, dtype=np.int64), np.array([0]), np.zeros(16, dtype=np.int64)
        load = functools.partial(kernel("load"), words, order, 64, shared, 8, pause)
        together(HERE.cpus, [load, lambda: time.sleep(0.05) or shared.__setitem__(0, 1)])
        return shared[8]

    assert blocks(100_000) < blocks(0) / 100


def test_a_value_is_repeated_less_often_where_it_takes_long(monkeypatch):
    seconds = iter(range(100))
    monkeypatch.setattr(memory.time, "perf_counter", lambda: next(seconds))
    values = iter(range(100))
    assert repeated(lambda: next(values), 7) == [1, 2, 3, 4, 5]  # the first is not counted
    monkeypatch.setattr(memory, "LIMIT_S", 0.0)
    assert len(repeated(lambda: next(values), 7)) == memory.LEAST_REPEATS


def test_memory_is_larger_than_caches_hold(monkeypatch):
    monkeypatch.setattr(memory, "last_cache_bytes", lambda cpus: 100 * KIB)
    effort = replace(TINY, caches=4)
    assert (effort.beyond_caches(HERE), replace(TINY, caches=1).beyond_caches(HERE)) == (400 * KIB, 256 * KIB)
    assert [row.settings["size"] for row in latency(DRAM, HERE, effort)] == [8 * KIB, 64 * KIB, 400 * KIB]


def test_blocks_that_a_threads_share_cannot_hold_are_left_out():
    effort = replace(TINY, size=128 * KIB, repeats=1)
    rows = bandwidth(DRAM, HERE, effort, [1, 2])
    large = {(r.settings["access"], r.settings["threads"]) for r in rows if r.settings["block"] == 64 * KIB}
    assert large == {("read", 1), ("read", 2), ("write", 1), ("write", 2), ("mixed", 1)}


def test_latency_rows():
    rows = list(latency(DRAM, HERE, TINY))
    assert [row.settings["size"] for row in rows] == [8 * KIB, 64 * KIB, 256 * KIB]
    assert all(row.unit == "ns" and row.n == 2 and 0 < row.best <= row.median < 1e5 for row in rows)


def test_bandwidth_rows_cover_accesses_threads_and_blocks():
    rows = list(bandwidth(DRAM, HERE, TINY, [1, 2]))
    keys = {(row.settings["access"], row.settings["threads"], row.settings["block"]) for row in rows}
    assert keys == {(a, t, b) for a in ("read", "write", "mixed") for t in (1, 2) for b in (4 * KIB, 64 * KIB)}
    assert all(row.unit == "GB/s" and row.best >= row.median > 0 for row in rows)


@pytest.mark.skipif(len(HERE.cpus) < 2, reason="the load needs another processor")
def test_loaded_latency_says_what_load_it_was():
    rows = list(loaded_latency(DRAM, HERE, TINY))
    assert [row.settings["pause"] for row in rows] == [1000, 0]
    assert all(row.median > 0 and row.also["load_gb_per_s"] > 0 for row in rows)


def test_memory_holds_pages_before_anything_is_timed():
    with Memory(DRAM, 64 * KIB) as words:
        assert words.size == 8 * KIB and not words.any()


# ---- places


def test_last_caches_are_counted_once_each(tmp_path):
    caches = {0: ((1, "32K", "0"), (3, "16M", "0-1")), 1: ((1, "32K", "1"), (3, "16M", "0-1")), 2: ((3, "8M", "2"),)}
    for cpu, kinds in caches.items():
        for i, kind in enumerate(kinds):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{i}"
            folder.mkdir(parents=True)
            for name, value in zip(("level", "size", "shared_cpu_list"), kind, strict=True):
                (folder / name).write_text(f"{value}\n")
    assert last_cache_bytes([0, 1, 2], tmp_path) == 24 * MIB
    assert last_cache_bytes([0], tmp_path) == 16 * MIB
    assert last_cache_bytes([7], tmp_path) == 0


def test_memory_that_is_not_there_is_refused_before_it_is_touched(monkeypatch):
    monkeypatch.setattr(places, "available_host_bytes", lambda: 10 * MIB)
    require_room(8 * MIB, DRAM)
    with pytest.raises(
        BudgetError, match=r"measuring dram node 0 takes 9 MiB of memory, 10 MiB are available; .*--quick"
    ):
        Memory(DRAM, 9 * MIB)


def test_a_processor_that_is_gone_is_an_error_and_no_other_work_is_done():
    done = []
    with pytest.raises(OSError, match="Invalid argument"):
        together([HERE.cpus[0], 4095], [lambda: done.append(1)] * 2)
    assert not done


def test_an_interrupt_waits_for_those_who_use_the_memory(monkeypatch):
    ended = []
    monkeypatch.setattr(places.threading.Barrier, "wait", _interrupt_the_main_thread(places.threading.Barrier.wait))
    with pytest.raises(KeyboardInterrupt):
        together(HERE.cpus, [lambda: time.sleep(0.05) or ended.append(1)])
    assert ended == [1]


def _interrupt_the_main_thread(wait):
    def waits(barrier, *args):
        wait(barrier, *args)
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt

    return waits


def test_places_of_two_sockets_and_two_expanders():
    nodes = Topology(tuple(Node(n, (n,) if n < 2 else (), GIB, GIB) for n in range(4)))
    found = find_places(nodes, bindable=True)
    assert [(p.name, p.nodes, p.cxl) for p in found] == [
        ("dram node 0", (0,), False),
        ("dram node 1", (1,), False),
        ("cxl node 2", (2,), True),
        ("cxl node 3", (3,), True),
        ("cxl nodes 2+3", (2, 3), True),
    ]
    assert find_places(nodes, bindable=False) == [Place("dram node 0")]


def test_processors_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(places.os, "sched_getaffinity", lambda pid: {1, 5})
    nodes = Topology((Node(0, (0, 1), GIB, GIB), Node(1, (4, 5), GIB, GIB), Node(2, (6,), GIB, GIB)))
    assert find_processors(nodes) == [Processors("node 0", (1,)), Processors("node 1", (5,))]
    assert find_processors(Topology(())) == [Processors("node 0", (1, 5))]


def test_threads_are_held_on_their_processors_and_others_are_not():
    before, seen = places.os.sched_getaffinity(0), []
    together(HERE.cpus, [lambda: seen.append(places.os.sched_getaffinity(0))] * 3)
    assert all(len(cpus) == 1 and cpus <= set(HERE.cpus) for cpus in seen) and len(seen) == 3
    assert places.os.sched_getaffinity(0) == before


def test_the_first_failure_of_a_thread_is_raised():
    def fail():
        raise ZeroDivisionError("here")

    with pytest.raises(ZeroDivisionError, match="here"):
        together(HERE.cpus, [fail, lambda: None])
