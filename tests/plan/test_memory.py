import re
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horizon.config.schema import Moments, NvmeEngine
from horizon.errors import BudgetError
from horizon.layout import ParamSpec, place_block
from horizon.plan.activations import WorkingSet, boundary_sizes, choose_micro_batch, own_bytes, plan_activations
from horizon.plan.memory import Limits, Line, MemoryNeeds, MemoryPlan, plan_memory
from horizon.store import tiers
from horizon.store.gradients import make_buffers
from horizon.store.host import HostStore
from horizon.store.nvme import NvmeFolder
from horizon.store.offload import OffloadSpace
from horizon.stream.gradients import GradientSlots
from horizon.stream.slots import WeightSlots
from horizon.stream.streams import Streams
from horizon.units import GIB, MIB, parse_bytes

EMBED = place_block(0, "embed", [ParamSpec("e", "e", (100, 64))])  # 6400 elements, 8192 with padding
LAYER = place_block(1, "layer", [ParamSpec("w", "w", (64, 64)), ParamSpec("f", "f", (50,), False)])  # 4096, then 2048
HEAD = place_block(2, "head", [ParamSpec("n", "n", (64,))], [("lm", 0, EMBED.params[0])])  # 2048; 10240 in a slot
LAYOUTS = (EMBED, LAYER, HEAD)
PLENTY = Limits(host=1 << 50, device=1 << 50)
BF16, FP32, CPU = torch.bfloat16, torch.float32, torch.device("cpu")


def needs(compute=BF16, grad=BF16, keeps=True, weight_slots=2, moments=Moments.float32):
    return MemoryNeeds(
        LAYOUTS, compute, grad, keeps, weight_slots, host_overhead=1000, device_overhead=500, moments=moments
    )


def lines(plan):
    return [(line.tier, line.purpose, line.num_bytes) for line in (*plan.lines, *plan.activations)]


def test_the_fixed_memory_of_a_known_layout():
    plan = plan_memory(needs(), PLENTY)
    assert lines(plan) == [
        ("host", "weights (bf16)", 2 * (8192 + 6144 + 2048)),
        ("host", "residual (low halves)", 2 * (8192 + 6144 + 2048)),
        ("host", "exp_avg, exp_avg_sq (fp32)", 8 * (8192 + 4096 + 2048)),
        ("host", "gradients", 2 * (8192 + 4096 + 2048)),
        ("host", "framework", 1000),
        ("device", "weight slots (2)", 2 * 2 * 10240),
        ("device", "gradient slots", 10240 * (4 + 2 * 2)),  # the fp32 sum and two drain slots
        ("device", "framework and buffers", 500),
    ]
    assert (plan.num_blocks, plan.num_parameters) == (3, 6400 + 4096 + 50 + 64)
    assert plan.num_bytes("host") == 32768 + 32768 + 114688 + 28672 + 1000
    assert plan.num_bytes("device") == 40960 + 81920 + 500


