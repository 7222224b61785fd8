"""How many layers keep more than a boundary: what fits, in the right order, and never at the host's expense."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horizon.config.schema import Recompute
from horizon.errors import BudgetError
from horizon.plan.activations import KEPT_FRAGMENTS, WorkingSet, choose_micro_batch, plan_activations
from horizon.plan.memory import Limits, Line, MemoryPlan

LAYERS, TOKENS, TOKEN_BYTES = 6, 10, 10
BOUNDARY, OUTPUTS, GRAPH = 100, 300, 680  # of one layer, for the whole step; a graph with what the allocator loses
WORKING = WorkingSet(50, 40, 20, kept_selective=OUTPUTS // TOKENS, kept_none=640 // TOKENS)
FIXED = WORKING.at(TOKENS) + 3 * BOUNDARY
NO_IDLE = [0] * (LAYERS + 2)


def shared(num_selective):
    """Bytes that the block at work takes no second time: its own outputs, less what the allocator loses."""
    return OUTPUTS - num_selective * OUTPUTS // KEPT_FRAGMENTS


def planned(room, idle=NO_IDLE, recompute=Recompute.auto, host=1 << 40):
    plan = MemoryPlan(LAYERS + 2, 0, (Line("device", "fixed", 0),), Limits(host, FIXED + room))
    return plan, plan_activations(plan, [TOKENS], TOKEN_BYTES, WORKING, idle, recompute)


def kept(found):
    kinds = [found.recompute.get(block, Recompute.full) for block in range(1, LAYERS + 1)]
    assert kinds == sorted(kinds, key=[Recompute.full, Recompute.selective, Recompute.none].index)
    return kinds.count(Recompute.selective), kinds.count(Recompute.none)


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (LAYERS * BOUNDARY, (0, 0)),
        (LAYERS * BOUNDARY + OUTPUTS - shared(1) - 1, (0, 0)),
        (LAYERS * BOUNDARY + OUTPUTS - shared(1), (1, 0)),
        (LAYERS * BOUNDARY + 2 * OUTPUTS - shared(2) - 1, (1, 0)),
        (LAYERS * BOUNDARY + 2 * OUTPUTS - shared(2), (2, 0)),
        (LAYERS * (BOUNDARY + OUTPUTS) - shared(6), (6, 0)),  # all layers keep outputs before one keeps its graph
        (LAYERS * (BOUNDARY + OUTPUTS) + 2 * (GRAPH - BOUNDARY - OUTPUTS) - shared(4), (4, 2)),
        (LAYERS * GRAPH, (0, 6)),
        (1 << 40, (0, 6)),
    ],
)
def test_the_last_layers_keep_what_fits(room, expected):
    _, found = planned(room)
    assert kept(found) == expected
    assert found.offloaded == frozenset()


def test_boundaries_leave_for_idle_buffers_so_that_more_layers_keep_their_outputs():
    idle = [1 << 20] * (LAYERS + 2)
    _, found = planned(LAYERS * BOUNDARY, idle)
    assert kept(found) == (2, 0) and len(found.offloaded) == 4 and found.host_bytes == 0
    _, found = planned(LAYERS * BOUNDARY)  # nothing is idle: no host memory is taken for it
    assert kept(found) == (0, 0) and found.offloaded == frozenset()


@pytest.mark.parametrize("recompute", [Recompute.selective, Recompute.none])
def test_what_was_asked_for_is_planned_or_refused_by_name(recompute):
    need = LAYERS * GRAPH if recompute is Recompute.none else LAYERS * OUTPUTS - shared(LAYERS)
    _, found = planned(need, [1 << 20] * (LAYERS + 2), recompute)
    assert set(found.recompute.values()) == {recompute} and len(found.recompute) == LAYERS
    with pytest.raises(BudgetError, match=f"memory.recompute=auto instead of {recompute}"):
        planned(need - 1, [1 << 20] * (LAYERS + 2), recompute)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, LAYERS * GRAPH + 200), st.lists(st.integers(0, 400), min_size=8, max_size=8))
def test_any_plan_fits_and_takes_no_more_host_memory_than_recomputing_all(room, idle):
    plan, found = planned(room, idle)
    _, full = planned(room, idle, Recompute.full)
    assert plan.with_activations(found.lines).num_bytes("device") <= FIXED + room
    assert found.host_bytes <= full.host_bytes
    assert full.recompute == {}
    graphs = [block for block, kind in found.recompute.items() if kind is Recompute.none]
    assert not found.offloaded & set(graphs)  # what has no boundary cannot send it away


def test_micro_batches_get_smaller_where_that_lets_layers_keep_more():
    working = WorkingSet(0, 100, 0, kept_selective=30)
    rows = 4096 * 2  # tokens of a row: one is already efficient
    plan = MemoryPlan(LAYERS + 2, 0, (), Limits(1 << 50, rows * (4 * 100 + 4 * (3 + LAYERS) * 10 + 290)))
    args = ([plan], 4, rows, 10, working, NO_IDLE)
    assert choose_micro_batch(*args) == 4
    assert choose_micro_batch(*args, Recompute.auto) == 1


@given(
    st.integers(0, LAYERS), st.lists(st.integers(1, 9000), min_size=1, max_size=6), st.integers(1, 500),
    st.integers(0, 500), st.integers(0, 1 << 20),
)  # fmt: skip
def test_work_beside_kept_outputs_takes_less_but_one_more_layer_that_keeps_never_less(n, tokens, own, more, base):
    working = WorkingSet(base, own + more, base // 2, kept_selective=own)

    def total(num_selective):
        kept = num_selective * sum(tokens) * own
        return kept + working.beside_kept(max(tokens), num_selective, sum(tokens))

    assert working.beside_kept(max(tokens), n, sum(tokens)) <= working.at(max(tokens))
    assert working.beside_kept(max(tokens), n, sum(tokens)) >= working.least
    assert total(n + 1) >= total(n)
