"""Every tier's budget is kept: what does not fit names the tier, by how much, and settings that do.

The device's is in test_outlook.py.
"""

import re

import pytest

from horizon.config.machine import TierFile
from horizon.config.schema import Policy, SimulatedCxl, Tier, TierRule
from horizon.errors import BudgetError
from horizon.forecast.changes import changed, describe
from horizon.forecast.outlook import larger_budgets, look
from horizon.forecast.report import as_json
from horizon.plan.traffic import least_traffic
from tests.forecast.conftest import SMALL, machine, settings

MODEL = SMALL | {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 8000}
LARGE = MODEL | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16}
NVME, CXL = {"memory.nvme_dir": "there"}, {"memory.policy": Policy.cxl_aware}
MOMENTS, RESIDUAL = TierRule(state="exp_avg*", tier=Tier.nvme), TierRule(state="residual", tier=Tier.cxl)
SPILLED = {"memory.host_budget": "100MiB"}
CASES = {
    "host": ("host", "memory.host_budget", {"memory.policy": Policy.dram}),
    "nvme": ("nvme", "memory.nvme_budget", NVME | {"memory.policy": Policy.nvme_all}),
    "nvme by rules": ("nvme", "memory.nvme_budget", NVME | {"memory.rules": [MOMENTS]}),
    "cxl": ("cxl", "memory.cxl_budget", CXL | SPILLED),
    "cxl interleaved": ("cxl", "memory.cxl_budget", {"memory.policy": Policy.interleave}),
    "cxl by rules": ("cxl", "memory.cxl_budget", {"memory.rules": [RESIDUAL]}),
    "cxl simulated": (
        "cxl (simulated)", "memory.cxl_simulated.size",
        CXL | SPILLED | {"memory.cxl_simulated": SimulatedCxl(size="4GiB")},
    ),
}  # fmt: skip


def described(host="4GiB"):
    found = machine(host=host, device="2GiB")
    found.tiers = {name: TierFile(memory="4GiB", read_gb_s=10, write_gb_s=10) for name in ("nvme", "cxl")}
    return found


def budgeted(forecaster, case):
    """(tier, setting, its bytes, settings with a budget that is a MiB too small, forecaster)."""
    tier, key, change = CASES[case]
    config = changed(settings(MODEL, train__batch_size=4), change)
    found = forecaster(config, described())
    need = found.forecast(config).plan.num_bytes(tier)
    return tier, key, need, changed(config, {key: f"{need - (1 << 20)}B"}), found


@pytest.mark.parametrize("case", CASES)
def test_a_budget_is_kept_to_the_byte(forecaster, case):
    tier, key, need, config, found = budgeted(forecaster, case)
    assert need > 2 << 20
    fits = found.forecast(changed(config, {key: f"{need}B"}))
    assert fits.plan.num_bytes(tier) == need == fits.plan.limits.of(tier)[0]
    if case in ("cxl", "cxl simulated"):
        return  # what dram has room for follows from the budget, too
    with pytest.raises(BudgetError) as refusal:
        found.forecast(changed(config, {key: f"{need - 1}B"}))
    assert (refusal.value.tier, refusal.value.needed, refusal.value.limit) == (tier, need, need - 1)


@pytest.mark.parametrize("case", CASES)
def test_a_refusal_names_the_tier_the_shortfall_and_three_settings_that_fit(forecaster, case):
    tier, key, _, config, found = budgeted(forecaster, case)
    outlook = look(found, config)
    assert outlook.refusal is not None and outlook.refusal.tier == tier
    message = str(outlook.refusal)
    assert re.search(rf"of {re.escape(tier)} (memory|space) ", message) and "1 MiB too little" in message
    assert f"the smallest {key} that works is " in message
    assert as_json(outlook, config, "m", found.model, found.target)["refusal"]["shortfall_bytes"] == 1 << 20
    assert len(outlook.alternatives) == 3
    for other in outlook.alternatives:
        again = found.forecast(changed(config, other.change))
        for name in again.plan.limits.tiers:
            assert again.plan.num_bytes(name) <= again.plan.limits.of(name)[0], describe(other.change)


@pytest.mark.parametrize("case", CASES)
def test_the_budget_that_is_named_works_and_is_offered_where_the_machine_has_it(forecaster, case):
    tier, key, need, config, found = budgeted(forecaster, case)
    refusal = look(found, config).refusal
    named = re.search(rf"the smallest {re.escape(key)} that works is (\w+)", str(refusal))[1]
    assert found.forecast(changed(config, {key: named})).plan.num_bytes(tier) == need
    assert larger_budgets(found, config, refusal) == {key: named}
    if key.endswith("budget"):
        assert larger_budgets(found, changed(config, {key: "auto"}), refusal) == {}
    small = machine(host="1MiB")
    small.tiers = {name: TierFile(memory="1MiB", read_gb_s=10, write_gb_s=10) for name in ("nvme", "cxl")}
    assert larger_budgets(forecaster(config, small), config, refusal) == {}


def test_a_step_with_everything_on_disk_is_predicted(forecaster):
    config = changed(settings(MODEL, train__batch_size=4), NVME | {"memory.policy": Policy.nvme_all})
    found = forecaster(config, described()).forecast(config)
    moves = least_traffic(found.needs)
    assert found.prediction.bound == "disk"
    assert found.prediction.seconds >= (moves["disk", "read"] + moves["disk", "write"]) / 10e9
    some = changed(config, {"memory.policy": Policy.dram, "memory.rules": [TierRule(state="grads", tier=Tier.nvme)]})
    assert forecaster(some, described()).forecast(some).prediction.disk_s < found.prediction.disk_s


def told_to_leave(forecaster, config):
    """The plan with what states are told to leave of host memory, where they fill it."""
    outlook = look(forecaster, config)
    assert outlook.refusal is not None and outlook.refusal.tier == "host"
    (wanted,) = (a.change for a in outlook.alternatives if set(a.change) == {"memory.host_reserve"})
    return forecaster.forecast(changed(config, wanted)).plan


def test_states_that_fill_host_memory_are_told_to_leave_what_activations_need(forecaster):
    change = {"memory.device_budget": "3GiB", "train.batch_size": 512, "train.micro_batch": 1, "optim.clip": "lagged"}
    config = changed(settings(LARGE, train__batch_size=4), NVME | {"memory.hbm_blocks": 0} | change)
    found = forecaster(config, described("32GiB"))
    host = found.forecast(config).plan.num_bytes("host")
    tight = changed(config, {"memory.host_budget": f"{host - (300 << 20)}B"})
    plan = told_to_leave(found, tight)
    assert plan.num_bytes("host") <= plan.limits.host and plan.num_bytes("nvme")


@pytest.mark.parametrize(("staging", "share"), [("auto", 0.49), ("2GiB", 0.9)])
def test_states_that_fill_host_memory_are_told_to_leave_what_checkpoints_need(forecaster, staging, share):
    change = {"memory.device_budget": "3GiB", "memory.hbm_blocks": 0, "checkpoint.save_every": "10"}
    config = changed(settings(LARGE, train__batch_size=4), NVME | change | {"checkpoint.staging": staging})
    found = forecaster(config, described("32GiB"))
    all_in_memory = found.forecast(config).plan.num_bytes("host")
    plan = told_to_leave(found, changed(config, {"memory.host_budget": f"{int(all_in_memory * share)}B"}))
    (kept,) = (line.num_bytes for line in plan.lines if line.purpose == "checkpoint staging")
    assert plan.num_bytes("host") <= plan.limits.host and plan.num_bytes("nvme")
    assert kept >= (2 << 30 if staging == "2GiB" else 1)