@pytest.mark.parametrize(
    ("change", "purpose", "num_bytes"),
    [
        ({"moments": Moments.bfloat16}, "exp_avg, exp_avg_sq (bf16)", 4 * 14336),
        ({"moments": Moments.int8}, "exp_avg, exp_avg_sq (int8, scales)", 2 * 14336 + 2 * 4 * 14336 // 64),
        ({"keeps": False}, "gradient ring", 3 * 8192 * 2),
        ({"grad": FP32}, "gradients", 4 * 14336),
        ({"grad": FP32}, "gradient slots", 10240 * 2 * 4),  # sums are made in a drain slot
        ({"compute": FP32}, "weight slots (2)", 2 * 10240 * (4 + 2 + 2)),  # both halves and what they make
        ({"weight_slots": 5}, "weight slots (5)", 5 * 2 * 10240),
    ],
)
def test_what_a_setting_changes(change, purpose, num_bytes):
    assert {p: n for _, p, n in lines(plan_memory(needs(**change), PLENTY))}[purpose] == num_bytes


@pytest.mark.parametrize("compute", [BF16, FP32])
@pytest.mark.parametrize("grad", [BF16, FP32])
@pytest.mark.parametrize(("keeps", "moments"), [(True, "float32"), (False, "float32"), (True, "int8")])
@pytest.mark.parametrize("in_hbm", [(), (0,), (0, 1), (0, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("turn_layers", [0, 1])
def test_what_is_allocated_is_what_was_planned(compute, grad, keeps, moments, in_hbm, turn_layers):
    """Exactly on the device; on the host up to the page and huge page that a mapping is rounded up to."""
    planned = replace(
        needs(compute, grad, keeps, moments=Moments(moments)), in_hbm=frozenset(in_hbm), turn_layers=turn_layers
    )
    taken = []
    zeros = torch.zeros

    def counting_zeros(*shape, **kwargs):
        result = zeros(*shape, **kwargs)
        taken.append(result.nbytes if "device" in kwargs else 0)
        return result

    class Counting(Streams):
        def empty(self, *shape, dtype):
            result = super().empty(*shape, dtype=dtype)
            taken.append(result.nbytes)
            return result

    streams = Counting.on(CPU)
    with mock.patch.object(tiers.torch, "zeros", counting_zeros):
        store = HostStore(LAYOUTS, False, False, CPU, planned.in_hbm, planned.moments)
        buffers = make_buffers(planned, False, CPU, store.ledger, NvmeFolder("", NvmeEngine.auto))
    WeightSlots(streams, store, planned.weight_slots, compute, planned.turn)
    GradientSlots(streams, LAYOUTS, buffers, turn=planned.turn)
    plan = plan_memory(planned, PLENTY)
    assert sum(taken) == plan.num_bytes("device") - planned.device_overhead
    host = plan.num_bytes("host") - planned.host_overhead
    mappings = sum(store.num_bytes.values()) + buffers.num_bytes
    assert 0 <= mappings - host < 7 * 2 * MIB
    buffers.close()
    store.close()


def test_the_table_names_every_line_and_both_peaks():
    table = plan_memory(needs(keeps=False), Limits(2 * MIB, 3 * MIB)).table()
    assert table.splitlines()[0] == "3 blocks, 10,610 parameters"
    for purpose in ("weights (bf16)", "gradient ring", "weight slots (2)", "framework"):
        assert purpose in table
    assert re.search(r"host +predicted peak +225 KiB +of 2 MiB", table)
    assert re.search(r"device +predicted peak +120 KiB +of 3 MiB", table)


def smallest(error, key):
    """The budget that the message says would work."""
    match = re.search(rf"the smallest {re.escape(key)} that works is (\S+) ", str(error))
    assert match, error
    return parse_bytes(match[1], key)


@pytest.mark.parametrize(
    ("limits", "tier", "key"),
    [
        (Limits(150_000, 1 << 40), "host", "memory.host_budget"),
        (Limits(1 << 40, 100_000), "device", "memory.device_budget"),
    ],
)
def test_what_does_not_fit_is_refused_naming_tier_parts_shortfall_and_remedy(limits, tier, key):
    with pytest.raises(BudgetError) as caught:
        plan_memory(needs(), limits)
    message = str(caught.value)
    assert "\n" not in message
    expected = {
        "host": "needs 205 KiB of host memory (weights (bf16) 32 KiB, residual (low halves) 32 KiB, "
        "exp_avg, exp_avg_sq (fp32) 112 KiB, gradients 28 KiB, framework 1000 B) but 146 KiB is allowed, "
        "58.5 KiB too little; ",
        "device": "needs 120 KiB of device memory (weight slots (2) 40 KiB, gradient slots 80 KiB, framework and "
        "buffers 500 B) but 97.7 KiB is allowed, 22.8 KiB too little; ",
    }
    assert message.startswith(expected[tier])
    assert f"the smallest {key} that works is " in message
    assert ("optim.moments=int8" if tier == "host" else "fewer memory.weight_slots") in message


def raised(limits, error):
    """The limits with the budget that an error asks for."""
    if ".host_budget" in str(error):
        assert smallest(error, "memory.host_budget") > limits.host
        return Limits(smallest(error, "memory.host_budget"), limits.device)
    assert smallest(error, "memory.device_budget") > limits.device
    return Limits(limits.host, smallest(error, "memory.device_budget"))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300_000), st.integers(1, 300_000), st.booleans(), st.integers(1, 4))
def test_the_budget_that_an_error_names_works(host, device, keeps, weight_slots):
    wanted, limits, refused = needs(keeps=keeps, weight_slots=weight_slots), Limits(host, device), []
    for _ in range(3):
        try:
            plan = plan_memory(wanted, limits)
        except BudgetError as error:
            refused.append(str(error).split()[4])
            limits = raised(limits, error)
    assert plan.limits == limits
    assert len(refused) == len(set(refused)) <= 2  # each tier asks once


def fixed(num_layers, limits, host=0, device=0):
    """A plan of so many layers whose fixed memory is given."""
    return MemoryPlan(num_layers + 2, 0, (Line("host", "all", host), Line("device", "all", device)), limits)


def test_boundaries_stay_on_the_device_while_it_has_room():
    plan = fixed(4, Limits(10_000, 1000 + 100 + 3 * 120 + 2 * 120 + 119), device=1000)
    found = plan_activations(plan, [7, 5], 10, WorkingSet(base=30, per_token=10, least=50), idle=[0] * 6)
    assert found.offloaded == {3, 4}  # inputs of the last layers
    assert lines(plan.with_activations(found.lines))[2:] == [
        ("host", "offloaded activations", 4 * 256),  # two blocks, two micro-batches, rounded up
        ("device", "block at work (7 tokens)", 30 + 7 * 10),
        ("device", "hidden states", 3 * 120),
        ("device", "boundaries of 2 blocks", 2 * 120),
    ]
    assert found.host_bytes == 4 * 256


def test_with_plenty_of_room_nothing_is_offloaded():
    found = plan_activations(fixed(4, PLENTY), [7, 5], 10, WorkingSet(0, 0, 0), idle=[0] * 6)
    assert (found.offloaded, found.host_bytes) == (frozenset(), 0)


def test_idle_gradient_buffers_cost_no_host_memory():
    plan = fixed(2, Limits(0, 1000), device=640)  # room for what passes, not for boundaries
    found = plan_activations(plan, [12], 10, WorkingSet(0, 0, 0), idle=[256, 256, 0, 0])
    assert (found.offloaded, found.host_bytes) == ({1, 2}, 0)


def test_the_working_set_is_a_line_above_the_heads_chunk():
    working = WorkingSet(base=100, per_token=3, least=400)
    assert [working.at(tokens) for tokens in (0, 100, 101)] == [400, 400, 403]


CASES = st.tuples(
    st.integers(1, 6),  # layers
    st.lists(st.integers(1, 60), min_size=1, max_size=3),  # tokens
    st.integers(0, 5000),  # device room beyond the fixed part
    st.integers(0, 5000),  # host room
    st.lists(st.sampled_from([0, 256, 600, 2048]), min_size=8, max_size=8),
)


@settings(max_examples=300, deadline=None)
@given(CASES)
def test_a_plan_of_activations_fits_or_names_the_budget_that_does(case):
    num_layers, tokens, device, host, idle = case
    working, idle = WorkingSet(10, 5, 100), idle[: num_layers + 2]
    limits, refused = Limits(host, device), []
    for _ in range(3):
        plan = fixed(num_layers, limits)
        try:
            found = plan_activations(plan, tokens, 16, working, idle)
        except BudgetError as error:
            refused.append(str(error).split()[4])
            limits = raised(limits, error)
    assert len(refused) == len(set(refused)) <= 2
    full = plan.with_activations(found.lines)
    assert full.num_bytes("host") <= limits.host and full.num_bytes("device") <= limits.device
    sizes = boundary_sizes(found.offloaded, tokens, 16)
    assert sum(sizes.values()) + (num_layers - len(found.offloaded)) * sum(tokens) * 16 == num_layers * sum(tokens) * 16
    assert found.host_bytes == own_bytes(sizes, idle)


@settings(max_examples=100, deadline=None)
@given(CASES, st.integers(0, 6))
def test_the_space_that_boundaries_take_is_what_was_planned(case, stay):
    num_layers, tokens, _, _, idle = case
    plan, idle = fixed(num_layers, Limits(1 << 40, 16 * sum(tokens) * (3 + stay))), idle[: num_layers + 2]
    found = plan_activations(plan, tokens, 16, WorkingSet(0, 0, 0), idle)
    assert len(found.offloaded) == max(0, num_layers - stay)
    space = OffloadSpace(pin=False)
    space.regions(boundary_sizes(found.offloaded, tokens, 16), [torch.empty(n, dtype=torch.uint8) for n in idle])
    assert (0 if space._own is None else space._own.regions[0].numel()) == found.host_bytes
    space.close()


def test_a_micro_batch_is_the_whole_batch_where_that_fits():
    assert choose_micro_batch([fixed(4, PLENTY)], 12, 100, 10, WorkingSet(0, 1, 0), idle=[0] * 6) == 12


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 24), st.integers(1, 40_000), st.integers(100, 100_000_000))
def test_the_chosen_micro_batch_divides_the_batch_and_fits_if_anything_does(batch_size, seq_len, device):
    plan, working = fixed(4, Limits(1 << 40, device)), WorkingSet(0, 100, 0)

    def fits(rows):
        try:
            plan_activations(plan, [rows * seq_len] * (batch_size // rows), 10, working, [0] * 6)
        except BudgetError:
            return False
        return True

    try:
        rows = choose_micro_batch([plan], batch_size, seq_len, 10, working, idle=[0] * 6)
    except BudgetError:
        assert not any(fits(rows) for rows in range(1, batch_size + 1) if batch_size % rows == 0)
    else:
        assert batch_size % rows == 0 and fits(rows)


def test_micro_batches_are_made_smaller_where_that_saves_gigabytes_of_host_memory():
    """4 rows of 8192 tokens at work leave no room for boundaries; one row at a time leaves room for all of them."""
    seq_len, token_bytes, per_token = 8192, 16 * 1024, 1024 * 1024
    boundary = 4 * seq_len * token_bytes
    limits = Limits(1 << 50, seq_len * per_token + (3 + 16) * boundary)
    working = WorkingSet(0, per_token, 0)
    assert choose_micro_batch([fixed(16, limits)], 4, seq_len, token_bytes, working, [0] * 18) == 1
    wide = Limits(1 << 50, 4 * seq_len * per_token + (3 + 16) * boundary)
    assert choose_micro_batch([fixed(16, wide)], 4, seq_len, token_bytes, working, [0] * 18) == 4
    assert 16 * boundary > 2 * GIB
