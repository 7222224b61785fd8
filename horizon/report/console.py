"""What a person sees while steps run: a bar on a terminal, lines at round step numbers in a log file."""

from __future__ import annotations

import math
import os
import sys
import time
from itertools import accumulate
from types import TracebackType
from typing import Self, TextIO

from tqdm import tqdm

from horizon.records import StepRow
from horizon.units import format_bytes

SECONDS_BETWEEN_LINES = 10.0  # about
ROUND = (1, 2, 5)  # lines come every so many steps, or ten, a hundred, ... times as many
SHOWN_QUERIES = 3
BAR_FORMAT = "{n_fmt}/{total_fmt}|{bar}|{elapsed}<{remaining} {desc}"  # the bar takes what the numbers leave
COLUMNS = 80  # of a terminal that does not say


def describe_step(row: StepRow, columns: int | None = None) -> str:
    """The numbers of one step; in few columns shorter, and without those that tell least."""
    words = [*_words(row, short=False), *_details(row)]
    if columns is not None and len(" ".join(_words(row, short=False))) > columns:
        words = _words(row, short=True)
    lengths = accumulate(len(word) + 1 for word in words)
    return " ".join(w for w, length in zip(words, lengths, strict=True) if columns is None or length <= columns + 1)


def _words(row: StepRow, short: bool) -> list[str]:
    """What one looks at most, the most telling first."""
    words = [f"loss {row.loss:.3f}" if short else f"loss {row.loss:.4f}"]
    if row.skipped:
        words.append("SKIPPED")
    if row.corrected_blocks:
        words.append(f"corrected {row.corrected_blocks}")
    words.append(f"{_short(row.tokens_per_s)} {'t/s' if short else 'tok/s'}")
    if not math.isnan(row.resident_share):
        words.append(f"{row.resident_share:.0%} {'res' if short else 'of resident'}")
    if short:
        return [*words, f"host {_compact(row.host_bytes)}", f"dev {_compact(row.device_bytes)}"]
    return [*words, f"host {format_bytes(row.host_bytes)}", f"device {format_bytes(row.device_bytes)}"]


def _details(row: StepRow) -> list[str]:
    slope = f"grad {row.grad_norm:.3g}"
    if row.projected_gradients:
        slope = "projected grad " + " ".join(f"{g:.3g}" for g in row.projected_gradients[:SHOWN_QUERIES])
    return [f"lr {row.lr:.2e}", slope]


def _compact(num_bytes: int) -> str:
    """`1.42 GiB` as `1.42G`."""
    return format_bytes(num_bytes).replace(" ", "").removesuffix("iB")


class StepDisplay:
    """Shows each step on `stream` (default: stderr); a context manager that leaves the last state standing.

    Args:
        note: what is to be said of every step of the run.
        done: steps that were done before.
    """

    def __init__(self, num_steps: int, stream: TextIO | None = None, note: str = "", done: int = 0) -> None:
        self._num_steps, self._note, self._done = num_steps, note, done
        self._stream = sys.stderr if stream is None else stream
        self._bar = tqdm(
            total=num_steps, initial=done, dynamic_ncols=True, file=self._stream, disable=None, bar_format=BAR_FORMAT
        )  # fmt: skip
        self._started = time.monotonic()

    def show(self, row: StepRow) -> None:
        """Update the bar, or print a line when the first, the last, or the next one is due."""
        if not self._bar.disable:
            note = f" {self._note}" if self._note else ""
            room = self._columns() - len(self._frame()) - len(note)
            self._bar.set_description_str(f"{describe_step(row, room)}{note}", refresh=False)
            self._bar.update()
            return
        taken = row.step - self._done
        seconds = (time.monotonic() - self._started) / taken
        if row.step in (self._done + 1, self._num_steps) or row.step % steps_between_lines(seconds) == 0:
            left = tqdm.format_interval((self._num_steps - row.step) * seconds)
            described = f"{describe_step(row)} {self._note}".rstrip()
            self.say(f"step {row.step}/{self._num_steps} {described} left {left}")

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar.disable:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.write(text, file=self._stream)

    def _frame(self) -> str:
        """What stands beside the numbers, at least, and the column that terminals keep free."""
        counts = self._bar.format_dict
        left = (self._num_steps - counts["n"]) / (counts["rate"] or math.inf)
        elapsed, remaining = (tqdm.format_interval(seconds) for seconds in (counts["elapsed"], left))
        return f"{self._num_steps}/{self._num_steps}|-|{elapsed}<{remaining}  "

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns
        except (OSError, ValueError):  # no terminal's file
            return COLUMNS

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()


def steps_between_lines(seconds: float) -> int:
    """The round number of steps, each of which takes `seconds`, that is nearest above `SECONDS_BETWEEN_LINES`."""
    scale = 1
    while True:
        for factor in ROUND:
            if factor * scale * seconds >= SECONDS_BETWEEN_LINES:
                return factor * scale
        scale *= 10


def _short(number: float) -> str:
    return f"{number / 1000:.3g}k" if number >= 1000 else f"{number:.3g}"
