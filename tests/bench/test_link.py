"""The link's test on a stand-in for a device: what is copied when, and what is said of memory that cannot be pinned."""

import pytest
import torch

from horizon.bench import link as module
from horizon.bench.link import link, within
from horizon.bench.places import Place
from horizon.errors import BudgetError
from horizon.report.measurements import Skipped
from horizon.store.arena import Arena
from horizon.stream.streams import Streams
from horizon.units import KIB

DRAM = Place("dram node 0")


class Pinned(Arena):
    """Pages that CUDA would have taken, or not."""

    takes = True
    closed = 0

    def __init__(self, sizes, purpose, pin, nodes=()):
        super().__init__(sizes, purpose, False, nodes)
        self.pinned = pin and self.takes

    def close(self):
        type(self).closed += 1
        super().close()


@pytest.fixture
def arena(monkeypatch):
    class Mine(Pinned):
        pass

    monkeypatch.setattr(module, "Arena", Mine)
    return Mine


def streams():
    return Streams.on(torch.device("cpu"))


def test_rows_by_direction_memory_and_size(arena):
    rows = list(link(DRAM, streams(), (64 * KIB, 4 * KIB), 2))
    keys = {(row.settings["direction"], row.settings["memory"], row.settings["size"]) for row in rows}
    assert keys == {(d, m, s) for d in ("H2D", "D2H") for m in ("pinned", "pageable") for s in (64 * KIB, 4 * KIB)}
    assert all(row.n == 2 and row.best >= row.median > 0 and row.place == "dram node 0" for row in rows)
    assert arena.closed == 4


def test_the_clock_runs_from_before_a_copy_until_its_end_is_known(arena, monkeypatch):
    said = []
    for name in ("copy", "synchronize"):
        real = getattr(Streams, name)
        monkeypatch.setattr(Streams, name, lambda self, *a, real=real, name=name: (said.append(name), real(self, *a)))
    clock = module.time.perf_counter
    monkeypatch.setattr(module.time, "perf_counter", lambda: (said.append("clock"), clock())[1])
    list(link(DRAM, streams(), (4 * KIB,), 1))
    once = ["synchronize", "clock", "copy", "synchronize", "clock"]
    assert said[:20] == once * 4


def test_memory_that_cuda_does_not_take_is_not_called_pinned(arena):
    arena.takes = False
    found = list(link(DRAM, streams(), (4 * KIB, 8 * KIB), 1))
    skipped = [one for one in found if isinstance(one, Skipped)]
    assert len(skipped) == 1 and skipped[0].place == "dram node 0, pinned" and "memlock limit" in skipped[0].reason
    assert {row.settings["memory"] for row in found if not isinstance(row, Skipped)} == {"pageable"}


def test_copies_within_the_device_count_both_ways(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    (row,) = within(streams(), 4 * KIB, 2)
    assert row.median == pytest.approx(2 * module.BATCH * 4 * KIB / 1e9) and (row.test, row.place, row.n) == (
        "hbm",
        "hbm",
        2,
    )


def test_a_device_without_room_is_a_named_error(arena, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Streams, "empty", full)
    for found, size in ((link(DRAM, streams(), (4 * KIB,), 1), "4 KiB"), (within(streams(), 4 * KIB, 1), "8 KiB")):
        with pytest.raises(BudgetError, match=f"the device has no room for {size}"):
            list(found)
