"""Steps that a disk has a part in, small enough to be worked out by hand; all times in seconds."""

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from horizon.plan.bound import least_seconds
from horizon.plan.lanes import BlockCost, StepCost, _Lanes, run_steps
from horizon.plan.memory import RING_BUFFERS
from horizon.plan.spilled import SpilledBoundaries
from horizon.plan.updates import UpdateCost, Updates


def step(num_blocks=4, *, staging=0, update=None, **kw):
    """An embedding, layers and a head that take a second a pass; the head has no forward of its own."""
    blocks = [
        BlockCost(
            staging_s=staging, forward_s=(1 if b < num_blocks - 1 else 0,), backward_s=(1,), buffers=(b,),
            update=update or UpdateCost(),
        )
        for b in range(num_blocks)
    ]  # fmt: skip
    return StepCost(blocks=tuple(blocks), **kw)


def spent(cost):
    parts = run_steps(cost)
    return parts["arithmetic"], parts["link"], parts["optimizer"], parts["disk"]


def paged(work=1, read=10, write=10, pages=1, loaded=False, gradient=None):
    return UpdateCost(work_s=work, pages=pages, read_s=read, write_s=write, loaded=loaded, gradient_s=gradient)


def test_loads_from_disk_are_read_one_after_another_ahead_of_the_slots():
    # Six of the seven visits need one, as one block stays through the turn: read until 60, and a last backward.
    assert spent(step(staging=10)) == (7, 0, 0, 54)
    assert spent(step(staging=10, weight_slots=1)) == (7, 0, 0, 64)
    assert spent(step(staging=0.5)) == (7, 0, 0, 0.5)  # hidden behind the passes, but for the first


def test_a_load_is_read_when_one_of_two_buffers_is_free_again():
    # Copies end at 11, 21, 31, 41. The host comes back for the next two when compute has left both slots: 53 and 64.
    cost = step(staging=1)
    cost = replace(cost, blocks=tuple(replace(block, load_s=10) for block in cost.blocks))
    assert spent(cost) == (7, 0, 0, 58)  # it asked for all of them before they were read
    # Reads end at 9, 18, 28, 38, 48, 58: the first two one after another, others 9 after a copy gave its buffer back.
    slow = replace(cost, blocks=tuple(replace(block, staging_s=9) for block in cost.blocks))
    assert sum(run_steps(slow).values()) == 73


def test_a_disk_that_pages_of_updates_fill_is_what_a_step_takes():
    # Of four blocks: 80 of the disk, whose writes go on behind the next forward; updates and passes hide there.
    total = run_steps(step(update=paged()))
    assert sum(total.values()) == 80 and total["arithmetic"] == 7


def test_with_one_buffer_a_page_is_read_when_the_one_before_is_written():
    # Weights on disk are loaded when they are written: at 21, 42, 63, 84. Then the head and the layers, until 88.
    assert spent(step(update=paged(loaded=True), page_buffers=1)) == (7, 0, 4, 77)
    # Others when they are updated: at 11, 32, 53, 74; the last page is written until 84, and then the next step's read.
    assert sum(run_steps(step(update=paged(), page_buffers=1)).values()) == 84


def test_pages_of_a_block_are_read_while_those_before_are_worked_on():
    # Ten pages: read at 1, 2, ... 10, written between; work of 2 each begins at 1 and is what counts.
    cost = step(update=paged(work=20, read=5, write=5, pages=10))
    parts = run_steps(cost)
    assert parts["optimizer"] > 60 and parts["disk"] < 3
    assert sum(parts.values()) == pytest.approx(80 + 4, abs=3)  # the updates, the first read and the last passes


def test_blocks_in_memory_keep_their_turn_between_those_on_disk():
    updates = Updates(12)
    updates.submit(0, 0.0, paged(work=1, read=10, write=10))
    updates.submit(1, 0.0, UpdateCost(work_s=3))
    updates.submit(2, 0.0, paged(work=1, read=10, write=10, loaded=True))
    assert [updates.updated(b) for b in (0, 1, 2)] == [11, 14, 21]
    assert updates.published(2) == 40  # behind the first page, whose way back begins at 20
    assert updates.published(0) == 11


