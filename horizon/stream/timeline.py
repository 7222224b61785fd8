"""What happened when in a few recorded steps: compute, the two directions of the link, the update threads, the host.

The compute stream always does one thing: the kernels of a block, or a wait whose cause is known. Each change is a
mark, taken on the stream (when the device gets there) and on the host (when it was issued), so the stretches between
marks add up to the step exactly. Where the host itself blocks there is a mark before and after, too: the time between
them *on the device* is what the wait cost, and that is nothing while kernels issued earlier still run.

Invariant: nothing is recorded, and no event is created, unless `start` was called; recording waits for the device
where it starts and at each step's end, when compute is idle anyway, and nowhere else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import pairwise
from typing import Any, Protocol

import torch

from horizon.errors import HorizonError

COMPUTE, HOST, FETCH, DRAIN, UPDATE = "compute", "host", "H2D", "D2H", "update"  # lanes; "update 0", "update 1", ...
DISK = "disk"  # lanes "disk 0", "disk 1", ...: one for each thread that moves states on nvme
HBM_UPDATE = "HBM update"  # also the name of an update that compute itself does
PACED = 100e-6  # seconds of work queued, below which the device would soon have run dry
HOST_RESOLUTION = 20e-6  # seconds; shorter stretches of the host's lane belong to the one before


class Cause(StrEnum):
    """Why the compute stream's time passed."""

    arithmetic = "arithmetic"  # kernels of a block
    link = "link"  # bytes were on their way between host and device
    optimizer = "optimizer"  # an update was not done, or still held a host buffer
    disk = "disk"  # bytes were on their way between disk and host
    data = "data"  # the caller: its rows, and their way to the device
    launch = "launch"  # nothing was queued, the host was still issuing


@dataclass(frozen=True, slots=True)
class Activity:
    """What compute does from one mark to the next."""

    cause: Cause
    what: str  # "forward", "backward", "head"; of a wait, what it is for: "weights", "gradient slot"
    block: int | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """One bar of the timeline; seconds since the first recorded step began."""

    lane: str
    what: str
    block: int | None
    start: float
    end: float
    cause: Cause | None = None  # on the lanes compute and host
    num_bytes: int = 0  # copied, or touched by an update
    paced: float = 0.0  # seconds of arithmetic in which the device waited for the host to issue it

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class StepTimeline:
    """One recorded step, from the end of the step before to its own."""

    start: float
    end: float
    spans: tuple[Span, ...]

    def lane(self, name: str) -> list[Span]:
        """The spans of one lane, in order."""
        return [span for span in self.spans if span.lane == name]


class Clock(Protocol):
    """Points in a stream's work and in the host's, on one scale of seconds."""

    synchronous: bool  # work on a stream is done when the call that issues it returns
    resolution: float  # shorter waits cannot be told from none

    def now(self) -> float:
        """The host's time."""

    def point(self, stream: Any) -> Any:
        """The end of the work queued on `stream`, without waiting for it."""

    def anchor(self, stream: Any) -> Any:
        """A point that `seconds` counts from; waits for the work queued on `stream`."""

    def seconds(self, anchor: Any, point: Any) -> float:
        """When `point` was reached, on the host's scale; all work must be done."""


class HostClock:
    """Stand-in streams: a point is reached when it is taken."""

    synchronous, resolution = True, 0.0

    def now(self) -> float:
        return time.perf_counter()

    def point(self, stream: Any) -> float:
        return self.now()

    anchor = point

    def seconds(self, anchor: float, point: float) -> float:
        return point


