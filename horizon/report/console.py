"""What a person sees while steps run: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self, TextIO

from tqdm import tqdm

from horizon.records import StepRow
from horizon.units import format_bytes

SECONDS_BETWEEN_LINES = 10.0
SHOWN_QUERIES = 3
# The bar takes what the numbers leave: tqdm's own format cut the gradient norm off below 140 columns.
BAR_FORMAT = "{n_fmt}/{total_fmt}|{bar}|{elapsed}<{remaining}{postfix}"


def describe_step(row: StepRow) -> str:
    """The numbers of one step, short enough for a terminal's width."""
    skipped = " SKIPPED" if row.skipped else ""
    corrected = f" corrected {row.corrected_blocks}" if row.corrected_blocks else ""
    slope = f"grad {row.grad_norm:.3g}"
    if row.projected_gradients:
        slope = "projected grad " + " ".join(f"{g:.3g}" for g in row.projected_gradients[:SHOWN_QUERIES])
    return (
        f"loss {row.loss:.4f} {_short(row.tokens_per_s)} tok/s host {format_bytes(row.host_bytes)} "
        f"device {format_bytes(row.device_bytes)} lr {row.lr:.2e} {slope}{corrected}{skipped}"
    )


class StepDisplay:
    """Shows each step on `stream` (default: stderr); a context manager that leaves the last state standing.

    Args:
        note: what is to be said of every step of the run.
        done: steps that were done before.
    """

    def __init__(self, num_steps: int, stream: TextIO | None = None, note: str = "", done: int = 0) -> None:
        self._num_steps, self._note = num_steps, note
        self._stream = sys.stderr if stream is None else stream
        self._bar = tqdm(
            total=num_steps, initial=done, dynamic_ncols=True, file=self._stream, disable=None, bar_format=BAR_FORMAT
        )  # fmt: skip
        self._last_line = -SECONDS_BETWEEN_LINES

    def show(self, row: StepRow) -> None:
        """Update the bar, or print a line when the first, the last, or the next one is due."""
        described = f"{describe_step(row)} {self._note}".rstrip()
        if not self._bar.disable:
            self._bar.set_postfix_str(described, refresh=False)
            self._bar.update()
            return
        now = time.monotonic()
        if row.step in (1, self._num_steps) or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            print(f"step {row.step}/{self._num_steps} {described}", file=self._stream, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()


def _short(number: float) -> str:
    return f"{number / 1000:.3g}k" if number >= 1000 else f"{number:.3g}"