def test_a_load_waits_for_what_was_asked_of_the_disk_before_it():
    updates = Updates(12)
    updates.submit(0, 0.0, paged(read=10))
    updates.submit(1, 0.0, paged(read=10))
    assert updates.use_disk(5.0, 1.0) == 21  # both pages were asked for at 0; writes come later
    assert updates.published(0) == 11
    assert updates.use_disk(100.0, 1.0) == 101


def test_gradients_on_disk_are_written_through_three_buffers_and_read_when_one_is_free():
    cost = step(update=UpdateCost(work_s=1, gradient_s=0))
    blocks = [replace(block, spill_s=10) for block in cost.blocks]
    blocks[3] = replace(blocks[3], update=UpdateCost(work_s=1, gradient_s=10))  # it landed first
    # The head, 2 and 1 land at 4, 5, 6 and are written until 14, 24, 34; block 0 gets a buffer at 14 and is written
    # until 44. Then its buffer is free: the head's is read until 54 and updated until 55. Passes went on until 18.
    assert spent(replace(cost, blocks=tuple(blocks))) == (7, 0, 2, 36 + 7)


def test_a_fourth_gradient_waits_until_the_first_is_written_and_three_do_not():
    cost = step(update=UpdateCost(gradient_s=0))
    for spilled, waits in ((range(4), 7), (range(1, 4), 4)):
        blocks = [replace(b, spill_s=10 * (i == 3) if i in spilled else None) for i, b in enumerate(cost.blocks)]
        # The head's lands at 4 and is written until 14: compute comes to block 0 at 7, and to the next backward at 10.
        assert spent(replace(cost, blocks=tuple(blocks))) == (7, 0, 0, waits)


def test_a_buffer_that_is_still_being_written_is_not_given_to_what_is_wanted_next():
    asked = []
    boundaries = SpilledBoundaries(lambda at, seconds: asked.append(at) or at + seconds, [10], [10], buffers=1)
    boundaries.fill((1, 0), 1.0)
    assert boundaries.room() == boundaries.settled == 11
    boundaries.fill((2, 0), 11.0)
    boundaries.expect([(2, 0), (1, 0)], 12.0)
    assert boundaries.ready((2, 0)) == 0.0  # it is there still
    boundaries.release((2, 0), 13.0)
    assert asked == [1, 11, 21] and boundaries.ready((1, 0)) == 31


def test_what_is_updated_needs_its_gradient_and_its_states():
    updates = Updates(12)
    updates.submit(0, 0.0, UpdateCost(work_s=5, gradient_s=0), written=3.0)
    updates.submit(1, 0.0, paged(work=1, read=2, write=2, gradient=10))
    assert updates.updated(0) == 5
    assert updates.updated(1) == 16  # its states were read until 2, its gradient from 5 until 15
    assert updates.disk_wait(5.0, 16.0) == 10
    late = Updates(12)
    late.submit(0, 0.0, UpdateCost(work_s=5, gradient_s=0), written=30.0)
    late.submit(1, 0.0, UpdateCost(work_s=1, gradient_s=10))
    assert late.updated(1) == 41  # the buffer was not free before


def test_boundaries_on_disk_pass_through_four_buffers():
    cost = step(num_blocks=8, save_s=(0,), return_s=(0,), write_s=(10,), read_s=(10,))
    blocks = [replace(block, offloads=0 < b < 7) for b, block in enumerate(cost.blocks)]
    # Of layers 1 to 6 four are saved at 1, 2, 3, 4, the fifth when the first is written at 11, the sixth at 21. Those
    # four that are in buffers still come back at once; the others when the sixth is written, at 61: at 71 and 81.
    assert spent(replace(cost, blocks=tuple(blocks))) == (15, 0, 0, 6 + 9 + 44 + 9)


