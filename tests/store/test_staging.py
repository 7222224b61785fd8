"""Staging between disk and memory: which bytes an update and a load see, and whose a buffer is when."""

import itertools
import random
import threading
import time

import pytest
import torch

from horizon.config.schema import Tier
from horizon.errors import TierError
from horizon.layout import ParamSpec, place_block
from horizon.plan import disk as disk_plan
from horizon.plan.disk import load_parts, map_disk, num_pages
from horizon.plan.states import MASTER, MOMENTS
from horizon.store.disk import DirectFile
from horizon.store.ledger import Ledger
from horizon.store.loads import StagedLoads
from horizon.store.nvme import NvmeTier
from horizon.store.pages import UpdatePages

pytestmark = pytest.mark.timeout(60)  # what waits for a page that never comes has failed

PAGE = 1 << 16
STATES = (*MASTER, *MOMENTS["float32"])
OWNER = place_block(0, "b0", [ParamSpec("w0", "w", (2 * PAGE + 100,))])
MIDDLE = place_block(1, "b1", [ParamSpec("w1", "w", (PAGE,)), ParamSpec("f1", "f", (300,), trainable=False)])
LAST = place_block(2, "b2", [ParamSpec("w2", "w", (64,))], [("shared", 0, OWNER.params[0])])
LAYOUTS = (OWNER, MIDDLE, LAST)
ALL = {(state.name, lay.index): Tier.nvme for state in STATES for lay in LAYOUTS}


class WatchedFile(DirectFile):
    """Slow, and it looks: bytes that are being read or written are written by nobody else meanwhile."""

    def __init__(self, folder, disk_map, delay=0.002):
        super().__init__(folder, disk_map)
        self.delay, self.random, self.lock = delay, random.Random(0), threading.Lock()
        self.active: list[tuple[object, int, int, bool]] = []
        self.overlaps: list[tuple[object, int]] = []
        self.log: list[tuple[str, str, int, int]] = []

    def _watched(self, write, place, offset, data, move):
        mine = (place, offset, offset + len(data), write)
        with self.lock:
            self.log.append(("write" if write else "read", *place, offset))
            for other, start, stop, writes in self.active:
                if other == place and start < mine[2] and offset < stop and (write or writes):
                    self.overlaps.append((place, offset))
            self.active.append(mine)
        time.sleep(self.random.random() * self.delay)
        move(place, offset, data)
        with self.lock:
            self.active.remove(mine)

    def read(self, place, offset, into):
        self._watched(False, place, offset, into, super().read)

    def write(self, place, offset, data):
        self._watched(True, place, offset, data, super().write)


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    monkeypatch.setattr(disk_plan, "PAGE_ELEMENTS", PAGE)


@pytest.fixture
def engine(tmp_path):
    return WatchedFile(tmp_path, map_disk(STATES, LAYOUTS, ALL))


@pytest.fixture
def tier(engine, tmp_path):
    return NvmeTier(tmp_path, engine)


def bump(pages, block):
    """Add one to every number of a block, page by page."""
    for page in range(num_pages(LAYOUTS[block])):
        for view in pages.acquire(block, page).values():
            view.add_(1)
        pages.release(block, page)


def make_pages(tier, ledger, num_buffers):
    return UpdatePages(tier, STATES, MASTER[:1], LAYOUTS, ALL, ledger, num_buffers)


@pytest.mark.parametrize("num_buffers", [1, 2, 5, 20])
@pytest.mark.parametrize("together", [False, True], ids=["step by step", "announced together"])
def test_every_update_sees_what_the_one_before_left(tier, engine, num_buffers, together):
    pages, steps = make_pages(tier, Ledger(3), num_buffers), 6
    for _ in range(steps if together else 0):
        for block in range(3):
            pages.announce(block)
    for _ in range(steps):
        for block in range(3):
            if not together:
                pages.announce(block)
            bump(pages, block)
    pages.wait_written()
    assert engine.overlaps == []
    for state in STATES:
        for layout in LAYOUTS:
            found = torch.empty(state.numel(layout), dtype=state.dtype)
            tier.read_range((state.name, layout.index), 0, found.view(torch.uint8))
            assert (found[: layout.num_trainable] == steps).all()
            assert not found[layout.num_trainable :].any()  # frozen
    tier.close()
    pages.close()


def test_no_more_pages_are_staged_than_there_are_buffers_and_each_has_one_of_its_own(tier):
    pages = make_pages(tier, Ledger(3), 2)
    for block in range(3):
        pages.announce(block)
    first, second = pages.acquire(0, 0), pages.acquire(0, 1)
    time.sleep(0.05)
    assert (0, 2) not in pages._pages
    spans = sorted((v.data_ptr(), v.data_ptr() + v.nbytes) for v in (*first.values(), *second.values()))
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))
    pages.release(0, 1)
    assert pages.acquire(0, 2)
    tier.close()
    pages.close()


