"""Steps that a disk has a part in, small enough to be worked out by hand; all times in seconds."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horizon.plan.lanes import BlockCost, StepCost, run_steps
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


def paged(work=1, read=10, write=10, pages=1, loaded=False):
    return UpdateCost(work_s=work, pages=pages, read_s=read, write_s=write, loaded=loaded)


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
    assert updates.read(5.0, 1.0) == 21  # both pages were asked for at 0; writes come later
    assert updates.published(0) == 11
    assert updates.read(100.0, 1.0) == 101


WORK, MOVES = st.sampled_from([0.0, 1.0, 4.0]), st.sampled_from([0.0, 1.0, 5.0])
UPDATES = st.one_of(
    st.builds(UpdateCost, work_s=WORK),
    st.builds(paged, work=WORK, read=MOVES, write=MOVES, pages=st.integers(1, 5), loaded=st.booleans()),
)


@st.composite
def steps(draw):
    num_blocks, as_landed = draw(st.integers(3, 6)), draw(st.booleans())
    blocks = [
        BlockCost(
            load_s=draw(st.sampled_from([0.0, 1.0])), staging_s=draw(st.sampled_from([0.0, 1.0, 5.0])),
            forward_s=(1.0 if b < num_blocks - 1 else 0.0,), backward_s=(2.0,), drain_s=0.5, buffers=(b,),
            update=draw(UPDATES),
        )
        for b in range(num_blocks)
    ]  # fmt: skip
    return StepCost(
        blocks=tuple(blocks), weight_slots=draw(st.integers(1, 3)), as_landed=as_landed,
        ring=3 if as_landed and draw(st.booleans()) else None, page_buffers=draw(st.integers(1, 12)),
        overlaps=draw(st.booleans()),
    )  # fmt: skip


@settings(deadline=None)
@given(steps())
def test_a_step_is_never_shorter_than_what_disk_and_threads_have_to_do(cost):
    total = sum(run_steps(cost).values()) + 1e-9
    updates = [block.update for block in cost.blocks]
    assert total >= sum(u.work_s for u in updates)
    assert total >= sum(u.read_s + u.write_s for u in updates if u.pages) + sum(b.staging_s for b in cost.blocks)
    assert all(seconds >= -1e-9 for seconds in run_steps(cost).values())


@settings(deadline=None)
@given(steps())
def test_without_a_disk_a_step_is_no_longer(cost):
    blocks = [replace(b, staging_s=0.0, update=UpdateCost(work_s=b.update.work_s)) for b in cost.blocks]
    assert sum(run_steps(replace(cost, blocks=tuple(blocks))).values()) <= sum(run_steps(cost).values()) + 1e-9