def test_a_step_begins_when_the_boundaries_of_the_one_before_are_on_disk_and_its_backward_when_gradients_are():
    cost = step(save_s=(0,), return_s=(0,), write_s=(20,), read_s=(20,))
    blocks = [replace(block, offloads=b == 1) for b, block in enumerate(cost.blocks)]
    assert spent(replace(cost, blocks=tuple(blocks))) == (7, 0, 0, 1 + 20 - 7)  # saved at 1, used, and written at 21
    cost = step(update=UpdateCost(gradient_s=0))
    blocks = [replace(block, spill_s=20 if b == 0 else None) for b, block in enumerate(cost.blocks)]
    assert spent(replace(cost, blocks=tuple(blocks))) == (7, 0, 0, 20 - 3)  # behind the next forward


WORK, MOVES = st.sampled_from([0.0, 1.0, 4.0]), st.sampled_from([0.0, 1.0, 5.0])
UPDATES = st.one_of(
    st.builds(UpdateCost, work_s=WORK),
    st.builds(paged, work=WORK, read=MOVES, write=MOVES, pages=st.integers(1, 5), loaded=st.booleans()),
)


@st.composite
def steps(draw):
    num_blocks, as_landed, parts = draw(st.integers(3, 6)), draw(st.booleans()), draw(st.integers(1, 3))
    spilled = frozenset() if as_landed else draw(st.frozensets(st.integers(0, num_blocks - 1)))
    read = sorted(spilled)[RING_BUFFERS:]
    boundaries = draw(st.tuples(*[MOVES] * parts)) if draw(st.booleans()) else ()

    def update(block):
        found = draw(UPDATES)
        return replace(found, gradient_s=draw(MOVES) if block in read else 0.0) if block in spilled else found

    blocks = [
        BlockCost(
            load_s=draw(st.sampled_from([0.0, 1.0])), staging_s=draw(st.sampled_from([0.0, 1.0, 5.0])),
            forward_s=(1.0 if b < num_blocks - 1 else 0.0,) * parts, backward_s=(2.0,) * parts, drain_s=0.5,
            buffers=(b,), update=update(b), spill_s=draw(MOVES) if b in spilled else None,
            offloads=0 < b < num_blocks - 1 and draw(st.booleans()),
        )
        for b in range(num_blocks)
    ]  # fmt: skip
    return StepCost(
        blocks=tuple(blocks), weight_slots=draw(st.integers(1, 3)), as_landed=as_landed,
        ring=3 if as_landed and draw(st.booleans()) else None, page_buffers=draw(st.integers(1, 12)),
        overlaps=draw(st.booleans()), save_s=(0.5,) * parts, return_s=(0.5,) * parts, write_s=boundaries,
        read_s=boundaries,
    )  # fmt: skip


def steady_seconds(cost):
    """Of a step, if it is like those that follow; with a disk every third step may differ from the two before."""
    lanes = _Lanes(cost)
    totals = [sum(lanes.run().values()) for _ in range(10)]
    assume(totals[-7:] == pytest.approx([totals[-1]] * 7))
    return totals[-1]


@settings(deadline=None)
@given(steps())
def test_a_step_is_never_shorter_than_what_disk_and_threads_have_to_do(cost):
    total = steady_seconds(cost) + 1e-9
    updates = [block.update for block in cost.blocks]
    assert total >= sum(u.work_s for u in updates)
    gradients = sum((u.gradient_s or 0) + (b.spill_s or 0) for u, b in zip(updates, cost.blocks, strict=True))
    written = sum(block.offloads for block in cost.blocks) * sum(cost.write_s)
    pages = sum(u.read_s + u.write_s for u in updates if u.pages)
    assert total >= pages + sum(b.staging_s for b in cost.blocks) + gradients + written
    assert total >= least_seconds(cost)
    assert all(seconds >= -1e-9 for seconds in run_steps(cost).values())


@settings(deadline=None)
@given(steps())
def test_without_a_disk_a_step_is_no_longer(cost):
    # Boundaries that return share the fetch lane with loads further ahead, which come early without a disk.
    cost = replace(cost, blocks=tuple(replace(block, offloads=False) for block in cost.blocks))
    blocks = [replace(b, staging_s=0.0, spill_s=None, update=UpdateCost(work_s=b.update.work_s)) for b in cost.blocks]
    without = replace(cost, blocks=tuple(blocks), write_s=(), read_s=())
    assert steady_seconds(without) <= steady_seconds(cost) + 1e-9
