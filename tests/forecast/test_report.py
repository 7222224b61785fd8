"""The JSON object has the fields that docs/planning.md lists, and says what the forecast says."""

import json
import re
from pathlib import Path

import pytest

from horizon.config.machine import TierFile
from horizon.config.schema import Policy, Tier, TierRule
from horizon.forecast.outlook import look
from horizon.forecast.report import as_json, as_text
from tests.forecast.conftest import machine, settings

PAGE = (Path(__file__).parents[2] / "docs/planning.md").read_text()
LEAVES = (
    "machine.device", "machine.updates_per_s", "machine.tiers", "settings", "plan.memory", "plan.recompute",
    "alternatives.settings",
)  # fmt: skip


def listed():
    rows = re.findall(r"^\| `([\w.]+)` \|", PAGE[PAGE.index("## JSON") :], re.MULTILINE)
    return set(rows)


def fields(value, name=""):
    """Dotted names of an object's fields, those of lists by their first element."""
    if name in LEAVES or not isinstance(value, dict | list) or not value:
        return {name}
    if isinstance(value, list):
        return {name} | fields(value[0], name) if isinstance(value[0], dict) else {name}
    found = set() if name in ("", "model", "machine", "plan.step") else {name} - {"alternatives"}
    for key, part in value.items():
        found |= fields(part, f"{name}.{key}" if name else key)
    return found


@pytest.fixture
def outlooks(forecaster):
    """(config, forecaster, outlook) of settings that fit, and of some that do not."""
    roomy = settings(train__batch_size=4)
    tight = settings(memory__host_budget="1MiB", memory__policy=Policy.dram)
    return [(config, found, look(found, config)) for config in (roomy, tight) for found in [forecaster(config)]]


def test_the_fields_are_those_that_are_documented(outlooks):
    found = set()
    for config, forecaster, outlook in outlooks:
        found |= fields(as_json(outlook, config, "small", forecaster.model, forecaster.target))
    assert found == listed()


def test_it_says_what_the_forecast_says(outlooks):
    config, forecaster, outlook = outlooks[0]
    found = json.loads(json.dumps(as_json(outlook, config, "small", forecaster.model, forecaster.target)))
    plan, forecast = found["plan"], outlook.forecast
    assert found["fits"] and found["refusal"] is None and found["model"]["name"] == "small"
    for tier in ("host", "device"):
        assert sum(line["bytes"] for line in plan["memory"] if line["tier"] == tier) == plan[f"{tier}_bytes"]
        assert plan[f"{tier}_bytes"] == forecast.plan.num_bytes(tier) <= plan[f"{tier}_limit_bytes"]
    assert sum(plan["recompute"].values()) == 4 and plan["micro_batch"] * plan["micro_batches"] == 4
    step = plan["step"]
    parts = sum(step[f"{name}_s"] for name in ("arithmetic", "link", "optimizer", "disk", "launch"))
    assert step["seconds"] == pytest.approx(parts) and step["tokens_per_s"] == pytest.approx(4 * 128 / parts)
    assert found["settings"]["optim.moments"] == "float32" and found["settings"]["train.batch_size"] == 4
    assert len(found["alternatives"]) == len(outlook.alternatives)


def test_states_on_nvme_are_counted_and_the_step_is_timed_where_the_disk_is_known(forecaster):
    rules = [TierRule(state="exp_avg*", blocks="1-2", tier=Tier.nvme)]
    config = settings(train__batch_size=4, memory__rules=rules, memory__nvme_dir="there", memory__nvme_budget="1GiB")
    found = forecaster(config)
    outlook = look(found, config)
    said = json.loads(json.dumps(as_json(outlook, config, "small", found.model, found.target)))
    assert said["plan"]["step"] is None and said["plan"]["nvme_limit_bytes"] == 1 << 30
    assert said["settings"]["memory.rules"] == [{"state": "exp_avg*", "blocks": "1-2", "tier": "nvme"}]
    moments = 8 * sum(layout.num_trainable for layout in found.model.layouts[1:3])
    assert moments <= said["plan"]["nvme_bytes"] < moments + (1 << 14)
    assert "not predicted: the disk's speed is not known" in as_text(outlook, "small", found.target)
    tight = settings(train__batch_size=4, memory__rules=rules, memory__nvme_dir="there", memory__host_budget="1MiB",
                     memory__nvme_budget="1KiB")  # fmt: skip
    assert look(found, tight).alternatives  # found, with a disk that is too small as well
    described = machine()
    described.tiers["nvme"] = TierFile(memory="1GiB", read_gb_s=1e-3, write_gb_s=1e-3)
    found = forecaster(config, described)
    step = found.forecast(config).prediction
    assert step.bound == "disk" and step.seconds > 2 * moments / 1e6
    described.tiers["nvme"] = TierFile(memory="1GiB", read_gb_s=1e3, write_gb_s=1e3)
    assert forecaster(config, described).forecast(config).prediction.bound != "disk"


def test_a_refusal_names_tier_and_shortfall(outlooks):
    config, forecaster, outlook = outlooks[1]
    found = as_json(outlook, config, "small", forecaster.model, forecaster.target)
    assert (found["fits"], found["plan"], found["refusal"]["tier"]) == (False, None, "host")
    refusal = found["refusal"]
    assert refusal["shortfall_bytes"] == refusal["needed_bytes"] - (1 << 20) > 0
    assert all(other["fits"] and other["seconds"] > 0 for other in found["alternatives"])


def test_the_text_has_plan_choices_and_alternatives(outlooks):
    (_, forecaster, outlook), (_, refused, refusal) = outlooks
    text = as_text(outlook, "small", forecaster.target)
    assert text.startswith("small on test (a test)\n6 blocks, ")
    assert "predicted step" in text and "  as asked " in text and "1 of 4 rows of 128 tokens" in text
    text = as_text(refusal, "small", refused.target)
    assert "does not fit: needs " in text and "the nearest settings that fit:" in text
    assert "memory.policy=" in text


def test_a_machine_without_a_gpu_computes_on_its_cores(forecaster):
    config = settings()
    found = forecaster(config, machine(device=""))
    report = as_json(look(found, config), config, "small", found.model, found.target)
    assert (report["machine"]["computes_on"], report["machine"]["device"]) == ("cpu", None)
