import threading

import pytest
import torch

from horizon.layout import ParamSpec, place_block
from horizon.store.host import HostStore
from horizon.stream.slots import Slot, SlotState, WeightSlots
from horizon.stream.streams import Streams

CPU = torch.device("cpu")
CYCLE = {
    SlotState.EMPTY: [SlotState.LOADING],
    SlotState.LOADING: [SlotState.READY],
    SlotState.READY: [SlotState.IN_USE, SlotState.LOADING],
    SlotState.IN_USE: [SlotState.READY],
}
BLOCKS = 4
LAYOUTS = [place_block(i, f"b{i}", [ParamSpec(f"b{i}.w", "w", (3, 5 + i)), ParamSpec(f"b{i}.v", "v", (7,))])
           for i in range(BLOCKS - 1)]  # fmt: skip
LAYOUTS.append(
    place_block(3, "b3", [ParamSpec("b3.w", "w", (2, 2))], [("tied", 1, next(iter(LAYOUTS[1].params)))])
)  # reads block 1's w


@pytest.fixture
def store():
    store = HostStore(LAYOUTS, pin=False, pin_residual=False)
    generator = torch.Generator().manual_seed(0)
    for layout in LAYOUTS:
        for param in layout.params:
            store.write_master(param.name, torch.randn(param.spec.shape, generator=generator))
    yield store
    store.close()


def weight_slots(store, num=2, dtype=torch.float32):
    return WeightSlots(Streams.on(CPU), store, num, dtype)


@pytest.mark.parametrize("start", SlotState)
@pytest.mark.parametrize("to", SlotState)
def test_a_slot_moves_through_its_cycle_only(start, to):
    slot = Slot(3, torch.empty(0), None, state=start, block=7)
    if to in CYCLE[start]:
        slot.to(to)
        assert slot.state is to
        return
    expected = " or ".join(sorted(state.name for state in CYCLE[start]))
    message = rf"slot 3 \(block 7\) cannot go from {start.name} to {to.name}; expected {expected}$"
    with pytest.raises(RuntimeError, match=message):
        slot.to(to)
    assert slot.state is start


@pytest.mark.parametrize("num", [1, 2, 3])
@pytest.mark.parametrize("visits", [[0, 1, 2, 3], [0, 1, 2, 3, 2, 1, 0], [3], [0, 0, 1]])
def test_a_visit_reads_the_masters_by_name_in_fp32(store, num, visits):
    slots = weight_slots(store, num)
    slots.begin(visits, version=0)
    for expected in visits:
        block, params = slots.acquire()
        assert block == expected
        for param in LAYOUTS[block].params:
            assert torch.equal(params[param.spec.local_name], store.read_master(param.name))
        if block == 3:
            assert torch.equal(params["tied"], store.read_master("b1.w"))
        slots.release(block)


def test_a_visit_reads_the_high_halves_in_bf16(store):
    slots = weight_slots(store, dtype=torch.bfloat16)
    slots.begin([1, 3], version=0)
    for block in (1, 3):
        _, params = slots.acquire()
        for param in LAYOUTS[block].params:
            high = store.weights[block][param.offset : param.end].view(param.spec.shape)
            assert torch.equal(params[param.spec.local_name], high)
        slots.release(block)


def test_a_walk_cannot_begin_inside_a_visit(store):
    slots = weight_slots(store)
    slots.begin([2, 1], version=0)
    slots.acquire()
    with pytest.raises(RuntimeError, match="a walk begins while block 2 is in use"):
        slots.begin([0], version=0)


def test_two_visits_cannot_be_open_with_one_slot(store):
    slots = weight_slots(store, num=1)
    slots.begin([0, 1], version=0)
    slots.acquire()
    with pytest.raises(RuntimeError, match="block 1 was not loaded although it is the next visit"):
        slots.acquire()


def test_after_a_reset_a_walk_begins_anew_and_nothing_is_taken_for_loaded(store):
    slots = weight_slots(store)
    slots.begin([0, 1], version=0)
    slots.acquire()
    slots.reset()
    store.write_master("b0.v", torch.full((7,), 5.0))
    slots.begin([0], version=0)
    _, params = slots.acquire()
    assert torch.equal(params["v"], torch.full((7,), 5.0))


