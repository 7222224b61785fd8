"""A snapshot is of one version, however the disk, the updates and the staging come together."""

import threading
import time

import numpy as np
import pytest
import torch

from horizon.checkpoint.format import list_arrays
from horizon.checkpoint.snapshot import Snapshot, StateReader
from horizon.checkpoint.staging import Staging
from horizon.config.schema import Moments
from horizon.errors import CheckpointError, HorizonError
from horizon.layout import ParamSpec, place_block
from horizon.store.host import HostStore
from horizon.stream.streams import Streams

NUM_BLOCKS, ROWS = 4, 32


@pytest.fixture
def store():
    layouts = [
        place_block(b, f"block{b}", [ParamSpec(f"b{b}.m", "m", (ROWS, 64)), ParamSpec(f"b{b}.v", "v", (64,))])
        for b in range(NUM_BLOCKS)
    ]
    store = HostStore(layouts, pin=False, pin_residual=False)
    fill(store, 1.0)
    yield store
    store.close()


def fill(store, value, blocks=range(NUM_BLOCKS)):
    for block in blocks:
        for tensor in store.states(block).values():
            tensor.fill_(value)


class Disk:
    """Keeps what is written; a chunk is done when it is told to be, or (open) at once."""

    def __init__(self, is_open=True):
        self.is_open, self.written, self.pending, self.fails = is_open, {}, [], None
        self.lock = threading.Lock()

    def write(self, spec, chunk, values, done):
        if self.fails:
            raise self.fails
        with self.lock:
            self.pending.append((spec, chunk, values, done))
        if self.is_open:
            self.flush()

    def flush(self, count=None):
        with self.lock:
            jobs, self.pending = self.pending[:count], self.pending[count:] if count else []
        for spec, chunk, values, done in jobs:
            self.written[spec.name, spec.kind, chunk.file] = values.clone()
            done()


@pytest.fixture
def snapshot(store):
    made = []

    def make(disk, version=0, staging=1 << 20, order=range(NUM_BLOCKS), read=None):
        arrays = list_arrays(store.layouts, Moments.float32)
        arrays = sorted(arrays, key=lambda array: [*order].index(array.block))
        reader = StateReader(store, Streams.on(torch.device("cpu")))
        room = Staging(staging)
        made.append(room)
        return Snapshot(version, arrays, store, room, read or reader.read, disk.write)

    yield make
    for room in made:
        room.close()


def run(work):
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def ended(thread):
    thread.join(10)
    return not thread.is_alive()


def test_all_of_it_is_written_in_the_order_in_which_it_will_be_overwritten(snapshot):
    disk = Disk()
    snapshot(disk, order=[2, 0, 3, 1]).copy_all()
    names = [*dict.fromkeys(name.partition(".")[0] for name, _, _ in disk.written)]
    assert names == ["b2", "b0", "b3", "b1"]
    assert len(disk.written) == NUM_BLOCKS * 2 * 3
    assert disk.written["b0.m", "exp_avg", "c.0.0"].shape == (ROWS, 64)


def test_a_block_that_is_not_written_yet_is_set_aside_before_its_update(store, snapshot):
    disk = Disk(is_open=False)
    taken = snapshot(disk)
    for block in (2, 1, 0, 3):
        taken.before_update(block)
        fill(store, 9.0, [block])  # the update
    disk.is_open = True
    taken.copy_all()
    disk.flush()
    assert len(disk.written) == NUM_BLOCKS * 2 * 3
    assert {float(v.max()) for (_, kind, _), v in disk.written.items() if kind == "exp_avg"} == {1.0}
    assert {float(v.min()) for (_, kind, _), v in disk.written.items() if kind == "exp_avg"} == {1.0}


def test_masters_are_joined_bit_for_bit(store, snapshot):
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 1 << 32, (ROWS, 64), np.uint32).view(np.float32))
    store.write_master("b1.m", values)
    disk = Disk()
    snapshot(disk).copy_all()
    assert torch.equal(disk.written["b1.m", "master", "c.0.0"].view(torch.int32), values.view(torch.int32))


def test_an_update_waits_while_the_staging_is_full_and_goes_on_when_the_disk_does(snapshot):
    disk = Disk(is_open=False)
    taken = snapshot(disk, staging=2 * ROWS * 64 * 4)  # room for two chunks of the six that a block has
    update = run(lambda: taken.before_update(0))
    for _ in range(3):
        time.sleep(0.05)
        assert update.is_alive()
        disk.flush(1)
    while update.is_alive():
        disk.flush()
        time.sleep(0.005)
    assert taken.stall_s > 0.1 and 0 < taken.room_s <= taken.stall_s
    disk.is_open = True
    disk.flush()  # what the update wrote last may fill the staging, and nothing else would give that back
    taken.copy_all()


