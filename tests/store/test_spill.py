"""Arrays that wait on disk come back as they were, through so few buffers, and none is overwritten too early."""

import random
import threading
import time
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horizon.config.schema import NvmeEngine
from horizon.errors import TierError
from horizon.plan.disk import DISK_BLOCK, boundary_place, map_boundaries
from horizon.store import nvme
from horizon.store.disk import DirectFile
from horizon.store.ledger import Ledger
from horizon.store.nvme import NvmeFolder
from horizon.store.spill import Spill
from horizon.stream.streams import DoneEvent

DONE = DoneEvent()
SIZES = {(block, m): 1000 * (block + 1) + m for block in range(4) for m in range(2)}
PLACES = [boundary_place(*key) for key in SIZES]
NUM_BYTES = dict(zip(PLACES, SIZES.values(), strict=True))


class SlowFile(DirectFile):
    """Delays every move, differently each time."""

    delays = random.Random(3)

    def read(self, place, offset, into):
        time.sleep(self.delays.random() * 0.002)
        super().read(place, offset, into)

    def write(self, place, offset, data):
        time.sleep(self.delays.random() * 0.002)
        super().write(place, offset, data)


@pytest.fixture
def opened(tmp_path):
    """`opened(num_buffers)`: arrays on a slow disk; closed after the test."""
    spills = []

    def opened(num_buffers):
        disk_map, ledger = map_boundaries(SIZES), Ledger(1)
        with mock.patch.object(nvme, "DirectFile", SlowFile):
            file = NvmeFolder(str(tmp_path), NvmeEngine.direct).open(disk_map)
        spills.append(Spill(file, disk_map, num_buffers, ledger, pin=False))
        spills[-1].begin(NUM_BYTES)
        return spills[-1], ledger

    yield opened
    for spill in spills:
        spill.close()
        spill.close()
    assert list(tmp_path.iterdir()) == []


def value(place, turn=0):
    generator = torch.Generator().manual_seed(1000 * turn + PLACES.index(place))
    return torch.randint(0, 256, (NUM_BYTES[place],), dtype=torch.uint8, generator=generator)


def fill(spill, places, turn=0):
    for place in places:
        memory = spill.claim(place)
        assert memory.numel() % DISK_BLOCK == 0 and memory.data_ptr() % DISK_BLOCK == 0
        memory[: NUM_BYTES[place]] = value(place, turn)
        spill.filled(place, DONE)


def is_there(memory, place, turn=0):
    return torch.equal(memory[: NUM_BYTES[place]], value(place, turn))


@pytest.mark.parametrize("num_buffers", [1, 2, 3, 20])
def test_whatever_the_order_all_comes_back(opened, num_buffers):
    """That of use is told, but for the last turn."""
    spill, _ = opened(num_buffers)
    for turn in range(6):
        order = random.Random(turn).sample(PLACES, len(PLACES))
        spill.begin()
        fill(spill, PLACES, turn)
        if turn < 5:
            spill.expect(order)
        for place in order:
            assert is_there(spill.fetch(place), place, turn)
            spill.release(place, DONE)
    assert spill.num_bytes <= num_buffers * 12288 + (2 << 20)


@pytest.mark.parametrize("num_buffers", [1, 3])
def test_sums_are_read_added_to_and_written_again(opened, num_buffers):
    spill, _ = opened(num_buffers)
    fill(spill, PLACES)
    spill.begin()
    spill.expect(PLACES)
    for place in PLACES:
        memory = spill.claim(place)
        assert is_there(memory, place)
        memory[: NUM_BYTES[place]] = value(place, 7)
        spill.filled(place, DONE)
    found = torch.zeros(500, dtype=torch.uint8)
    for place in PLACES:
        spill.read(place, 321, found)
        assert torch.equal(found, value(place, 7)[321:821])


def test_what_has_a_buffer_still_is_not_read_again(opened):
    spill, _ = opened(3)
    fill(spill, PLACES)
    with mock.patch.object(SlowFile, "read", side_effect=AssertionError("read")):
        for place in reversed(PLACES[-3:]):
            assert spill.is_ready(place)
            assert is_there(spill.fetch(place), place)


def test_who_fills_waits_until_the_oldest_is_on_disk(opened):
    spill, _ = opened(2)
    may_write = threading.Event()
    write = DirectFile.write
    with mock.patch.object(SlowFile, "write", lambda *args: (may_write.wait(), write(*args))):
        fill(spill, PLACES[:2])
        assert not spill.is_ready(PLACES[2]) and spill.is_ready(PLACES[0])
        filler = threading.Thread(target=fill, args=(spill, PLACES[2:3]))
        filler.start()
        filler.join(0.05)
        assert filler.is_alive()
        may_write.set()
        filler.join(20)
        assert not filler.is_alive()
    spill.expect(PLACES[:3])
    assert all(is_there(spill.fetch(place), place) or spill.release(place) for place in PLACES[:1])


