import numpy as np
import pytest

from horizon.bench import places
from horizon.bench.memory import Effort, Memory, bandwidth, kernel, latency, loaded_latency, make_cycle
from horizon.bench.places import Place, Processors, find_places, find_processors, together
from horizon.plan.topology import Node, Topology, read_topology
from horizon.units import GIB, KIB

TINY = Effort(
    size=256 * KIB, latency_sizes=(8 * KIB, 64 * KIB), loads=2000, blocks=(4 * KIB, 64 * KIB), pauses_us=(100.0, 0.0),
    repeats=2,
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


def test_latency_rows():
    rows = list(latency(DRAM, HERE, TINY))
    assert [row.settings["size"] for row in rows] == [8 * KIB, 64 * KIB]
    assert all(row.unit == "ns" and row.n == 2 and 0 < row.best <= row.median < 1e5 for row in rows)


def test_bandwidth_rows_cover_accesses_threads_and_blocks():
    rows = list(bandwidth(DRAM, HERE, TINY, [1, 2]))
    keys = {(row.settings["access"], row.settings["threads"], row.settings["block"]) for row in rows}
    assert keys == {(a, t, b) for a in ("read", "write", "mixed") for t in (1, 2) for b in (4 * KIB, 64 * KIB)}
    assert all(row.unit == "GB/s" and row.best >= row.median > 0 for row in rows)


@pytest.mark.skipif(len(HERE.cpus) < 2, reason="the load needs another processor")
def test_loaded_latency_says_what_load_it_was():
    rows = list(loaded_latency(DRAM, HERE, TINY))
    assert [row.settings["pause_us"] for row in rows] == [100.0, 0.0]
    assert all(row.median > 0 and row.also["load_gb_per_s"] >= 0 for row in rows)


def test_memory_holds_pages_before_anything_is_timed():
    with Memory(DRAM, 64 * KIB) as words:
        assert words.size == 8 * KIB and not words.any()


# ---- places


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