def test_the_update_that_leads_to_the_version_is_not_held_up(store, snapshot):
    disk = Disk()
    taken = snapshot(disk, version=1)
    taken.before_update(0)  # the update of step 1 itself
    assert not disk.written
    fill(store, 2.0, [0])
    copying = run(taken.copy_all)
    time.sleep(0.05)
    assert not disk.written  # the block has not reached its version
    for block in range(NUM_BLOCKS):
        fill(store, 2.0, [block])
        store.ledger.publish(block, 1)
    assert ended(copying)
    assert {float(v.max()) for (_, kind, _), v in disk.written.items() if kind == "exp_avg"} == {2.0}


def test_many_updates_in_any_order_beside_the_copying_never_tear_a_block(store, snapshot):
    for attempt in range(30):
        fill(store, 1.0)
        disk, order = Disk(), np.random.default_rng(attempt).permutation(NUM_BLOCKS).tolist()
        taken = snapshot(disk, staging=8 * ROWS * 64)

        def update(block, taken=taken):
            taken.before_update(block)
            fill(store, 7.0, [block])

        copying = run(lambda taken=taken: taken.copy_all(3))
        updates = [run(lambda block=block: update(block)) for block in order]
        assert all(ended(thread) for thread in [copying, *updates])
        assert len(disk.written) == NUM_BLOCKS * 2 * 3
        assert {float(v.max()) for (_, kind, _), v in disk.written.items() if kind == "exp_avg"} == {1.0}


def test_what_fails_ends_the_snapshot_and_holds_no_update_up(snapshot):
    disk = Disk()
    disk.fails = CheckpointError("no room")
    taken = snapshot(disk)
    taken.before_update(1)
    with pytest.raises(CheckpointError, match="no room"):
        taken.copy_all()
    for block in range(NUM_BLOCKS):
        taken.before_update(block)


def test_a_reader_that_breaks_is_not_the_updates_error(snapshot):
    def read(array, chunk, out):
        raise ZeroDivisionError("reading")

    taken = snapshot(Disk(), read=read)
    taken.before_update(0)
    with pytest.raises(ZeroDivisionError):
        taken.copy_all()


def test_who_waits_for_room_is_woken_when_the_snapshot_is_given_up(snapshot):
    disk = Disk(is_open=False)
    taken = snapshot(disk, staging=ROWS * 64 * 4)
    update = run(lambda: taken.before_update(0))
    time.sleep(0.05)
    assert update.is_alive()
    taken.give_up(CheckpointError("enough"))
    disk.flush()
    assert ended(update)


def test_updates_that_fail_before_the_version_is_reached_end_it(store, snapshot):
    taken = snapshot(Disk(), version=3)
    copying = []

    def copy():
        try:
            taken.copy_all()
        except HorizonError as error:
            copying.append(error)

    thread = run(copy)
    time.sleep(0.02)
    store.ledger.fail(HorizonError("an update broke"))
    assert ended(thread)
    assert str(copying[0]) == "an update broke"


# ---- staging


def test_staging_hands_out_disjoint_regions_and_joins_what_comes_back():
    staging = Staging(128 << 10)
    generator = np.random.default_rng(0)
    held = []
    for number in range(2000):
        if held and (len(held) > 5 or generator.random() < 0.5):
            region, value = held.pop(generator.integers(len(held)))
            assert (region == value).all()
            staging.release(region)
        else:
            region = staging.acquire(int(generator.integers(1, 10_000)))
            region.fill_(number % 251)
            held.append((region, number % 251))
    for region, value in held:
        assert (region == value).all()
        staging.release(region)
    assert staging.acquire(128 << 10).numel() == 128 << 10  # one piece again
    with pytest.raises(ValueError, match="do not fit"):
        staging.acquire((128 << 10) + 1)
    staging.close()


def test_closing_the_staging_wakes_who_waits():
    staging, found = Staging(4096), []
    staging.acquire(4096)
    thread = run(lambda: found.append(staging.acquire(1)))
    time.sleep(0.02)
    staging.close()
    assert ended(thread) and found == [None]


def test_the_pages_of_staging_come_into_being_behind_training(monkeypatch):
    touched = []
    monkeypatch.setattr("horizon.checkpoint.staging.TOUCHED", 4096)
    monkeypatch.setattr("horizon.store.arena.Arena.populate", lambda _, *span: touched.append(span) or len(touched) < 3)
    staging = Staging(5 * 4096)
    staging._toucher.join()
    assert touched == [(0, 4096), (4096, 8192), (8192, 12288)]  # where the kernel cannot, they come with the first save
    staging.close()
