"""What surrounds a forecast: nearest settings really fit, nothing nearer does, alternatives are what they say."""

import dataclasses

import pytest

from horizon.config.schema import Clip, Moments, Policy
from horizon.errors import BudgetError
from horizon.forecast.changes import alternatives, changed, describe, nearest_changes, smaller_levers
from horizon.forecast.outlook import SMALLEST, advice, least_bytes, look, worthwhile
from tests.forecast.conftest import SMALL, machine, settings

BIG = SMALL | {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 8000}


def budgeted(forecaster, tier, share, model=BIG, **changes):
    """Settings, and a forecaster of a machine whose memory is `share` of what they need."""
    config = settings(model, train__batch_size=16, **changes)
    need = least_bytes(forecaster(config), config)[("host", "device").index(tier)]
    config = changed(config, {f"memory.{tier}_budget": f"{int(need * share)}B"})
    return config, forecaster(config, machine(host="4GiB", device="2GiB"))


@pytest.mark.parametrize(
    ("tier", "share"), [("host", 0.9), ("host", 0.7), ("host", 0.5), ("device", 0.99), ("device", 0.96)]
)
def test_the_nearest_settings_fit_when_they_are_planned_again(forecaster, tier, share):
    config, found = budgeted(forecaster, tier, share, memory__policy=Policy.dram)
    outlook = look(found, config)
    assert outlook.refusal.tier == tier and outlook.refusal.needed > outlook.refusal.limit
    assert len(outlook.alternatives) == 3
    for other in outlook.alternatives:
        again = found.forecast(changed(config, other.change))
        assert again.plan.num_bytes("host") <= again.plan.limits.host
        assert again.plan.num_bytes("device") <= again.plan.limits.device
        assert lines(again) == lines(other.forecast)
        assert describe(other.change) in advice(outlook)


def lines(forecast):
    return forecast.plan.lines, forecast.plan.activations, forecast.micro_batch


def test_nothing_that_comes_before_the_first_one_found_fits(forecaster):
    config, found = budgeted(forecaster, "host", 0.6, memory__policy=Policy.dram)
    config = changed(config, {"memory.host_budget": "auto"})
    host = found.target.limits(config.memory).host
    need = found.forecast(config).plan.num_bytes("host")
    facts = dataclasses.replace(found.target.facts, host_bytes=int(need * 0.6) * 2)  # of which the system has half
    found.target = dataclasses.replace(found.target, facts=facts)
    assert found.target.limits(config.memory).host < host
    outlook = look(found, config)
    first = outlook.alternatives[0].change
    before = nearest_changes(smaller_levers(config, True, {}))
    for change in before[: before.index(first)]:
        with pytest.raises(BudgetError):
            found.forecast(changed(config, change))


def test_where_nothing_fits_the_answer_is_what_it_would_take(forecaster):
    config = settings(BIG, memory__host_budget="1MiB", memory__device_budget="1MiB", memory__policy=Policy.dram)
    outlook = look(forecaster(config, machine(host="2MiB", device="600MiB")), config)
    assert outlook.alternatives == () and "no settings near these fit" in advice(outlook)
    host, device = outlook.least
    roomy = changed(config, {"memory.host_budget": f"{host}B", "memory.device_budget": f"{device}B"})
    assert forecaster(config).forecast(changed(roomy, SMALLEST))
    for key, size in (("memory.host_budget", host - 1), ("memory.device_budget", device - 1)):
        with pytest.raises(BudgetError):
            forecaster(config).forecast(changed(roomy, {**SMALLEST, key: f"{size}B"}))


def test_a_larger_budget_is_offered_only_where_the_machine_has_it(forecaster):
    config, found = budgeted(forecaster, "host", 0.8, memory__policy=Policy.dram)
    changes = [other.change for other in look(found, config).alternatives]
    assert any(set(change) == {"memory.host_budget"} for change in changes)
    need = look(found, config).refusal.needed
    small = dataclasses.replace(found.target.facts, host_bytes=need - (1 << 20))
    found.target = dataclasses.replace(found.target, facts=small)
    assert not any("memory.host_budget" in other.change for other in look(found, config).alternatives)


def test_alternatives_differ_from_what_was_asked_and_only_better_ones_are_shown(forecaster):
    config = settings(BIG, train__batch_size=16, memory__device_budget="1600MiB")
    outlook = look(forecaster(config), config)
    changes = [describe(other.change) for other in outlook.alternatives]
    for expected in (
        "optim.moments=bfloat16", "optim.moments=int8", "optim.clip=speculative", "optim.max_grad_norm=null",
        "memory.policy=dram", "memory.device_budget=800MiB", "memory.device_budget=3200MiB", "train.batch_size=8",
    ):  # fmt: skip
        assert expected in changes
    assert len(set(changes)) == len(changes)
    base = outlook.forecast
    for other in worthwhile(outlook):
        faster = other.forecast.prediction.tokens_per_s > 1.01 * base.prediction.tokens_per_s
        smaller = any(other.forecast.plan.num_bytes(t) < 0.99 * base.plan.num_bytes(t) for t in ("host", "device"))
        assert faster or smaller


def test_clipping_is_switched_off_in_a_way_that_the_engine_takes():
    config = settings(optim__clip=Clip.speculative)
    (change,) = [c for c in alternatives(config, 1, None, 0) if c.get("optim.max_grad_norm", 0) is None]
    assert change == {"optim.max_grad_norm": None, "optim.clip": Clip.exact}


def test_changes_come_in_the_order_of_their_cost_and_leave_the_settings_alone():
    config = settings(train__batch_size=4)
    changes = nearest_changes(smaller_levers(config, True, {"memory.host_budget": "9GiB"}))
    assert [describe(change) for change in changes[:5]] == [
        "memory.policy=hbm_first", "memory.policy=dram", "memory.weight_slots=1", "memory.host_budget=9GiB",
        "optim.moments=bfloat16",
    ]  # fmt: skip
    assert changes[-1].keys() >= {"train.batch_size"} and max(map(len, changes)) == 4
    assert changed(config, {"optim.moments": Moments.int8}).optim.moments is Moments.int8
    assert config.optim.moments is Moments.float32
