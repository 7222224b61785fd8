"""Steps small enough to be worked out by hand; all times in seconds."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horizon.plan.bound import least_seconds
from horizon.plan.lanes import BlockCost, StepCost, _Lanes, run_steps
from horizon.plan.updates import UpdateCost


def step(num_blocks=4, *, load=0, forward=1, backward=1, drain=0, update=0, parts=1, offloaded=(), in_hbm=(), **kw):
    """An embedding, layers and a head that all take the same; the head has no forward of its own."""
    blocks = [
        BlockCost(
            load_s=0 if b in in_hbm else load,
            forward_s=(forward if b < num_blocks - 1 else 0,) * parts,
            backward_s=(backward,) * parts,
            drain_s=0 if b in in_hbm else drain,
            update=UpdateCost(work_s=update),
            buffers=(b,),
            offloads=b in offloaded,
            in_hbm=b in in_hbm,
        )
        for b in range(num_blocks)
    ]
    return StepCost(blocks=tuple(blocks), **kw)


def spent(cost):
    parts = run_steps(cost)
    return parts["arithmetic"], parts["link"], parts["optimizer"], parts["launch"]


def seconds(cost):
    return sum(run_steps(cost).values())


def changed(cost, block, **change):
    blocks = list(cost.blocks)
    blocks[block] = replace(blocks[block], **change)
    return replace(cost, blocks=tuple(blocks))


def test_arithmetic_alone_is_the_sum_of_all_passes():
    assert spent(step(parts=3)) == (3 * 7, 0, 0, 0)
    cost = step(host_s=0.5)
    assert spent(changed(cost, 1, close_s=2)) == (9, 0, 0, 0.5)


def test_two_slots_hold_the_last_layer_through_the_turn():
    # Loads end at 10, 20, 30, 40 (the head); then block 1 at 51, as the head leaves its slot at 41, and block 0 at 61.
    assert spent(step(load=10)) == (7, 55, 0, 0)


def test_one_slot_loads_every_visit_after_the_kernels_of_the_one_before():
    assert spent(step(load=10, weight_slots=1)) == (7, 7 * 10, 0, 0)


def test_three_slots_hold_two_layers_through_the_turn():
    assert spent(step(load=10, weight_slots=3)) == (7, 45, 0, 0)  # five loads, the last of them from 41 to 51


def test_layers_at_the_turn_are_loaded_once():
    # Five loads, the head's until 50. Block 2 is still in a slot for the backward; blocks 1 and 0 come from 51 to 71.
    assert spent(step(num_blocks=5, load=10, turn_layers=1)) == (9, 72 - 9, 0, 0)


def test_layers_at_the_turn_wait_for_all_of_their_updates_with_the_first_part():
    # Versions at 10, 20, 30, 40. Block 0 goes to 12; then the first part through blocks 1, 2 and the head and back.
    cost = step(update=10, parts=2, turn_layers=2)
    assert seconds(cost) == 40 + 3 + 5 + 2
    # Without a turn block 0 goes to 12, block 1 to 22, block 2 to 32 and the head from 40 on.
    assert seconds(replace(cost, turn_layers=0)) == 40 + 4 * 2


def test_layers_at_the_turn_send_their_gradients_when_the_last_part_has_come_back():
    cost = step(drain=10, parts=2, turn_layers=2, as_landed=True)
    # Block 0 goes to 2, the first part to 7, the second reaches the head's end at 10; then four gradients, one by one.
    assert spent(cost) == (14, 10 + 4 * 10 - 14, 0, 0)
    # A block in HBM below them waits for no slot, but block 1 did, from 12 until the head's was drained at 20.
    below = changed(step(drain=10, parts=2, turn_layers=2, as_landed=True, in_hbm=(0,)), 0, backward_s=(50, 50))
    assert seconds(below) == 20 + 2 * 50


def test_loads_hide_behind_longer_passes():
    # But for the first, which nothing can hide before the updates are done.
    assert spent(step(load=1, forward=5, backward=5)) == (35, 1, 0, 0)


def test_what_does_not_overlap_adds_up():
    # Six loads and four gradients.
    assert spent(step(load=10, drain=3, overlaps=False)) == (7, 6 * 10 + 4 * 3, 0, 0)


def test_exact_updates_are_followed_by_the_forward_block_by_block():
    # Versions at 10, 20, 30, 40; the head goes from 40 to 41, blocks 2, 1, 0 to 44.
    assert spent(step(update=10)) == (7, 0, 37, 0)
    # Backward does not overlap them: 40 + 4 x 10.
    assert seconds(step(update=10, backward=10)) == 80


def test_updates_as_gradients_land_run_beside_the_backward():
    # Blocks 3, 2, 1, 0 end at 13, 23, 33, 43, their updates each 10 later; then block 0 may be loaded.
    assert spent(step(update=10, backward=10, as_landed=True)) == (43, 0, 10, 0)
    # Updates that take longer than the backward are all that counts after the first gradient, at 4.
    assert seconds(step(update=10, as_landed=True)) == 4 + 4 * 10


def test_a_ring_of_buffers_holds_the_backward_back():
    cost = step(update=10, drain=5, as_landed=True)
    # Landed at 9, 14, 19, 24; updated one after another from 9 to 49.
    assert seconds(cost) == 49
    # With one buffer each gradient is drained when the one before has been used: 9, 19, 24, 34, 39, 49, 54, 64.
    assert seconds(replace(cost, ring=1)) == 64
    assert seconds(replace(cost, ring=4)) == 49


def test_a_tied_embedding_holds_a_buffer_of_the_ring_from_the_head_on():
    cost = changed(step(update=10, drain=5, as_landed=True, ring=2), 3, buffers=(3, 0))
    # The second of the two buffers is block 0's: others land at 9, 24 and 39, and it, after that, at 44.
    assert seconds(cost) == 59


def test_a_tied_embedding_fetches_the_head_s_share_of_its_gradient():
    assert spent(changed(step(drain=1, backward=5), 0, add_s=4)) == (23, 4 + 1, 0, 0)  # and the last one's way down


def test_a_third_gradient_waits_for_the_first_to_leave_its_slot():
    # Gradients are ready at 4, 5, and, as slots are drained at 14 and 24 and 34, at 15 and 25; the last lands at 44.
    assert spent(step(drain=10)) == (7, 37, 0, 0)


def test_offloaded_boundaries_leave_before_their_memory_is_used_again():
    cost = step(parts=2, offloaded=(1,), save_s=(5, 5), return_s=(0, 0))
    # Block 0 ends at 2, the copies at 7 and 12; meanwhile compute makes one pass, and another.
    assert spent(cost) == (14, 4 + 4, 0, 0)


def test_two_offloaded_boundaries_return_ahead_of_the_one_in_use():
    cost = step(num_blocks=3, parts=4, offloaded=(1,), save_s=(0,) * 4, return_s=(10,) * 4)
    # The head ends at 12; boundaries return from then on, each when the one two before is taken: 22, 32, 42, 52.
    assert seconds(cost) == 12 + 40 + 1 + 4


def test_blocks_in_hbm_are_neither_loaded_nor_drained():
    cost = step(load=10, drain=10, in_hbm=(0, 1, 2, 3))
    assert spent(cost) == (7, 0, 0, 0)


def test_blocks_in_hbm_are_updated_by_the_device():
    everything = (0, 1, 2, 3)
    assert spent(step(update=2, in_hbm=everything)) == (7, 0, 8, 0)  # ahead of the next forward
    assert spent(step(update=2, in_hbm=everything, as_landed=True)) == (7, 0, 8, 0)  # the host's blocks do not wait
    # As they land: beside the backward, but for the last one, whose block comes first.
    assert spent(step(update=2, in_hbm=everything, hbm_as_landed=True)) == (7, 0, 2, 0)


def test_frozen_blocks_at_the_bottom_end_the_backward():
    cost = step(load=10, first=2)
    cost = changed(changed(cost, 0, backward_s=(0,), buffers=()), 1, backward_s=(0,), buffers=())
    assert spent(cost) == (5, 37, 0, 0)  # loads of 0 to the head, then block 2 from its slot


TIMES = st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0])


@st.composite
def steps(draw, offloading=True):
    num_blocks, parts = draw(st.integers(3, 6)), draw(st.integers(1, 3))
    turn_layers = draw(st.integers(0, num_blocks - 2))
    per_part = st.tuples(*[TIMES] * parts)
    blocks = [
        BlockCost(
            load_s=draw(TIMES),
            forward_s=draw(per_part) if b < num_blocks - 1 else (0.0,) * parts,
            backward_s=draw(per_part),
            close_s=draw(TIMES),
            drain_s=draw(TIMES),
            add_s=draw(TIMES) if b == 0 else 0.0,
            update=UpdateCost(work_s=draw(TIMES)),
            buffers=(b,),
            offloads=offloading and 0 < b < num_blocks - 1 - turn_layers and draw(st.booleans()),
            in_hbm=draw(st.booleans()),
        )
        for b in range(num_blocks)
    ]
    as_landed = draw(st.booleans())
    return StepCost(
        blocks=tuple(blocks), weight_slots=draw(st.integers(1, 4)), save_s=draw(per_part), return_s=draw(per_part),
        as_landed=as_landed, ring=3 if as_landed and draw(st.booleans()) else None, host_s=draw(TIMES),
        turn_layers=turn_layers, hbm_as_landed=as_landed and draw(st.booleans()),
    )  # fmt: skip


@settings(deadline=None)
@given(steps())
def test_a_step_is_never_shorter_than_what_a_lane_has_to_do(cost):
    total = seconds(cost) + 1e-9
    assert total >= least_seconds(cost)
    assert total >= sum(sum(b.forward_s) + sum(b.backward_s) + b.close_s for b in cost.blocks) + cost.host_s
    away = [b for b in cost.blocks if not b.in_hbm]
    assert total >= sum(b.load_s for b in away)
    assert total >= sum(b.drain_s for b in away)
    assert total >= sum(b.update.work_s for b in away)


@settings(deadline=None)
@given(steps(), st.data())
def test_nothing_that_takes_longer_makes_a_step_shorter(cost, data):
    block = data.draw(st.integers(0, len(cost.blocks) - 1))
    name = data.draw(st.sampled_from(["load_s", "forward_s", "backward_s", "close_s", "drain_s", "add_s", "update"]))
    value = getattr(cost.blocks[block], name)
    if name == "update":
        longer = replace(value, work_s=value.work_s + 1)
    else:
        longer = tuple(v + 1 for v in value) if isinstance(value, tuple) else value + 1
    assert seconds(changed(cost, block, **{name: longer})) >= seconds(cost) - 1e-9
    for name in ("save_s", "return_s"):
        assert seconds(replace(cost, **{name: tuple(v + 1 for v in getattr(cost, name))})) >= seconds(cost) - 1e-9
    assert seconds(replace(cost, host_s=cost.host_s + 1)) >= seconds(cost) - 1e-9


@settings(deadline=None)
@given(steps(offloading=False))
def test_more_slots_never_make_a_step_longer(cost):
    # Boundaries that return share the fetch lane with loads further ahead, and may come later for it.
    assert seconds(replace(cost, weight_slots=cost.weight_slots + 1)) <= seconds(cost) + 1e-9


@settings(deadline=None)
@given(steps())
def test_every_step_after_the_settling_ones_is_like_the_one_before(cost):
    lanes = _Lanes(cost)
    totals = [sum(lanes.run().values()) for _ in range(8)]
    assert totals[3:] == pytest.approx([seconds(cost)] * 5)