def test_a_buffer_that_is_released_while_it_is_written_is_nobodys_until_it_is(opened):
    spill, _ = opened(1)
    may_write, write = threading.Event(), DirectFile.write
    with mock.patch.object(SlowFile, "write", lambda *args: (may_write.wait(), write(*args))):
        fill(spill, PLACES[:1])
        spill.release(PLACES[0], DONE)
        filler = threading.Thread(target=fill, args=(spill, PLACES[1:2]))
        filler.start()
        filler.join(0.05)
        assert filler.is_alive()
        may_write.set()
        filler.join(20)
    spill.expect(PLACES[:2])
    for place in PLACES[:2]:
        assert is_there(spill.fetch(place), place)
        spill.release(place, DONE)


def test_a_buffer_is_not_read_into_before_the_copy_out_of_it_is_over(opened):
    """Nor filled, nor written from before the copy into it is over."""
    spill, _ = opened(1)
    order = []

    class Event:
        def __init__(self, name):
            self.name = name

        def synchronize(self):
            time.sleep(0.01)
            order.append(self.name)

    def logging(what):
        real = getattr(DirectFile, what)
        return mock.patch.object(SlowFile, what, lambda *args: (order.append(f"{what} {args[1]}"), real(*args)))

    a, b = PLACES[:2]
    with logging("read"), logging("write"):
        spill.claim(a)
        spill.filled(a, Event("a filled"))
        spill.claim(b)
        spill.filled(b, Event("b filled"))
        spill.expect([a, b])
        spill.fetch(a)
        spill.release(a, Event("a copied"))
        spill.fetch(b)
        spill.release(b, Event("b copied"))
        spill.begin()
        spill.claim(a)
    assert order == [
        "a filled", f"write {a}", "b filled", f"write {b}", f"read {a}", "a copied", f"read {b}", "b copied"
    ]  # fmt: skip


@pytest.mark.parametrize("released", [0, 1, 3])
def test_a_new_begin_forgets_what_was_under_way(opened, released):
    """Filled in part, on its way to disk, asked for and not released: as after a pass that has failed."""
    spill, _ = opened(3)
    fill(spill, PLACES[:5])
    spill.expect(PLACES)
    for place in PLACES[:released]:
        spill.fetch(place)
        spill.release(place)
    spill.begin()
    spill.claim(PLACES[0])
    for turn in (1, 2):
        spill.begin()
        fill(spill, PLACES, turn)
        spill.expect(PLACES)
        for place in PLACES:
            assert is_there(spill.fetch(place), place, turn)
            spill.release(place)
            spill.release(place)  # it may be gone already


@pytest.mark.parametrize("what", ["read", "write"])
def test_an_error_reaches_whoever_waits_and_the_ledger(opened, what):
    spill, ledger = opened(1)
    if what == "read":
        fill(spill, PLACES[:2])
    with mock.patch.object(SlowFile, what, side_effect=OSError(5, "Input/output error")):
        with pytest.raises(TierError, match=r"(reading|writing) activations.0 of block 0 .* failed"):
            fill(spill, PLACES) if what == "write" else spill.fetch(PLACES[0])
        assert ledger.failed
        with pytest.raises(TierError, match="failed"):
            spill.begin()


def test_a_failure_elsewhere_wakes_whoever_waits(opened):
    spill, ledger = opened(1)
    spill.claim(PLACES[0])
    failed = threading.Timer(0.05, ledger.fail, [RuntimeError("elsewhere")])
    failed.start()
    with pytest.raises(RuntimeError, match="elsewhere"):
        spill.claim(PLACES[1])


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.tuples(st.integers(0, 5), st.integers(0, 3)), st.integers(1, 3 * DISK_BLOCK), max_size=12))
def test_every_boundary_has_whole_disk_blocks_of_its_own(sizes):
    disk_map = map_boundaries(sizes)
    end = 0
    for place, region in sorted(disk_map.regions.items(), key=lambda item: item[1].offset):
        assert region.offset == end and region.num_bytes % DISK_BLOCK == 0
        end += region.num_bytes
        (key,) = (key for key in sizes if boundary_place(*key) == place)
        assert 0 <= region.num_bytes - sizes[key] < DISK_BLOCK
    assert disk_map.num_bytes == end and len(disk_map.regions) == len(sizes)
    assert disk_map.largest == max((region.num_bytes for region in disk_map.regions.values()), default=0)
