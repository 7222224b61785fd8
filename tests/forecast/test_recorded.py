"""Forecasts of steps that were measured on an H200, next to what was measured. docs/planning.md states these bounds."""

import json
from pathlib import Path

import pytest

from horizon.config.compose import compose, load_machine
from horizon.forecast.imagined import Forecaster, open_skeleton
from horizon.forecast.machine import target_of
from horizon.plan.facts import read_facts
from horizon.units import GIB

RESULTS = Path(__file__).parents[2] / "profiling/results"
FILES = "2026-11-22-h200.jsonl", "2026-11-23-h200.jsonl"
ROWS = [json.loads(line) for name in FILES for line in (RESULTS / name).read_text().splitlines()]
ROWS = [row for row in ROWS if row["system"] == "horizon"]
FIRST_DAY = "2026-11-22"  # of code that knew no other placement than dram, nor anything but full recomputation


def asked(row):
    """The settings of a row; those that the code of then chose by rules of its own are given."""
    overrides = [
        f"model={row['shape']}",
        f"train.batch_size={row['tokens'] // row['seq_len']}",
        f"train.seq_len={row['seq_len']}",
        f"train.micro_batch={row['micro_batch']}",
        f"memory.device_budget={row['device_budget']}",
        f"optim.max_grad_norm={row['max_grad_norm'] or 'null'}",
        f"optim.clip={row.get('clip', 'exact')}",
        f"optim.moments={row.get('moments', 'float32')}",
    ]
    if row["date"] == FIRST_DAY:
        return compose([*overrides, "memory.policy=dram", "memory.recompute=full"])
    blocks = "null" if row["in_hbm"] == "none" else row["in_hbm"].split()[2]
    return compose([*overrides, f"memory.hbm_blocks={blocks}"])


@pytest.fixture(scope="module")
def forecasts():
    facts, forecasters = read_facts(load_machine("h200"), "machine=h200"), {}
    for row in ROWS:
        config = asked(row)
        if row["shape"] not in forecasters:
            forecasters[row["shape"]] = Forecaster(open_skeleton(config), target_of(facts, "auto", False))
        row["forecast"] = forecasters[row["shape"]].forecast(config)
    return ROWS


def name(row):
    return f"{row['shape']} {row['tokens'] // 1024}k {row['commit']}"


@pytest.mark.parametrize("number", range(len(ROWS)), ids=[name(row) for row in ROWS])
def test_a_forecast_is_near_what_was_measured(forecasts, number):
    row, forecast = forecasts[number], forecasts[number]["forecast"]
    assert forecast.prediction.seconds == pytest.approx(row["seconds"], rel=0.07)
    assert forecast.plan.num_bytes("host") / GIB == pytest.approx(row["host_rss_gib"], rel=0.03)
    assert forecast.plan.num_bytes("device") / GIB == pytest.approx(row["device_gib"], rel=0.08)
    assert forecast.plan.num_bytes("device") / GIB == pytest.approx(row["planned_device_gib"], rel=0.06)


def test_there_are_rows_of_all_kinds():
    assert {row["shape"] for row in ROWS} == {"qwen2.5-7b", "qwen2.5-3b"}
    assert {row.get("moments", "float32") for row in ROWS} == {"float32", "int8"}
    assert {row.get("clip", "exact") for row in ROWS} == {"exact", "speculative"} and len(ROWS) == 8
