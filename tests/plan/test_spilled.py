"""Where gradients and activations wait: what rules, policies and budgets say, and what it weighs."""

from dataclasses import replace

import pytest

from horizon.config.schema import Moments, Policy, Recompute, Tier, TierRule
from horizon.errors import BudgetError, ConfigError
from horizon.layout import ParamSpec, place_block
from horizon.plan.activations import WorkingSet, choose_micro_batch, plan_activations
from horizon.plan.disk import BOUNDARY_BUFFERS, DISK_BLOCK
from horizon.plan.memory import RING_BUFFERS, Limits, MemoryPlan, fixed_lines, plan_memory
from horizon.plan.placement import Placer
from horizon.plan.policies import apply_rules, spill, tier_bytes
from horizon.plan.traffic import least_traffic
from tests.plan.test_placement import BF16, FP32, TIED, UNTIED, needs

BLOCKS = range(4)
PLENTY = Limits(1 << 50, 1 << 50, nvme=1 << 50)
ELEMENTS = {0: 8192, 1: 4096, 2: 4096, 3: 8192}  # that train


def rule(state="*", tier=Tier.nvme, **others):
    return TierRule(state=state, tier=tier, **others)


def placed(*rules, **changes):
    return apply_rules(rules, (), needs(**changes))


def test_a_rule_places_gradients_of_the_blocks_that_it_names():
    assert placed(rule("grads")).grads_on_nvme == set(BLOCKS)
    assert placed(rule("grads", blocks="0,l*")).grads_on_nvme == {0, 1, 2}
    assert placed(rule("grads", blocks="1"), rule("g*", Tier.dram, blocks="2")).placed == {("grads", 1): Tier.nvme}
    assert placed(rule("grads", Tier.cxl)).placed == {("grads", block): Tier.cxl for block in BLOCKS}
    assert not placed(rule("grads")).on_nvme  # which is of states alone


def test_a_rule_for_everything_is_one_for_gradients_and_activations_too():
    every = placed(rule())
    assert every.grads_on_nvme == set(BLOCKS) and every.boundaries is Tier.nvme
    assert {name for name, _ in every.on_nvme} == {"weights", "residual", "exp_avg", "exp_avg_sq"}
    some = placed(rule(blocks="1-2"))
    assert some.grads_on_nvme == {1, 2} and some.boundaries is Tier.dram
    assert placed(rule(tier=Tier.cxl)).boundaries is Tier.dram
    assert placed(rule("activations", Tier.dram), rule()).boundaries is Tier.dram
    assert placed(rule(blocks="0", tier=Tier.hbm), rule()).grads_on_nvme == {1, 2, 3}


def test_gradients_that_do_not_wait_have_no_place():
    ring = placed(rule(), keeps=False)
    assert not ring.grads_on_nvme and ring.on_nvme
    with pytest.raises(ConfigError, match=r"rules\[0\] .* decides nothing: .*no grads, which do not wait"):
        placed(rule("grads"), keeps=False)


@pytest.mark.parametrize("placer", [Placer(Policy.nvme_all), Placer(Policy.dram, rules=(rule(),))], ids=str)
def test_gradients_that_come_to_wait_get_their_place_then_and_states_stay(placer):
    ring = placer.place(needs(keeps=False), PLENTY, 0)
    kept = placer.make_room(replace(ring, keeps_gradients=True, grad_dtype=FP32), PLENTY, 0)
    assert kept.on_nvme == ring.on_nvme
    assert kept.grads_on_nvme == set(BLOCKS)


def test_nvme_optimizer_leaves_gradients_and_activations():
    found = Placer(Policy.nvme_optimizer).place(needs(), PLENTY, 0)
    assert not found.grads_on_nvme and found.boundaries is Tier.dram and found.on_nvme


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_what_gradients_on_nvme_weigh(dtype):
    found = placed(rule("grads", blocks="1-3"), grad=dtype, compute=BF16)
    lines = {(line.tier, line.purpose): line.num_bytes for line in fixed_lines(found)}
    size = dtype.itemsize
    assert lines["host", "gradients"] == size * ELEMENTS[0]
    assert lines["nvme", "gradients"] == size * sum(ELEMENTS[block] for block in (1, 2, 3))
    assert lines["host", "nvme staging, gradients"] == RING_BUFFERS * size * ELEMENTS[3]
    before = tier_bytes(needs(grad=dtype))
    assert tier_bytes(found) == (before[0] - size * 16384 + RING_BUFFERS * size * 8192, before[1])


def test_gradients_leave_host_memory_after_optimizer_states_and_before_weights():
    wanted = needs()
    order = []
    for host in range(tier_bytes(wanted)[0], 0, -1000):
        for name, _ in spill(wanted, Limits(host, 0)).placed:
            if name not in order:
                order.append(name)
    assert order[-2:] == ["grads", "weights"]
    assert "grads" not in {name for name, _ in spill(needs(keeps=False), Limits(0, 0)).placed}


