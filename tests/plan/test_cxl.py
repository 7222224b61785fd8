"""The cxl tier as settings ask for it, and what goes there."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horizon import MemoryConfig
from horizon.config.schema import Moments, Policy, SimulatedCxl, Tier, TierRule
from horizon.errors import BudgetError, ConfigError
from horizon.plan.activations import WorkingSet, plan_activations
from horizon.plan.cost import Rates, _host_update_s
from horizon.plan.cxl import NO_CXL, CxlTier, read_cxl
from horizon.plan.memory import Limits, MemoryNeeds, fixed_lines, plan_memory
from horizon.plan.placement import Placer, read_policy
from horizon.plan.topology import Node, Topology
from horizon.units import GIB
from tests.plan.test_placement import BF16, CPU, FP32, TIED, UNTIED

TWO_AND_TWO = Topology(tuple(Node(n, (n,) if n < 2 else (), 64 * GIB, 48 * GIB) for n in range(4)))
ONE = Topology((Node(0, (0, 1), 64 * GIB, 48 * GIB),))
CXL = CxlTier(1 << 40, nodes=(2, 3), dram_nodes=(0, 1), boundaries=True)
LEVELS = ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale", "residual", "weights", "grads")


def memory(policy="cxl_aware", size=None, **changes):
    return MemoryConfig(policy=policy, cxl_simulated=SimulatedCxl(size=size), **changes)


def needs(layouts=UNTIED, grad=BF16, keeps=True, moments=Moments.float32, cxl=CXL):
    return MemoryNeeds(layouts, grad, grad, keeps, 2, host_overhead=1000, device_overhead=500, moments=moments, cxl=cxl)


def total(wanted, tier):
    return sum(line.num_bytes for line in fixed_lines(wanted) if line.tier == tier)


# ---- settings


def test_the_memory_only_nodes_are_striped_and_dram_is_bound_to_the_others():
    found = read_cxl(memory(), TWO_AND_TWO)
    assert found == CxlTier(96 * GIB, (2, 3), (0, 1), boundaries=True)
    assert (found.nodes_of(Tier.cxl), found.nodes_of(Tier.dram)) == ((2, 3), (0, 1))
    assert read_cxl(memory(cxl_nodes=[3], cxl_budget="8GiB"), TWO_AND_TWO) == CxlTier(
        8 * GIB, (3,), (0, 1), boundaries=True
    )


def test_interleaving_is_over_all_nodes():
    found = read_cxl(memory("interleave"), TWO_AND_TWO)
    assert found.nodes_of(Tier.cxl) == found.nodes_of(Tier.dram) == (0, 1, 2, 3)
    assert found.share == 0.5
    assert read_cxl(memory("interleave", cxl_nodes=[3]), TWO_AND_TWO).share == pytest.approx(1 / 3)


def test_other_policies_bind_dram_where_there_is_a_choice_and_the_system_lets_them():
    for policy in (Policy.dram, Policy.auto, Policy.hbm_first):
        assert read_cxl(memory(policy), TWO_AND_TWO) == CxlTier(dram_nodes=(0, 1))
        assert read_cxl(memory(policy), TWO_AND_TWO, bindable=False) == NO_CXL
        assert read_cxl(memory(policy), ONE) == read_cxl(memory(policy), Topology(())) == NO_CXL


def test_a_stand_in_needs_no_nodes_and_says_what_it_is():
    found = read_cxl(memory(size="2GiB"), ONE)
    assert (found.num_bytes, found.nodes, found.dram_nodes, found.name) == (2 * GIB, (), (), "cxl (simulated)")
    assert found.simulated and "simulated" in found.describe() and "20 GB/s" in found.describe()
    assert read_cxl(memory("interleave", "2GiB"), ONE).share == 0.5
    assert CXL.name == "cxl"


@pytest.mark.parametrize(
    ("given", "topology", "message"),
    [
        (memory(), ONE, r"no memory-only NUMA node is online here, found node 0 \(2 CPUs, 64 GiB\)"),
        (memory(cxl_nodes=[7]), TWO_AND_TWO, r"node 7 is not online or has no memory, found node 0 .* node 3"),
        (memory("dram", cxl_nodes=[2]), TWO_AND_TWO, r"memory\.cxl_nodes has no use with memory\.policy=dram"),
        (memory("auto", cxl_budget="1GiB"), TWO_AND_TWO, r"memory\.cxl_budget has no use with memory\.policy=auto"),
        (
            memory("auto", size="1GiB"),
            ONE,
            r"cxl_simulated\.size has no use with .*use cxl_aware or interleave, or a rule",
        ),
        (memory(size="1GiB", cxl_nodes=[2]), TWO_AND_TWO, r"memory\.cxl_simulated\.size with memory\.cxl_nodes"),
        (memory(size="1GiB", cxl_budget="1GiB"), ONE, r"memory\.cxl_simulated\.size with"),
        (memory(size="none"), ONE, r"memory\.cxl_simulated\.size='none' is not a size"),
    ],
)
def test_settings_that_cannot_work_are_refused(given, topology, message):
    with pytest.raises(ConfigError, match=message):
        read_cxl(given, topology)


def test_a_rule_that_names_the_tier_is_enough():
    ruled = memory("auto", rules=[TierRule(state="exp_avg*", tier=Tier.cxl)], cxl_budget="8GiB")
    assert read_cxl(ruled, TWO_AND_TWO) == CxlTier(8 * GIB, (2, 3), (0, 1))
    placed = read_policy(ruled, CPU, True, 4).place(needs(), Limits(1 << 40, 1 << 40, cxl=CXL), 0).placed
    assert placed == {(state, block): Tier.cxl for state in ("exp_avg", "exp_avg_sq") for block in range(4)}
    with pytest.raises(ConfigError, match=r"memory\.rules with memory\.policy=cxl_aware"):
        read_policy(memory(rules=[TierRule(tier=Tier.cxl)]), CPU, True, 4)


@pytest.mark.parametrize("pace", [0.0, -1.0, math.nan])
def test_a_stand_in_that_never_ends_is_refused(pace):
    config = MemoryConfig(policy="cxl_aware", cxl_simulated=SimulatedCxl(size="1GiB", gb_per_s=pace))
    with pytest.raises(ConfigError, match=r"cxl_simulated\.gb_per_s must be > 0"):
        read_cxl(config, ONE)


# ---- what goes there

CASES = st.tuples(
    st.sampled_from([UNTIED, TIED]), st.sampled_from([BF16, FP32]), st.booleans(), st.sampled_from(list(Moments)),
    st.integers(0, 600_000),
)  # fmt: skip


def sizes_of(wanted):
    """(level, state, block) -> bytes, of kept gradients."""
    sizes = {
        (LEVELS.index(s.name), s.name, lay.index): s.num_bytes(lay) for s in wanted.states for lay in wanted.layouts
    }
    return sizes | {(6, "grads", lay.index): lay.num_trainable * wanted.grad_dtype.itemsize for lay in wanted.layouts}


@settings(max_examples=300, deadline=None)
@given(CASES)
def test_dram_is_filled_in_the_order_of_the_levels(case):
    layouts, grad, keeps, moments, host = case
    wanted, limits = needs(layouts, grad, keeps, moments), Limits(host, 1 << 40, cxl=CXL)
    found = Placer(Policy.cxl_aware).place(wanted, limits, reserve=0)
    assert set(found.placed.values()) <= {Tier.cxl}
    everything = total(wanted, "host")
    assert total(found, "host") + total(found, "cxl") == everything
    assert total(found, "host") <= max(host, wanted.host_overhead)
    if everything <= host:
        assert not found.placed
    if keeps:
        room = host - wanted.host_overhead
        for (_, state, block), num_bytes in sorted(sizes_of(wanted).items()):
            fits = num_bytes <= room
            assert (found.tier(state, block) is Tier.dram) is fits, (state, block)
            room -= num_bytes * fits
    else:
        assert len({found.tier("grads", lay.index) for lay in layouts}) == 1  # one ring


@settings(max_examples=100, deadline=None)
@given(CASES, st.integers(1, 9), st.integers(1, 9))
def test_interleaving_shares_every_line_by_the_numbers_of_nodes(case, num_dram, num_cxl):
    layouts, grad, keeps, moments, host = case
    cxl = CxlTier(1 << 40, tuple(range(num_dram, num_dram + num_cxl)), tuple(range(num_dram)), None, True)
    wanted = needs(layouts, grad, keeps, moments, cxl)
    found = Placer(Policy.interleave).place(wanted, Limits(host, 1 << 40, cxl=cxl), 0)
    assert found == wanted
    states = total(needs(layouts, grad, keeps, moments, NO_CXL), "host") - 1000
    assert total(found, "cxl") == pytest.approx(states * num_cxl / (num_dram + num_cxl), abs=8)
    assert total(found, "host") + total(found, "cxl") == states + 1000


@pytest.mark.parametrize("host", range(0, 500_000, 20_000))
def test_gradients_that_grow_move_no_state(host):
    limits = Limits(host, 1 << 40, cxl=CXL)
    before = Placer(Policy.cxl_aware).place(needs(), limits, 0)
    after = Placer(Policy.cxl_aware).make_room(needs(grad=FP32), limits, 0)

    def states(placed):
        return {place for place in placed if place[0] != "grads"}

    assert states(before.placed) == states(after.placed)
    assert total(after, "cxl") >= total(before, "cxl")


@pytest.mark.parametrize("cxl", [CXL, CxlTier(1 << 40, bytes_per_s=1e9)], ids=["nodes", "simulated"])
def test_the_table_names_the_tier_and_what_does_not_fit_is_refused_by_its_setting(cxl):
    limits = Limits(110_000, 1 << 40, cxl=cxl)
    wanted = Placer(Policy.cxl_aware).place(needs(cxl=cxl), limits, 0)
    table = plan_memory(wanted, limits).table()
    rows = [line for line in table.splitlines() if line.startswith(f"  {cxl.name}  ")]
    assert [row.split("  ")[-1].strip() or row for row in rows] and any("predicted peak" in row for row in rows)
    assert ("simulated" in table) is cxl.simulated
    tight = CxlTier(100, cxl.nodes, cxl.dram_nodes, cxl.bytes_per_s)
    with pytest.raises(
        BudgetError, match=r"of cxl.* memory \(.*too little; the smallest (memory\.\S+) that works"
    ) as e:
        plan_memory(wanted, Limits(110_000, 1 << 40, cxl=tight))
    assert ("memory.cxl_simulated.size" if cxl.simulated else "memory.cxl_budget") in str(e.value)


def test_a_simulated_tier_is_named_where_nothing_is_on_it_too():
    cxl = CxlTier(1 << 40, bytes_per_s=1e9)
    assert "simulated" in plan_memory(needs(cxl=cxl), Limits(1 << 40, 1 << 40, cxl=cxl)).table()


@pytest.mark.parametrize(
    ("cxl", "expected"),
    [
        (NO_CXL, {"host": 8192}),
        (CXL, {"cxl": 8192}),
        (CxlTier(1 << 40, (1,), (0,), None, True), {"host": 4096, "cxl": 4096}),
    ],
    ids=["none", "aware", "interleaved"],
)
def test_offloaded_boundaries_take_no_dram_that_states_could_have(cxl, expected):
    fixed = plan_memory(needs(cxl=cxl), Limits(1 << 40, 1 << 40, cxl=cxl))
    fixed = plan_memory(needs(cxl=cxl), Limits(1 << 40, fixed.num_bytes("device") + 3 * 4096 + 4095, cxl=cxl))
    planned = plan_activations(fixed, [64], 64, WorkingSet(0, 0, 0), idle=[0] * 4)
    lines = {line.tier: line.num_bytes for line in planned.lines if line.purpose == "offloaded activations"}
    assert {tier: num for tier, num in lines.items() if num} == expected
    assert planned.host_bytes == 8192


def test_an_update_takes_as_long_as_the_slower_of_its_tiers():
    layout = UNTIED[1]  # 4096 trained elements
    rates = Rates(
        up_bytes_per_s=1, down_bytes_per_s=1, device_bytes_per_s=1, updates_per_s=4096, overlaps=True,
        cxl_bytes_per_s=4096.0,
    )  # fmt: skip
    assert _host_update_s(layout, needs(), rates) == 1.0
    placed = needs()
    placed.placed.update({("grads", 1): Tier.cxl})
    assert _host_update_s(layout, placed, rates) == 2.0  # read only
    placed.placed.update({("exp_avg", 1): Tier.cxl})
    assert _host_update_s(layout, placed, rates) == 10.0
    interleaved = needs(cxl=CxlTier(1 << 40, (1,), (0,), None, True))
    assert _host_update_s(layout, interleaved, rates) == 13.0
