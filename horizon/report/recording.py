"""A stretch of steps recorded from the outside: begin, end, and what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from horizon.errors import HorizonError
from horizon.records import StepSplit
from horizon.report.split import Least, split_of
from horizon.report.trace import draw_step, require_matplotlib, write_trace
from horizon.stream.streams import Streams
from horizon.stream.timeline import StepTimeline


@dataclass(slots=True)
class Recording:
    """The recorded steps; empty until the recording has ended.

    Attributes:
        steps: one timeline a step.
        split: where their time went and what they moved; None as long as there are none.
    """

    steps: tuple[StepTimeline, ...] = ()
    split: StepSplit | None = None


@contextmanager
def record_steps(
    streams: Streams,
    blocks: Sequence[str],
    least: Least,
    trace: Path | None,
    picture: Path | None,
    note: str = "",
) -> Iterator[Recording]:
    """Record while open; then write what was asked for. After an error nothing is written.

    Args:
        blocks: names, for the files.
        least: bytes that a step must move.
        trace, picture: files to write.
        note: what follows their title.
    """
    if picture is not None:
        require_matplotlib()
    recording = Recording()
    streams.timeline.start(streams.compute)
    try:
        yield recording
        streams.synchronize()
    except BaseException:
        streams.timeline.forget()
        raise
    recording.steps = tuple(streams.timeline.stop())
    if not recording.steps:
        raise HorizonError("no step ended while steps were recorded: take at least one inside the trace")
    recording.split = split_of(recording.steps, least)
    if trace is not None:
        write_trace(recording.steps, blocks, trace, f"horizon{note}")
    if picture is not None:
        draw_step(recording.steps[len(recording.steps) // 2], picture, f"horizon{note}")
