"""Plans with a cxl tier: of a machine file, or simulated."""

import json

import pytest

from horizon.config.machine import TierFile
from horizon.config.schema import Moments, Policy, SimulatedCxl
from horizon.errors import ConfigError
from horizon.forecast.outlook import least_bytes, look
from horizon.forecast.report import as_json, as_text
from horizon.units import GIB
from tests.forecast.conftest import SMALL, machine, settings

BIG = SMALL | {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 8000}
SIMULATED = SimulatedCxl(size="2GiB", gb_per_s=10.0)


def with_tier(gb_s=25.0):
    file = machine()
    file.tiers = {"cxl": TierFile(memory="2GiB", read_gb_s=gb_s, write_gb_s=gb_s)}
    return file


def asked(policy=Policy.cxl_aware, **changes):
    return settings(BIG, memory__policy=policy, train__batch_size=4, **changes)


def tiers(forecast):
    return {tier: forecast.plan.num_bytes(tier) for tier in forecast.plan.limits.tiers}


def test_what_the_host_has_no_room_for_goes_to_the_tier_of_the_file(forecaster):
    roomy = tiers(forecaster(asked(), with_tier()).forecast(asked()))
    assert roomy["cxl"] == 0
    config = asked(memory__host_budget=f"{roomy['host'] // 2}B")
    tight = forecaster(config, with_tier()).forecast(config)
    assert tiers(tight)["host"] <= roomy["host"] // 2
    assert tiers(tight)["host"] + tiers(tight)["cxl"] == roomy["host"]
    assert tight.plan.limits.cxl.num_bytes == 2 * GIB and not tight.plan.limits.cxl.simulated


def test_a_slower_tier_makes_slower_steps_and_interleaving_more_so(forecaster):
    host = f"{tiers(forecaster(asked(), with_tier()).forecast(asked()))['host'] * 3 // 4}B"
    seconds = {}
    for gb_s in (100.0, 5.0):
        for policy, budget in ((Policy.cxl_aware, host), (Policy.interleave, "auto")):
            config = asked(policy, memory__host_budget=budget)
            seconds[policy, gb_s] = forecaster(config, with_tier(gb_s)).forecast(config).prediction.seconds
    assert seconds[Policy.cxl_aware, 100.0] < seconds[Policy.cxl_aware, 5.0] < seconds[Policy.interleave, 5.0]
    assert seconds[Policy.interleave, 100.0] < seconds[Policy.interleave, 5.0]


@pytest.mark.parametrize("change", [{}, {"memory__cxl_nodes": [2]}])
def test_a_machine_file_without_the_tier_is_refused(forecaster, change):
    config = asked(**change)
    with pytest.raises(ConfigError, match=r"memory\.policy=cxl_aware on 'test', whose file describes no NUMA nodes"):
        forecaster(config, with_tier() if change else machine()).forecast(config)


def test_a_simulated_tier_is_called_simulated_in_words_and_in_json(forecaster):
    config = asked(memory__cxl_simulated=SIMULATED, memory__host_budget="200MiB")
    found = forecaster(config)
    outlook = look(found, config)
    text = as_text(outlook, "big", found.target)
    assert "cxl (simulated)" in text and "no measure of real CXL" in text
    told = json.loads(json.dumps(as_json(outlook, config, "big", found.model, found.target)))
    assert told["plan"]["cxl_simulated"] is True and 0 < told["plan"]["cxl_bytes"] <= told["plan"]["cxl_limit_bytes"]
    assert told["settings"]["memory.cxl_simulated"] == {"size": "2GiB", "gb_per_s": 10.0}
    assert {line["tier"] for line in told["plan"]["memory"]} == {"host", "device", "cxl (simulated)"}


def test_the_least_and_what_is_near_can_be_told_where_both_tiers_are_full(forecaster):
    small = SimulatedCxl(size="1MiB", gb_per_s=10.0)
    config = asked(memory__cxl_simulated=small, memory__host_budget="100MiB", optim__moments=Moments.float32)
    found = forecaster(config)
    outlook = look(found, config)
    assert outlook.refusal is not None and outlook.refusal.tier == "cxl (simulated)"
    assert as_text(outlook, "big", found.target)
    assert min(least_bytes(found, config)) > 0
