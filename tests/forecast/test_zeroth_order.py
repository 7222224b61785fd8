"""A zeroth-order run's forecast: the engine's own lines on CPU, and steps that were measured on a GPU."""

import pytest

from horizon import Engine, ZerothOrder
from horizon.config.compose import compose, load_machine
from horizon.errors import ConfigError
from horizon.forecast.machine import target_of
from horizon.forecast.outlook import look
from horizon.forecast.report import as_json
from horizon.forecast.shapes import open_shape
from horizon.forecast.zeroth_order import forecast_zeroth_order, zeroth_order_json, zeroth_order_text
from horizon.plan.facts import read_facts
from tests.forecast.conftest import SMALL, machine, settings


@pytest.fixture(scope="module")
def small():
    return open_shape(settings())


def forecast(model, optimizer=None, file=None, **changes):
    target = target_of(read_facts(file or machine(), "a test"), "auto", False, host_overhead=0)
    config = settings(**changes)
    return forecast_zeroth_order(model, target, optimizer or ZerothOrder(), config), target, config


@pytest.mark.parametrize("optimizer", [ZerothOrder(), ZerothOrder(master="bf16", queries=3, eps=1e-2)])
def test_on_cpu_the_bytes_are_the_engines(small, optimizer):
    found, _, _ = forecast(small, optimizer, machine(device=""), train__batch_size=6, train__seq_len=16)
    with Engine.from_config(SMALL, optimizer=optimizer, device="cpu", self_check=False, max_grad_norm=None) as engine:
        assert engine.plan_micro_batch(6, 16) == found.micro_batch == 6
        assert _without_process(engine.plan) == _without_process(found.plan)


def _without_process(plan):
    return [line for line in (*plan.lines, *plan.activations) if line.purpose != "framework"]


@pytest.mark.parametrize(
    ("rows", "seconds", "device_gib"), [(1, 0.242, 3.77), (8, 0.780, 4.22)]
)  # profiling/LOG.md, "Zeroth order and int8 moments on a GPU"
def test_steps_that_were_measured_on_an_h100(rows, seconds, device_gib):
    config = compose(["model=opt-6.7b", "optim=mezo", f"train.batch_size={rows}", "train.seq_len=2048"])
    target = target_of(read_facts(load_machine("h100"), "a test"), "auto", here=False)
    found = forecast_zeroth_order(open_shape(config), target, ZerothOrder(master="fp16", writeback_every=8), config)
    assert found.plan.prediction.seconds == pytest.approx(seconds, rel=0.08)
    assert found.plan.prediction.bound == ("link" if rows == 1 else "arithmetic")
    assert found.plan.num_bytes("device") / (1 << 30) == pytest.approx(device_gib, rel=0.16)


def test_every_query_costs_two_passes_and_the_link_hides_behind_them(small):
    slow_link = machine()
    slow_link.device.up_gb_s = slow_link.device.down_gb_s = 0.01
    one, three = (forecast(small, ZerothOrder(queries=q))[0].plan.prediction for q in (1, 3))
    assert three.arithmetic_s == pytest.approx(3 * one.arithmetic_s)
    link = forecast(small, file=slow_link)[0].plan.prediction
    moved = sum(2 * layout.num_elements * 2 for layout in small.layouts)  # both halves of the master
    assert link.bound == "link" and link.seconds == pytest.approx(moved / 1e7, rel=0.05)
    seldom = forecast(small, ZerothOrder(writeback_every=8), slow_link)[0].plan.prediction
    assert seldom.seconds == pytest.approx(link.seconds)  # the other direction is free


def test_what_does_not_fit_is_refused_with_the_budget_that_works(small):
    found, target, _ = forecast(small, memory__host_budget="1MiB")
    told = zeroth_order_json(found, "small", small, target)
    assert (told["fits"], told["plan"], told["refusal"]["tier"]) == (False, None, "host")
    assert told["refusal"]["shortfall_bytes"] == told["refusal"]["needed_bytes"] - (1 << 20) > 0
    assert "does not fit: needs " in zeroth_order_text(found, "small", target)
    with pytest.raises(ConfigError, match=r"memory\.hbm_blocks=1 has no use in zeroth-order steps"):
        forecast(small, memory__hbm_blocks=1)
    learned = open_shape(settings({"model_type": "opt", "max_position_embeddings": 64}))
    with pytest.raises(ConfigError, match=r"train\.seq_len=128, but the model has only 64 positions"):
        forecast(learned)


def test_the_json_has_the_fields_of_every_plan(small, forecaster):
    found, target, config = forecast(small, train__batch_size=4)
    told = zeroth_order_json(found, "small", small, target)
    other = forecaster(config)
    usual = as_json(look(other, config), config, "small", other.model, other.target)
    assert told.keys() == usual.keys() and told["plan"].keys() == usual["plan"].keys()
    assert told["plan"]["recompute"] is None and told["plan"]["micro_batch"] == 4
    assert told["plan"]["step"]["tokens_per_s"] > 0
    text = zeroth_order_text(found, "small", target)
    assert "perturbed copies (+eps, -eps)" in text and "1 of 4 rows of 128 tokens" in text and "predicted step" in text