def test_prefetching_does_not_wait_for_a_version_but_the_visit_does(store):
    slots = weight_slots(store)
    store.ledger.publish(0, 1)
    slots.begin([0, 1], version=1)  # returns although block 1 is still at version 0
    slots.acquire()
    slots.release(0)
    store.weights[1].fill_(2.0)
    store.residual[1].zero_()
    seen = []

    def visit():
        block, params = slots.acquire()
        seen.append((block, float(params["w"][0, 0])))

    thread = threading.Thread(target=visit, daemon=True)
    thread.start()
    thread.join(0.1)
    assert seen == []
    store.weights[1].fill_(3.0)  # the update that version 1 stands for
    store.ledger.publish(1, 1)
    thread.join(5)
    assert seen == [(1, 3.0)]


def test_a_visit_that_waits_for_a_failed_update_raises_the_failure(store):
    slots = weight_slots(store)
    slots.begin([0], version=1)
    store.ledger.fail(ValueError("the update broke"))
    with pytest.raises(ValueError, match="the update broke"):
        slots.acquire()


def test_a_new_version_replaces_what_the_slots_hold(store):
    slots = weight_slots(store)
    slots.begin([0, 1], version=0)
    for block in range(2):
        slots.acquire()
        slots.release(block)
    store.write_master("b1.v", torch.full((7,), -1.0))
    for block in range(BLOCKS):
        store.ledger.publish(block, 1)
    slots.begin([1], version=1)
    _, params = slots.acquire()
    assert torch.equal(params["v"], torch.full((7,), -1.0))


# ---- blocks in HBM


@pytest.fixture
def placed():
    store = HostStore(LAYOUTS, pin=False, pin_residual=False, in_hbm={1, 2})
    for layout in LAYOUTS:
        for param in layout.params:
            store.write_master(param.name, torch.randn(param.spec.shape))
    yield store
    store.close()


def test_in_bf16_a_block_in_hbm_is_computed_with_where_it_is(placed):
    slots = weight_slots(placed, dtype=torch.bfloat16)
    slots.begin([0, 1, 2, 3, 2, 1, 0], version=0)
    for expected in (0, 1, 2, 3, 2, 1, 0):
        block, params = slots.acquire()
        assert block == expected
        in_place = params["w"].untyped_storage().data_ptr() == placed.weights[block].untyped_storage().data_ptr()
        assert in_place is (block in {1, 2})
        for p in LAYOUTS[block].params:
            assert torch.equal(params[p.spec.local_name].flatten(), placed.weights[block][p.offset : p.end])
        slots.release(block)


@pytest.mark.parametrize("num", [1, 2])
def test_in_fp32_a_block_in_hbm_is_joined_in_a_slot(placed, num):
    slots = weight_slots(placed, num)
    slots.begin([0, 1, 2, 3], version=0)
    for block in range(4):
        _, params = slots.acquire()
        for param in LAYOUTS[block].params:
            assert torch.equal(params[param.spec.local_name], placed.read_master(param.name))
        if block == 3:
            assert torch.equal(params["tied"], placed.read_master("b1.w"))
        slots.release(block)


@pytest.mark.parametrize("block", [1, 3], ids=["the block itself", "one that borrows from it"])
def test_a_visit_waits_for_the_update_of_a_block_in_hbm(placed, block):
    slots = weight_slots(placed, dtype=torch.bfloat16)
    placed.ledger.publish(3, 1)
    slots.begin([block], version=1)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(slots.acquire()), daemon=True)
    thread.start()
    thread.join(0.05)
    assert seen == []
    placed.weights[1].fill_(3.0)  # the update that version 1 stands for
    placed.ledger.publish(1, 1)
    thread.join(5)
    name = "w" if block == 1 else "tied"
    assert seen[0][0] == block and float(seen[0][1][name][0, 0]) == 3.0


def test_a_block_in_hbm_takes_part_in_the_cycle_of_states(placed):
    slots = weight_slots(placed, dtype=torch.bfloat16)
    slots.begin([1, 2], version=0)
    slots.acquire()
    with pytest.raises(RuntimeError, match="a walk begins while block 1 is in use"):
        slots.begin([0], version=0)
    slots.reset()
    slots.begin([1], version=0)
    assert slots.acquire()[0] == 1


def test_slots_can_be_given_back_and_made_for_another_placement(placed):
    slots = weight_slots(placed, dtype=torch.bfloat16)
    slots.free()
    placed.keep_in_hbm({0, 1, 2, 3})
    slots.make(2)
    assert all(slot.flat.numel() == 0 for slot in slots._slots)
    slots.begin([3, 0], version=0)
    _, params = slots.acquire()
    assert params["tied"].data_ptr() == placed.weights[1].data_ptr()