def test_a_block_that_loads_read_is_loadable_when_it_is_on_disk(tier, engine):
    engine.delay = 0.05
    weights_alone = {place: t for place, t in ALL.items() if place[0] == "weights"}
    moments_alone = {place: t for place, t in ALL.items() if place[0] != "weights"}
    for placed, waits in ((weights_alone, True), (moments_alone, False)):
        pages = UpdatePages(tier, STATES, MASTER[:1], LAYOUTS, placed, Ledger(3), 20)
        told = threading.Event()
        pages.announce(0)
        bump(pages, 0)
        pages.when_loadable(0, told.set)
        assert told.is_set() is not waits
        pages.wait_written()
        assert told.wait(1)
        assert ("write", "weights", 0, 0) in engine.log
        pages.when_loadable(0, told.set)
        pages.close()
    tier.close()


def test_a_failed_read_or_write_reaches_who_waits(tier, engine, monkeypatch):
    ledger = Ledger(3)
    pages = make_pages(tier, ledger, 2)
    monkeypatch.setattr("os.pwritev", lambda *_: 0)
    pages.announce(0)
    pages.announce(1)
    with pytest.raises(TierError, match=r"writing .* of block 0 .*only 0 bytes were written"):
        bump(pages, 0)
        bump(pages, 1)
    assert ledger.failed
    with pytest.raises(TierError):
        pages.wait_written()
    tier.close()
    pages.close()


# ---- loads


class Copied:
    """An event that is reached when a test says so."""

    def __init__(self):
        self.reached = threading.Event()

    def synchronize(self):
        assert self.reached.wait(5)


def write_version(tier, version):
    for layout in LAYOUTS:
        value = torch.full((layout.num_elements,), 10 * version + layout.index, dtype=torch.bfloat16)
        tier.write_range(("weights", layout.index), 0, value.view(torch.uint8))


def make_loads(tier, ledger, num_buffers=2):
    return StagedLoads(tier.run, MASTER[:1], LAYOUTS, ALL, ledger, False, num_buffers)


def values(loads, visit, block):
    """The distinct numbers that each part of a load has."""
    found = [loads.source(visit, "weights", part).unique().tolist() for part in load_parts(LAYOUTS[block])]
    assert all(len(numbers) == 1 for numbers in found)
    return [numbers[0] for numbers in found]


WALK = [0, 1, 2, 1, 0]


@pytest.mark.parametrize("num_buffers", [1, 2, 3])
@pytest.mark.parametrize("held", [set(), {3}, {3, 4}, {0, 1, 2}], ids=str)
def test_loads_see_the_walks_version(tier, engine, num_buffers, held):
    ledger = Ledger(3)
    loads = make_loads(tier, ledger, num_buffers)
    write_version(tier, 0)
    for version in range(3):
        loads.begin(WALK, version, held)
        if version:
            time.sleep(0.01)
            assert not loads.is_ready(0)  # nothing is read before it is published
            write_version(tier, version)
            for block in range(3):
                ledger.publish(block, version)
        for visit, block in enumerate(WALK):
            loads.wait(visit)  # also one that was held to be on the device already
            assert values(loads, visit, block) == [10 * version + b for b in ([2, 0] if block == 2 else [block])]
            loads.done(visit)
    assert engine.overlaps == []
    loads.close()
    tier.close()


def test_a_buffer_is_read_into_again_after_the_copy_out_of_it(tier):
    ledger, copied = Ledger(3), Copied()
    write_version(tier, 0)
    loads = make_loads(tier, ledger, 1)
    loads.begin(WALK, 0, set())
    loads.wait(0)
    source = loads.source(0, "weights", load_parts(LAYOUTS[0])[0])
    before = source.clone()
    loads.done(0, copied)
    time.sleep(0.05)
    assert not loads.is_ready(1) and torch.equal(source, before)
    copied.reached.set()
    loads.wait(1)
    assert values(loads, 1, 1) == [1]
    loads.close()
    tier.close()


def test_what_is_read_for_one_walk_is_not_given_to_the_next(tier, engine):
    engine.delay = 0.03
    ledger = Ledger(3)
    loads = make_loads(tier, ledger)
    write_version(tier, 0)
    for version in range(1, 5):
        loads.begin(WALK, version - 1, set())  # left at once, in the middle of a read
        loads.begin([1, 0], version, set())
        write_version(tier, version)
        for block in range(3):
            ledger.publish(block, version)
        for visit, block in enumerate([1, 0]):
            loads.wait(visit)
            assert values(loads, visit, block) == [10 * version + block]
            loads.done(visit)
    loads.close()
    tier.close()


def test_a_visit_that_needs_nothing_gives_its_buffer_back(tier):
    write_version(tier, 0)
    loads = make_loads(tier, Ledger(3), 1)
    loads.begin(WALK, 0, set())
    for visit in range(4):
        loads.done(visit)
    loads.wait(4)
    assert values(loads, 4, 0) == [0]
    loads.close()
    tier.close()


def test_a_failed_read_reaches_who_waits_for_the_load(tier, monkeypatch):
    monkeypatch.setattr("os.preadv", lambda *_: 0)
    ledger = Ledger(3)
    loads = make_loads(tier, ledger)
    loads.begin(WALK, 0, set())
    with pytest.raises(TierError, match=r"reading weights of block 0 .*only 0 bytes were read"):
        loads.wait(0)
    assert ledger.failed
    loads.close()
    tier.close()
