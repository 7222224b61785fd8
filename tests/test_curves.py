"""The tables that profiling makes of measured rows."""

import sys
from pathlib import Path

import pytest

PROFILING = str(Path(__file__).parents[1] / "profiling")


@pytest.fixture
def curves(monkeypatch):
    monkeypatch.syspath_prepend(PROFILING)
    yield pytest.importorskip("curves")
    for name in ("curves", "step"):
        sys.modules.pop(name, None)


def row(**changes):
    return {
        "curve": "tokens", "shape": "tiny", "seq_len": 1024, "tokens": 4096, "device_budget": "24GiB",
        "max_grad_norm": 1.0, "clip": "exact", "micro_batch": 4, "seconds": 2.0, "tokens_per_s": 2048.0,
        "predicted_seconds": 2.1,
        "prediction_error": 0.05, "bound": "link", "predicted_parts": {"arithmetic_s": 1.5, "link_s": 0.6},
        "machine": "a GPU", "commit": "abc", "date": "today", **changes,
    }  # fmt: skip


def test_a_curve_becomes_a_table_and_a_chart(curves):
    text = curves.markdown([row(), row(tokens=8192, tokens_per_s=4096.0)])
    assert "## Throughput against tokens per step: tiny" in text
    assert "T = 1024, clip exact, device budget 24GiB; a GPU, commit abc, today." in text
    assert "| 4,096 | 4 | 2.00 | 2.10 | +5.0% | 2,048 | 1,950 | link | 1.50 / 0.60 |" in text
    assert "    x-axis [4k, 8k]\n    line [2048, 4096]\n    line [1950, 3901]\n```" in text
    assert "budget:" not in text


def test_budgets_are_named_as_they_were_given_and_a_prediction_may_be_missing(curves):
    nothing = {"predicted_seconds": None, "prediction_error": None}
    text = curves.markdown([row(curve="budgets"), row(curve="budgets", device_budget="auto", **nothing)])
    assert "4,096 tokens a step" in text
    assert "| 24GiB | 4 | 2.00 | 2.10 |" in text
    assert "| auto | 4 | 2.00 | - | - | 2,048 | - | - | - |" in text
    assert text.count("    line [") == 1