class CudaClock:
    """Timing events; an anchor ties them to the host's clock within some tens of microseconds.

    Of several anchors the one counts that took least: after the others, a thread of the updater had the interpreter
    before the host could look at its clock.
    """

    synchronous, resolution, num_anchors = False, 10e-6, 8

    def now(self) -> float:
        return time.perf_counter()

    def point(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        stream.record_event(event)
        return event

    def anchor(self, stream: torch.cuda.Stream) -> tuple[torch.cuda.Event, float]:
        return min((self._anchor(stream) for _ in range(self.num_anchors)), key=lambda found: found[0])[1:]

    def _anchor(self, stream: torch.cuda.Stream) -> tuple[float, torch.cuda.Event, float]:
        """(seconds that it took, event, when the host saw it reached)."""
        before, event = self.now(), self.point(stream)
        event.synchronize()
        reached = self.now()
        return reached - before, event, reached

    def seconds(self, anchor: tuple[torch.cuda.Event, float], point: torch.cuda.Event) -> float:
        event, reached = anchor
        return float(reached + event.elapsed_time(point) / 1e3)


@dataclass(slots=True)
class _Mark:
    host: float
    point: Any
    activity: Activity


@dataclass(slots=True)
class _Transfer:
    lane: str
    what: str
    block: int | None
    start: Any
    end: Any = None
    num_bytes: int = 0


@dataclass(slots=True)
class _Step:
    anchor: Any
    start: float  # on the host, when the anchor had been reached
    marks: list[_Mark] = field(default_factory=list)
    transfers: list[_Transfer] = field(default_factory=list)


@dataclass(slots=True)
class _Record:
    compute: Any
    steps: list[_Step] = field(default_factory=list)
    updates: list[Span] = field(default_factory=list)  # by the threads of update and disk; the host's scale
    moving: dict[str, _Transfer] = field(default_factory=dict)  # open transfers by lane
    activity: Activity = Activity(Cause.data, "between steps")


class Timeline:
    """Records steps between `start` and `stop`; at other times every call returns at once and leaves nothing.

    All methods but `update`, `disk` and `beside` belong to the thread that drives the device.
    """

    def __init__(self, clock: Clock | None = None):
        self._clock: Clock = HostClock() if clock is None else clock
        self._record: _Record | None = None

    @property
    def recording(self) -> bool:
        """Whether steps are being recorded."""
        return self._record is not None

    # ---- what the parts of a step report

    def enter(self, cause: Cause, what: str, block: int | None = None) -> None:
        """From here on compute does this."""
        if self._record is not None:
            self._mark(self._record, Activity(cause, what, block))

    def during(self, cause: Cause, what: str, block: int | None = None) -> AbstractContextManager[None]:
        """While open compute does this, then again what it did before.

        Around a wait, of the stream for an event or of the host for a thread, it gives the wait its cause.
        """
        if self._record is None:
            return nullcontext()
        return self._during(self._record, Activity(cause, what, block))

    def transfer(self, lane: str, stream: Any, what: str, block: int | None) -> AbstractContextManager[None]:
        """The copies that are issued on `stream` while open are one transfer."""
        if self._record is None:
            return nullcontext()
        # A stand-in copies while compute stands still, so there the link is what compute waits for.
        waits = self.during(Cause.link, what, block) if self._clock.synchronous else nullcontext()
        return self._issuing(self._record, stream, _Transfer(lane, what, block, None), waits)

    def beside(self, lane: str, stream: Any, what: str, block: int | None) -> AbstractContextManager[None]:
        """Kernels issued to `stream` while open run beside compute's; from one thread for each lane."""
        if self._record is None:
            return nullcontext()
        return self._issuing(self._record, stream, _Transfer(lane, what, block, None), nullcontext())

    def count(self, lane: str, num_bytes: int) -> None:
        """So many bytes belong to the lane's open transfer."""
        if self._record is not None and lane in self._record.moving:
            self._record.moving[lane].num_bytes += num_bytes

    def update(self, block: int, num_bytes: int) -> AbstractContextManager[None]:
        """The calling thread updates parameters of `block`, reading and writing `num_bytes` of host memory.

        What is under way when recording begins is not seen.
        """
        if self._record is None:
            return nullcontext()
        return self._beside(self._record, "update", block, num_bytes)

    def disk(self, what: str, block: int, num_bytes: int) -> AbstractContextManager[None]:
        """The calling thread reads or writes states of `block` on nvme; may be called by any thread."""
        if self._record is None:
            return nullcontext()
        return self._beside(self._record, what, block, num_bytes)

    def end_step(self) -> None:
        """A step is over and compute is idle; from here on the time is the caller's."""
        if self._record is not None:
            self._new_step(self._record)

    # ---- recording

    def start(self, compute: Any) -> None:
        """Record from now on; waits for the work queued on `compute`."""
        if self._record is not None:
            raise HorizonError("steps are being recorded already; end that trace before beginning another")
        record = _Record(compute)
        self._new_step(record)
        self._record = record

    def stop(self) -> list[StepTimeline]:
        """Record no more; gives the steps that ended since `start`. All device work must be done."""
        record, self._record = self._record, None
        return [] if record is None else _resolve(record, self._clock)

    def forget(self) -> None:
        """Record no more, and drop what was recorded."""
        self._record = None

    def _new_step(self, record: _Record) -> None:
        anchor = self._clock.anchor(record.compute)
        record.steps.append(_Step(anchor, self._clock.now()))
        self._mark(record, Activity(Cause.data, "between steps"))

    def _mark(self, record: _Record, activity: Activity) -> None:
        record.activity = activity
        issued = self._clock.now()  # before: the device may get there while an update thread has the interpreter
        record.steps[-1].marks.append(_Mark(issued, self._clock.point(record.compute), activity))

    @contextmanager
    def _during(self, record: _Record, activity: Activity) -> Iterator[None]:
        before = record.activity
        self._mark(record, activity)
        try:
            yield
        finally:
            self._mark(record, before)

    @contextmanager
    def _issuing(
        self, record: _Record, stream: Any, transfer: _Transfer, waits: AbstractContextManager[None]
    ) -> Iterator[None]:
        with waits:
            record.moving[transfer.lane] = transfer
            transfer.start = self._clock.point(stream)
            try:
                yield
            finally:
                transfer.end = self._clock.point(stream)
                record.steps[-1].transfers.append(record.moving.pop(transfer.lane))

    @contextmanager
    def _beside(self, record: _Record, what: str, block: int, num_bytes: int) -> Iterator[None]:
        start = self._clock.now()
        yield
        lane = threading.current_thread().name.removeprefix("horizon-").replace("-", " ").replace("_", " ")
        record.updates.append(Span(lane, what, block, start, self._clock.now(), None, num_bytes))


def _resolve(record: _Record, clock: Clock) -> list[StepTimeline]:
    """Times for what was marked; the last step of the record has not ended and is left out."""
    origin, updates = record.steps[0].start, sorted(list(record.updates), key=lambda span: span.start)
    steps = []
    for step, following in pairwise(record.steps):
        reached = _increasing([clock.seconds(step.anchor, m.point) for m in step.marks], step.start, following.start)
        issued = _increasing([m.host for m in step.marks], step.start, following.start)
        compute = _stretches(COMPUTE, step.marks, reached, clock.resolution, None if clock.synchronous else issued)
        spans = [
            *_blame_disk(compute, updates),
            *_stretches(HOST, step.marks, issued, max(clock.resolution, HOST_RESOLUTION), None),
            *(_moved_bytes(transfer, step.anchor, clock) for transfer in step.transfers),
            *(span for span in updates if step.start <= span.start < following.start),
        ]
        moved = tuple(replace(span, start=span.start - origin, end=span.end - origin) for span in spans)
        steps.append(StepTimeline(step.start - origin, following.start - origin, moved))
    return steps


def _blame_disk(compute: Sequence[Span], beside: Sequence[Span]) -> Iterator[Span]:
    """Waits for the optimizer, cut: where none of its threads worked and the disk did, the disk was waited for."""
    updating = union([span for span in beside if span.lane.startswith(UPDATE)])
    moving = union([span for span in beside if span.lane.startswith(DISK)])
    for span in compute:
        if span.cause is not Cause.optimizer or span.what == HBM_UPDATE or not moving:
            yield span
            continue
        edges = sorted(
            {span.start, span.end, *(e for u in (*updating, *moving) for e in u if span.start < e < span.end)}
        )
        for start, end in pairwise(edges):
            middle = (start + end) / 2
            by_disk = any(a <= middle < b for a, b in moving) and not any(a <= middle < b for a, b in updating)
            yield replace(span, start=start, end=end, cause=Cause.disk if by_disk else Cause.optimizer)


def union(spans: Sequence[Span]) -> list[tuple[float, float]]:
    """The times in which at least one of the spans, ordered by their start, is open."""
    found: list[tuple[float, float]] = []
    for span in spans:
        if found and span.start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], span.end)
        else:
            found.append((span.start, span.end))
    return found