@pytest.mark.parametrize("moments", list(Moments))
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9])
def test_what_leaves_host_memory_is_spread_over_the_model_and_no_more_than_must(share, moments, monkeypatch):
    monkeypatch.setattr("horizon.plan.memory.UPDATE_PAGES", 0)  # staging would be as large as all of it
    layouts = [place_block(i, f"b{i}", [ParamSpec(f"{i}.w", "w", (256, 64))]) for i in range(24)]
    wanted = replace(needs(layouts), moments=moments)
    large = [
        (state.name, i) for i in range(24) for state in wanted.states if state.group == 1 and state.name != "weights"
    ]
    size = {place: next(s.num_bytes(layouts[0]) for s in wanted.states if s.name == place[0]) for place in large}
    must = int(share * sum(size.values()))
    gone = spill(wanted, Limits(tier_bytes(wanted)[0] - must, 0)).placed
    assert must <= sum(size[place] for place in gone) <= must + 2 * max(size.values())
    at = sorted(large.index(place) for place in gone)
    gaps = [b - a for a, b in zip([-1, *at], [*at, len(large)], strict=True)]
    assert max(gaps[:-1]) - min(gaps[1:-1], default=0) <= 1  # all the same, as far as that goes
    assert gaps[-1] == 1 and gaps[0] >= max(gaps[1:])  # the first blocks' updates are awaited soonest


@pytest.mark.parametrize("reserve", [0, 1, 5000, 1 << 40])
def test_states_that_spill_leave_what_is_reserved(reserve, monkeypatch):
    monkeypatch.setattr("horizon.plan.memory.UPDATE_PAGES", 0)  # staging would be as large as all of it
    wanted = needs(keeps=False)
    host = tier_bytes(wanted)[0] - 1
    placed = Placer(Policy.dram, spills=True, reserve=reserve).place(wanted, Limits(host, 0), 0)
    assert placed == spill(wanted, Limits(max(0, host - reserve), 0))
    assert reserve > host or tier_bytes(placed)[0] <= host - reserve


@pytest.mark.parametrize("layouts", [UNTIED, TIED], ids=["untied", "tied"])
def test_gradients_cross_the_disk_once_each_way_but_those_that_come_last(layouts):
    found = apply_rules((rule("grads"),), (), needs(layouts))
    sizes = [2 * lay.num_trainable for lay in layouts]
    assert least_traffic(found)["disk", "write"] == sum(sizes)
    assert least_traffic(found)["disk", "read"] == sum(sizes[RING_BUFFERS:])
    assert ("disk", "read") not in least_traffic(needs(layouts))


# ---- activations


LAYERS, TOKENS, TOKEN_BYTES = 6, (1000, 600), 10
BOUNDARY = TOKEN_BYTES * sum(TOKENS)
WORKING = WorkingSet(50, 0, 0, kept_selective=2 * TOKEN_BYTES, kept_none=4 * TOKEN_BYTES)
STAGED = BOUNDARY_BUFFERS * 3 * DISK_BLOCK  # 10,000 bytes each
ON_DISK = (3 + 2) * DISK_BLOCK  # 10,000 and 6,000 bytes


def planned(layers_on_device, idle=(0,) * 8, limits=PLENTY, recompute=Recompute.full):
    device = 50 + (3 + layers_on_device) * BOUNDARY
    plan = MemoryPlan(LAYERS + 2, 0, (), replace(limits, device=device), boundaries=Tier.nvme)
    return plan_activations(plan, TOKENS, TOKEN_BYTES, WORKING, idle, recompute)


def test_boundaries_on_nvme_weigh_their_file_and_their_staging_whatever_is_idle():
    for idle in ((0,) * 8, (1 << 20,) * 8):
        found = planned(2, idle)
        assert found.offloaded == {3, 4, 5, 6} and found.tier is Tier.nvme and found.on_nvme
        lines = {(line.tier, line.purpose): line.num_bytes for line in found.lines if line.tier != "device"}
        assert lines == {
            ("host", "nvme staging, activations"): STAGED,
            ("nvme", "offloaded activations"): 4 * ON_DISK,
        }
    found = planned(6)
    assert not found.offloaded and not found.on_nvme and found.host_bytes == 0


def test_what_the_disk_or_the_staging_has_no_room_for_is_refused():
    with pytest.raises(BudgetError, match=r"of nvme space \(offloaded activations .* memory.nvme_budget that works"):
        planned(2, limits=replace(PLENTY, nvme=4 * ON_DISK - 1))
    with pytest.raises(BudgetError, match=r"of host memory \(nvme staging, activations"):
        planned(2, limits=replace(PLENTY, host=STAGED - 1))
    assert planned(2, limits=replace(PLENTY, host=STAGED, nvme=4 * ON_DISK)).on_nvme


def test_no_boundary_goes_to_disk_so_that_layers_keep_more():
    assert not planned(LAYERS, recompute=Recompute.auto).offloaded
    assert planned(LAYERS - 1, recompute=Recompute.auto).offloaded == {6}


def test_the_plan_of_an_engine_says_where_boundaries_go_and_a_micro_batch_is_chosen_for_that():
    plan = plan_memory(apply_rules((rule("activations"),), (), needs()), PLENTY)
    assert plan.boundaries is Tier.nvme
    assert plan.with_activations(()).boundaries is Tier.nvme
    tight = replace(plan, limits=replace(PLENTY, device=plan.num_bytes("device") + 50 + 3 * 40 * TOKEN_BYTES))
    working = WorkingSet(50, 0, 0)
    assert choose_micro_batch([tight], 4, 10, TOKEN_BYTES, working, [0] * 4) == 4
    with pytest.raises(BudgetError, match="of nvme space"):
        choose_micro_batch([replace(tight, limits=replace(tight.limits, nvme=0))], 4, 10, TOKEN_BYTES, working, [0] * 4)


def test_device_memory_is_what_it_was():
    for found in (placed(rule("grads")), placed(rule("activations")), placed(rule("grads"), compute=FP32)):
        dtype = found.compute_dtype
        assert tier_bytes(found)[1] == tier_bytes(needs(compute=dtype))[1]
