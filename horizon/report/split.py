"""Where a step's time went and what it moved: the numbers of `summary.json`, and the table at the end of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from horizon.records import StepSplit, Traffic
from horizon.stream.timeline import COMPUTE, DISK, DRAIN, FETCH, HBM_UPDATE, UPDATE, Cause, Span, StepTimeline, union
from horizon.units import format_bytes

Least = Mapping[tuple[str, str], int]  # bytes by (direction, what)
NOTEWORTHY = 0.02  # of a step: from here on the table says why compute waited for the optimizer


def split_of(steps: Sequence[StepTimeline], least: Least) -> StepSplit:
    """The mean of at least one recorded step."""
    compute = [span for step in steps for span in step.lane(COMPUTE)]

    def spent_ms(cause: Cause, what: str | None = None) -> float:
        spans = (span for span in compute if span.cause is cause and what in (None, span.what))
        return _mean_ms(steps, (span.seconds for span in spans))

    updates = [span for step in steps for span in step.spans if span.lane.startswith(UPDATE)]
    threads = len({span.lane for span in updates})
    update_bytes = sum(span.num_bytes for span in updates) // len(steps)
    update_ms = _mean_ms(steps, (span.seconds for span in updates)) / max(threads, 1)
    return StepSplit(
        steps=len(steps),
        step_ms=_mean_ms(steps, (step.end - step.start for step in steps)),
        arithmetic_ms=spent_ms(Cause.arithmetic),
        link_ms=spent_ms(Cause.link),
        optimizer_ms=spent_ms(Cause.optimizer),
        disk_ms=spent_ms(Cause.disk),
        data_ms=spent_ms(Cause.data),
        launch_ms=spent_ms(Cause.launch),
        hbm_update_ms=spent_ms(Cause.optimizer, HBM_UPDATE),
        forward_ms=spent_ms(Cause.arithmetic, "forward"),
        head_ms=spent_ms(Cause.arithmetic, "head"),
        backward_ms=spent_ms(Cause.arithmetic, "backward"),
        host_paced_ms=_mean_ms(steps, (span.paced for span in compute)),
        traffic=_traffic(steps, least),
        update_bytes=update_bytes,
        update_ms=update_ms,
        update_threads=threads,
        update_bytes_per_s=update_bytes / update_ms * 1e3 if update_ms else 0.0,
    )


def _mean_ms(steps: Sequence[StepTimeline], seconds: Iterable[float]) -> float:
    return sum(seconds) * 1e3 / len(steps)


def _traffic(steps: Sequence[StepTimeline], least: Least) -> list[Traffic]:
    copies: dict[tuple[str, str], list[Span]] = {}
    for step in steps:
        for span in (*step.lane(FETCH), *step.lane(DRAIN)):
            copies.setdefault((span.lane, span.what), []).append(span)
    moved = {key: sum(span.num_bytes for span in spans) // len(steps) for key, spans in copies.items()}
    saved = moved.get((DRAIN, "boundary"), 0)  # what left for want of room has to come back, once
    needed = {**least, (DRAIN, "boundary"): saved, (FETCH, "boundary"): saved}
    link = [
        Traffic(
            direction=key[0],
            what=key[1],
            num_bytes=moved[key],
            least_bytes=needed.get(key, 0),
            busy_ms=_mean_ms(steps, (span.seconds for span in spans)),
        )
        for key, spans in copies.items()
    ]
    return [*link, *_disk_traffic(steps, least)]


def _disk_traffic(steps: Sequence[StepTimeline], least: Least) -> list[Traffic]:
    """What several threads move at a time is busy while one of them is."""
    moves: dict[str, list[Span]] = {}
    for step in steps:
        for span in step.spans:
            if span.lane.startswith(DISK):
                moves.setdefault(span.what, []).append(span)
    return [
        Traffic(
            direction=DISK,
            what=what,
            num_bytes=sum(span.num_bytes for span in spans) // len(steps),
            least_bytes=least.get((DISK, what), 0),
            busy_ms=sum(end - start for start, end in union(spans)) * 1e3 / len(steps),
        )
        for what, spans in moves.items()
    ]


def describe_split(split: StepSplit) -> str:
    """The table at the end of a run."""
    return "\n".join(_lines(split))


def _lines(split: StepSplit) -> Iterable[str]:
    yield f"a step of {_ms(split.step_ms)}, mean of {split.steps} recorded"
    passes = f"forward {_ms(split.forward_ms)}, head {_ms(split.head_ms)}, backward {_ms(split.backward_ms)}"
    yield _row("arithmetic", split.arithmetic_ms, split, passes)
    if split.host_paced_ms:
        yield _row("  at the host's pace", split.host_paced_ms, split, "kernels shorter than their launches")
    for cause, wait_ms in (
        ("link", split.link_ms), ("optimizer", split.optimizer_ms), ("disk", split.disk_ms), ("data", split.data_ms),
    ):  # fmt: skip
        note = (
            f"{_ms(split.hbm_update_ms)} of it updating in HBM" if cause == "optimizer" and split.hbm_update_ms else ""
        )
        if wait_ms or cause != "disk":
            yield _row(f"waiting for {cause}", wait_ms, split, note)
    yield _row("waiting for launches", split.launch_ms, split)
    for traffic in split.traffic:
        yield (
            f"  {traffic.direction + ' ' + traffic.what:<21}{format_bytes(traffic.num_bytes):>12}"
            f"  at least {format_bytes(traffic.least_bytes)}, {_rate(traffic.num_bytes, traffic.busy_ms)}"
        )
    yield (
        f"  {'host memory, updates':<21}{format_bytes(split.update_bytes):>12}"
        f"  {_rate(split.update_bytes, split.update_ms)} on {split.update_threads} thread"
        + "s"
        * (split.update_threads != 1)
    )
    waited_ms = split.optimizer_ms - split.hbm_update_ms
    if waited_ms > NOTEWORTHY * split.step_ms:
        yield (
            f"  host memory bounds this step: at that rate the update alone takes {_ms(split.update_ms)}, and "
            f"{_ms(waited_ms)} of waiting for it found nothing to hide behind"
        )


def _row(name: str, part_ms: float, split: StepSplit, note: str = "") -> str:
    return f"  {name:<21}{_ms(part_ms):>12}{part_ms / split.step_ms:>8.1%}  {note}".rstrip()


def _ms(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _rate(num_bytes: int, busy_ms: float) -> str:
    speed = f" ({num_bytes / busy_ms / 1e6:.3g} GB/s)" if busy_ms else ""
    return f"{_ms(busy_ms)} at work{speed}"