def _moved_bytes(transfer: _Transfer, anchor: Any, clock: Clock) -> Span:
    start, end = (clock.seconds(anchor, point) for point in (transfer.start, transfer.end))
    return Span(transfer.lane, transfer.what, transfer.block, start, end, None, transfer.num_bytes)


def _increasing(times: Sequence[float], start: float, end: float) -> list[float]:
    """`times` between `start` and `end`, none before its predecessor, closed by `end`: clocks agree only nearly."""
    found, last = [start], start  # the first mark opens the step
    for time_ in times[1:]:
        last = min(max(last, time_), end)
        found.append(last)
    return [*found, end]


def _stretches(
    lane: str, marks: Sequence[_Mark], times: Sequence[float], resolution: float, issued: Sequence[float] | None
) -> list[Span]:
    """The lane between marks without a hole; a wait too short to be told from none belongs to what came before."""
    found: list[Span] = []
    for index, (mark, (start, end)) in enumerate(zip(marks, pairwise(times), strict=True)):
        doing = mark.activity
        works = doing.cause is Cause.arithmetic
        paced = end - start if works and issued and end - issued[index + 1] < PACED else 0.0
        if found and not works and end - start <= resolution:
            found[-1] = replace(found[-1], end=end)
        elif found and (found[-1].cause, found[-1].what, found[-1].block) == (doing.cause, doing.what, doing.block):
            found[-1] = replace(found[-1], end=end, paced=found[-1].paced + paced)
        elif end > start:
            found.append(Span(lane, doing.what, doing.block, start, end, doing.cause, 0, paced))
    return found
