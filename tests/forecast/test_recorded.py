"""Forecasts of steps that were measured on two GPUs, held to the bounds that docs/planning.md states."""

import json
from pathlib import Path

import pytest

from horizon.config.compose import compose, load_machine
from horizon.errors import BudgetError
from horizon.forecast.imagined import Forecaster
from horizon.forecast.machine import target_of
from horizon.forecast.shapes import open_shape
from horizon.plan.facts import read_facts
from horizon.units import GIB

RESULTS = Path(__file__).parents[2] / "profiling/results"
FILES = "2026-11-22-h200.jsonl", "2026-11-23-h200.jsonl", "2026-11-27-h100.jsonl", "2026-11-27-h200.jsonl"
FIRST_DAY = "2026-11-22"  # of code that knew no other placement than dram, nor anything but full recomputation
# Of code that chose as today's does; the first took placements that were 1 % slower for as good.
TODAY = "6c6aec9", "5530211", "220608c", "ae7fc05"
SECONDS, HOST, DEVICE, PLANNED = 0.08, 0.03, 0.10, 0.06  # off by at most, of what was measured or planned by an engine
FURTHER_OFF = {  # seconds of steps that the log calls not steady, or that are short
    ("qwen2.5-0.5b", 16384, "2026-11-27"): 0.21,
    ("qwen2.5-7b", 4096, "2026-11-27"): 0.26,
    ("qwen2.5-7b", 131072, "2026-11-27"): 0.11,
}


def rows():
    for name in FILES:
        for row in map(json.loads, (RESULTS / name).read_text().splitlines()):
            if row.get("system", "horizon") == "horizon" and "micro_batch" in row:
                yield row | {"gpu": name.removesuffix(".jsonl").rpartition("-")[2]}


ROWS = list(rows())


def asked(row):
    """The settings of a row; what the code of then chose by rules of its own is given."""
    overrides = [
        f"model={row['shape']}",
        f"train.batch_size={row['tokens'] // row['seq_len']}",
        f"train.seq_len={row['seq_len']}",
        f"train.micro_batch={row['micro_batch']}",
        f"memory.device_budget={row['device_budget']}",
        f"optim.max_grad_norm={row['max_grad_norm'] or 'null'}",
        f"optim.clip={row.get('clip', 'exact')}",
        f"optim.moments={row.get('moments', 'float32')}",
        f"memory.turn_layers={row.get('turn_layers', 0)}",
    ]
    if row["date"] == FIRST_DAY:
        return compose([*overrides, "memory.policy=dram", "memory.recompute=full"])
    if row["commit"] in TODAY:
        return compose(overrides)
    states = "".join(row["in_hbm"]).removeprefix("none")
    return compose([*overrides, f"memory.hbm_blocks={states.split()[2] if states else 'null'}"])


@pytest.fixture(scope="module")
def forecast():
    forecasters = {}

    def forecast(row):
        key, config = (row["gpu"], row["shape"]), asked(row)
        if key not in forecasters:
            facts = read_facts(load_machine(row["gpu"]), row["gpu"])
            forecasters[key] = Forecaster(open_shape(config), target_of(facts, "auto", False))
        return forecasters[key].forecast(config)

    return forecast


def name(row):
    return f"{row['gpu']} {row['shape']} {row['tokens'] // 1024}k {row['device_budget']} {row['date']}"


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_a_forecast_is_near_what_was_measured(forecast, row):
    if row["device_budget"] == "12GiB":  # 11.6 GiB with what was measured, 12.1 with estimates, which err to that side
        with pytest.raises(BudgetError, match=r"needs 12\.1 GiB of device memory"):
            forecast(row)
        return
    found = forecast(row)
    off = FURTHER_OFF.get((row["shape"], row["tokens"], row["date"]), SECONDS)
    assert found.prediction.seconds == pytest.approx(row["seconds"], rel=off)
    host, device = (found.plan.num_bytes(tier) / GIB for tier in ("host", "device"))
    if row["commit"] not in TODAY or row["device_budget"] == "24GiB":
        assert host == pytest.approx(row["host_rss_gib"], rel=HOST, abs=0.4)
    assert device == pytest.approx(row["device_gib"], rel=DEVICE)
    assert device == pytest.approx(row["planned_device_gib"], rel=PLANNED)


def test_there_are_rows_of_all_kinds():
    assert {row["gpu"] for row in ROWS} == {"h100", "h200"} and len(ROWS) >= 29
    assert {row["shape"] for row in ROWS} == {"qwen2.5-7b", "qwen2.5-3b", "qwen2.5-0.5b"}
    assert {row.get("moments", "float32") for row in ROWS} == {"float32", "bfloat16", "int8"}
    assert {row.get("clip", "exact") for row in ROWS} == {"exact", "speculative"}
    assert {row["seq_len"] for row in ROWS} == {1024, 32768}
    assert any(row.get("turn_layers") for row in ROWS)
