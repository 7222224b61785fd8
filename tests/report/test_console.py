"""What a terminal and a log file show of a step."""

import dataclasses
import io
import math
import os
import pty
import re
import termios

import pytest

from horizon.report.console import StepDisplay, describe_step, steps_between_lines
from tests.report.rows import STEP as ROW

END = "that is all"
LARGE = dataclasses.replace(
    ROW, loss=12.3456, tokens_per_s=123456.0, resident_share=0.995, host_bytes=1432 << 30, device_bytes=139 << 30
)


def test_a_step_in_words():
    assert describe_step(ROW) == (
        "loss 2.5000 4.1k tok/s 97% of resident host 3 GiB device 5 MiB lr 1.00e-03 grad 0.75"
    )
    assert " SKIPPED " in describe_step(dataclasses.replace(ROW, skipped=True))
    assert " corrected 5 " in describe_step(dataclasses.replace(ROW, corrected_blocks=5))
    assert describe_step(dataclasses.replace(ROW, projected_gradients=[0.25, -3.0])).endswith(" projected grad 0.25 -3")
    assert "resident" not in describe_step(dataclasses.replace(ROW, resident_share=math.nan))


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (84, "loss 2.5000 4.1k tok/s 97% of resident host 3 GiB device 5 MiB lr 1.00e-03 grad 0.75"),
        (83, "loss 2.5000 4.1k tok/s 97% of resident host 3 GiB device 5 MiB lr 1.00e-03"),
        (62, "loss 2.5000 4.1k tok/s 97% of resident host 3 GiB device 5 MiB"),
        (61, "loss 2.500 4.1k t/s 97% res host 3G dev 5M"),
        (41, "loss 2.500 4.1k t/s 97% res host 3G"),
        (12, "loss 2.500"),
        (3, ""),
    ],
)
def test_fewer_columns_show_less_and_never_part_of_a_number(columns, shown):
    assert describe_step(ROW, columns) == shown


class Terminal:
    """A terminal of so many columns to write to."""

    def __init__(self, columns):
        self.reader, writer = pty.openpty()
        termios.tcsetwinsize(writer, (24, columns))
        self.stream = os.fdopen(writer, "w", encoding="utf-8")

    def lines(self):
        """All that was written, as states of lines."""
        print(END, file=self.stream, flush=True)
        written = b""
        while END.encode() not in written:
            written += os.read(self.reader, 1 << 16)
        lines = re.split("[\r\n]+", written.decode())
        return [line for line in lines[: lines.index(END)] if line.strip()]


@pytest.mark.parametrize("num_steps", [2, 20_000])
@pytest.mark.parametrize("row", [ROW, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("columns", [80, 120])
def test_a_bar_fits_its_terminal_with_loss_speed_and_memory(columns, row, num_steps):
    terminal = Terminal(columns)
    with StepDisplay(num_steps, terminal.stream, done=num_steps - 2) as display:
        display.show(dataclasses.replace(row, step=num_steps - 1))
        display.say("validation loss at step 1: 3.0")
        display.show(dataclasses.replace(row, step=num_steps))
    lines = terminal.lines()
    assert max(map(len, lines)) <= columns - 1
    assert "validation loss at step 1: 3.0" in lines
    last = lines[-1]
    assert last.startswith(f"{num_steps}/{num_steps}|")
    for word in ("<00:00", "loss ", " host ", " dev"):
        assert word in last, last
    assert re.search(r" [\d.]+k t(ok)?/s \d+% (res|of resident) ", last)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_note_stands_with_every_step(terminal):
    out = io.StringIO()
    out.isatty = lambda: terminal
    with StepDisplay(2, out, "lagged clipping: not exact") as display:
        for step in (1, 2):
            display.show(dataclasses.replace(ROW, step=step))
    assert out.getvalue().count(" lagged clipping: not exact") >= (1 if terminal else 2)


@pytest.mark.parametrize(
    ("seconds", "steps"), [(100, 1), (10, 1), (9, 2), (2.5, 5), (1.1, 10), (0.3, 50), (0.01, 1000)]
)
def test_lines_come_every_round_number_of_steps(seconds, steps):
    assert steps_between_lines(seconds) == steps


def test_without_a_terminal_there_are_plain_lines_at_round_steps(monkeypatch):
    out, now = io.StringIO(), [0.0]
    monkeypatch.setattr("horizon.report.console.time.monotonic", lambda: now[0])
    with StepDisplay(17, out, done=2) as display:
        for step in range(3, 18):
            now[0] += 2.5
            display.show(dataclasses.replace(ROW, step=step))
        display.say("validation loss")
    assert "\r" not in out.getvalue()
    left = {3: "00:35", 5: "00:30", 10: "00:17", 15: "00:05", 17: "00:00"}
    lines = [f"step {step}/17 {describe_step(ROW)} left {time}" for step, time in left.items()]
    assert out.getvalue().splitlines() == [*lines, "validation loss"]
