"""Recorded steps as a file that Perfetto and chrome://tracing open, and as a picture of one step.

The lanes: compute (what it did, and what it waited for), host (what the thread that drives the device was issuing or
waiting for), H2D and D2H (copies), and a lane for each thread that updates or moves states on nvme.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from horizon.errors import ConfigError
from horizon.stream.timeline import COMPUTE, DRAIN, FETCH, HOST, Cause, Span, StepTimeline

COLORS = {
    "forward": "#4c72b0", "head": "#8172b3", "backward": "#2f4b7c",
    Cause.link: "#dd8452", Cause.optimizer: "#c44e52", Cause.disk: "#da8bc3", Cause.data: "#937860",
    Cause.launch: "#ccb974", FETCH: "#64b5cd", DRAIN: "#55a868", "update": "#8c8c8c", "read": "#b0d8e6",
    "write": "#a8d5b0",
}  # fmt: skip


def require_matplotlib() -> None:
    """Raise a ConfigError where matplotlib, which draws the picture, is not installed."""
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "trace=true draws a picture with matplotlib, which is not installed: pip install 'horizon[report]', or "
            "set trace=false"
        )


def title(span: Span, blocks: Sequence[str]) -> str:
    """What a bar is called: `backward layers.3`, or for a wait `link: weights of layers.3`."""
    if span.cause is None or span.cause is Cause.arithmetic:
        return span.what if span.block is None else f"{span.what} {blocks[span.block]}"
    return f"{span.cause}: {span.what}" + ("" if span.block is None else f" of {blocks[span.block]}")


def lanes(steps: Sequence[StepTimeline]) -> list[str]:
    """All lanes of the steps from top to bottom."""
    threads = {span.lane for step in steps for span in step.spans} - {FETCH, COMPUTE, DRAIN, HOST}
    return [HOST, FETCH, COMPUTE, DRAIN, *sorted(threads, key=lambda name: (len(name), name))]


def write_trace(steps: Sequence[StepTimeline], blocks: Sequence[str], path: Path, title: str = "horizon") -> None:
    """Write trace events (https://perfetto.dev opens them); times in microseconds from the first step's start."""
    events = list(_events(steps, blocks, title))
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n", encoding="utf-8")


def _events(steps: Sequence[StepTimeline], blocks: Sequence[str], name: str) -> Iterator[dict[str, Any]]:
    rows = {lane: row for row, lane in enumerate(["step", *lanes(steps)])}
    yield {"ph": "M", "pid": 0, "name": "process_name", "args": {"name": name}}
    for lane, row in rows.items():
        yield {"ph": "M", "pid": 0, "tid": row, "name": "thread_name", "args": {"name": lane}}
        yield {"ph": "M", "pid": 0, "tid": row, "name": "thread_sort_index", "args": {"sort_index": row}}
    for number, step in enumerate(steps, start=1):
        yield _bar(rows["step"], f"recorded step {number}", "step", step.start, step.end, {})
        for span in step.spans:
            args: dict[str, Any] = {} if span.block is None else {"block": blocks[span.block]}
            if span.num_bytes:
                args |= {"bytes": span.num_bytes, "GB/s": span.num_bytes / max(span.seconds, 1e-9) / 1e9}
            if span.paced:
                args["at the host's pace (us)"] = span.paced * 1e6
            yield _bar(rows[span.lane], title(span, blocks), span.cause or span.what, span.start, span.end, args)


def _bar(row: int, name: str, category: str, start: float, end: float, args: dict[str, Any]) -> dict[str, Any]:
    times = {"ts": start * 1e6, "dur": (end - start) * 1e6}
    return {"ph": "X", "pid": 0, "tid": row, "name": name, "cat": category, **times, "args": args}


def draw_step(step: StepTimeline, path: Path, title: str = "horizon") -> None:
    """Draw one step's lanes as a PNG.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = lanes([step])
    figure = Figure(figsize=(16, 1.2 + 0.35 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    seen: dict[str, str] = {}
    for row, lane in enumerate(rows):
        spans = step.lane(lane)
        kinds = [_kind(span) for span in spans]
        seen |= {kind: COLORS[kind] for kind in kinds}
        bars = [((span.start - step.start) * 1e3, span.seconds * 1e3) for span in spans]
        axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=[COLORS[kind] for kind in kinds], linewidth=0)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, (step.end - step.start) * 1e3)
    axes.set_xlabel(f"ms since the step before ended ({title})")
    handles = [Patch(color=COLORS[kind], label=_label(kind)) for kind in COLORS if kind in seen]
    axes.legend(handles=handles, ncols=len(handles), loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    figure.savefig(path, dpi=120)


def _kind(span: Span) -> str:
    """What decides a bar's colour."""
    if span.cause is None:
        return next((kind for kind in (span.lane, span.what) if kind in COLORS), "update")
    return span.what if span.cause is Cause.arithmetic else span.cause


def _label(kind: str) -> str:
    return f"waiting for {kind}" if kind in Cause.__members__ else kind
