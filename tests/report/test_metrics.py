import dataclasses
import io
import json
import math

import pytest

from horizon.records import StepRow
from horizon.report.console import StepDisplay, describe_step
from horizon.report.metrics import MetricsWriter

ROW = StepRow(
    step=1, epoch=0, loss=2.5, lr=1e-3, grad_norm=0.75, num_tokens=2048, num_trained_tokens=2000, seconds=0.5,
    tokens_per_s=4096.0, host_bytes=3 << 30, device_bytes=5 << 20, skipped=False, clip_scale=1.0, corrected_blocks=0,
    projected_gradients=[], simulated=False, time=1.7e9,
)  # fmt: skip


def test_a_row_is_on_disk_before_the_next_is_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as metrics:
        for step in (1, 2, 3):
            metrics.write(dataclasses.replace(ROW, step=step))
            assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(1, step + 1))
    assert json.loads(path.read_text().splitlines()[0]) == dataclasses.asdict(ROW)


def test_what_is_not_finite_is_null_so_that_every_reader_accepts_it(tmp_path):
    with MetricsWriter(tmp_path / "m") as metrics:
        metrics.write(dataclasses.replace(ROW, loss=math.nan, grad_norm=math.inf))
    row = json.loads((tmp_path / "m").read_text(), parse_constant=lambda name: 1 / 0)
    assert (row["loss"], row["grad_norm"], row["lr"]) == (None, None, 1e-3)


def test_a_step_in_words():
    assert describe_step(ROW) == "loss 2.5000 4.1k tok/s host 3 GiB device 5 MiB lr 1.00e-03 grad 0.75"
    assert describe_step(dataclasses.replace(ROW, skipped=True)).endswith(" SKIPPED")
    assert describe_step(dataclasses.replace(ROW, corrected_blocks=5)).endswith(" grad 0.75 corrected 5")
    assert describe_step(dataclasses.replace(ROW, projected_gradients=[0.25, -3.0])).endswith(" projected grad 0.25 -3")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_note_stands_with_every_step(terminal):
    out = io.StringIO()
    out.isatty = lambda: terminal
    with StepDisplay(2, out, "lagged clipping: not exact") as display:
        for step in (1, 2):
            display.show(dataclasses.replace(ROW, step=step))
    assert out.getvalue().count("grad 0.75 lagged clipping: not exact") >= (1 if terminal else 2)


def test_without_a_terminal_the_first_and_last_steps_are_plain_lines():
    out = io.StringIO()
    with StepDisplay(4, out) as display:
        for step in (1, 2, 3, 4):
            display.show(dataclasses.replace(ROW, step=step))
    assert out.getvalue().splitlines() == [f"step {step}/4 {describe_step(ROW)}" for step in (1, 4)]


def test_on_a_terminal_one_bar_is_redrawn():
    out = io.StringIO()
    out.isatty = lambda: True
    with StepDisplay(2, out) as display:
        display.show(ROW)
        display.show(dataclasses.replace(ROW, step=2))
    assert "2/2" in out.getvalue()
    assert "loss 2.5000 4.1k tok/s host 3 GiB" in out.getvalue()
    assert "step 1/2" not in out.getvalue()
