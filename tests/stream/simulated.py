"""A device that only keeps time: the real executor runs on it, every duration is given, and nothing depends on a clock.

The host's time stands still unless something moves it. Work that is issued to a stream begins when the stream is free
and has been told to, and lasts as long as `Durations` says. All durations of the tests are whole numbers, so sums are
exact.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from horizon.config.schema import Recompute
from horizon.models.blocks import BlockModel
from horizon.store.gradients import KeptGradients
from horizon.store.offload import HostRegions
from horizon.stream.boundaries import Boundaries
from horizon.stream.executor import Executor
from horizon.stream.streams import Streams
from horizon.stream.timeline import Cause, StepTimeline, Timeline
from tests.stream.steps import HIDDEN, ROWS, TOKENS, filled_store, micro_batches, settings_of

SMALL = 64  # elements: the loss and the norms of a block are fewer, and take no time


@dataclass(frozen=True)
class Durations:
    kernel: int = 10  # a forward of a block, and a backward of one without the forward that may come before it
    fetch: int = 4  # each copy to the device
    drain: int = 3  # each copy to the host
    issue: int = 0  # of the host, for each of these
    data: int = 0  # of the caller, before a step
    published: Mapping[int, int] = field(default_factory=dict)  # when a block's update is done; missing: before
    buffers: Mapping[int, int] = field(default_factory=dict)  # when a block's host gradient buffer is free


class SimulatedClock:
    """The host's time, moved by hand."""

    synchronous, resolution = False, 0.0

    def __init__(self) -> None:
        self.host = 0

    def now(self) -> int:
        return self.host

    def reach(self, time: int) -> None:
        self.host = max(self.host, time)

    def point(self, stream: SimulatedStream) -> int:
        return stream.end()

    def anchor(self, stream: SimulatedStream) -> int:
        self.reach(stream.end())
        return self.host

    def seconds(self, anchor: int, point: int) -> int:
        return point


@dataclass
class SimulatedEvent:
    time: int
    clock: SimulatedClock

    def synchronize(self) -> None:
        self.clock.reach(self.time)


class SimulatedStream:
    def __init__(self, clock: SimulatedClock):
        self.clock, self.free = clock, 0
        self.watched: Timeline | None = None
        self.sites: dict[tuple[str, str, int], Cause] = {}  # where it was told to wait, and what the timeline said

    def end(self) -> int:
        """When all that was issued until now is done."""
        return max(self.free, self.clock.host)

    def work(self, duration: int) -> None:
        self.free = self.end() + duration

    def wait_event(self, event: SimulatedEvent) -> None:
        caller = sys._getframe(1)
        if self.watched is not None:
            site = Path(caller.f_code.co_filename).name, caller.f_code.co_name, caller.f_lineno
            self.sites[site] = self.watched._record.activity.cause
        self.free = max(self.end(), event.time)

    def record_event(self) -> SimulatedEvent:
        return SimulatedEvent(self.end(), self.clock)


class SimulatedStreams(Streams):
    clock: SimulatedClock
    durations: Durations

    def __init__(self, durations: Durations):
        clock = SimulatedClock()
        super().__init__(torch.device("cpu"), *(SimulatedStream(clock) for _ in range(4)), Timeline(clock))
        object.__setattr__(self, "clock", clock)
        object.__setattr__(self, "durations", durations)
        self.compute.watched = self.timeline

    def running(self, stream: Any) -> Any:
        return super().running(None)

    def kernel(self) -> None:
        self.clock.host += self.durations.issue
        self.compute.work(self.durations.kernel)

    def copy(self, stream: Any, target: Tensor, source: Tensor) -> None:
        if source.numel() >= SMALL:
            self.clock.host += self.durations.issue
            stream.work(self.durations.fetch if stream is self.fetch else self.durations.drain)
        super().copy(stream, target, source)


class SimulatedLedger:
    """Blocks become what the step asks for at a given time."""

    def __init__(self, clock: SimulatedClock, published: Mapping[int, int]):
        self._clock, self._published = clock, published

    def version(self, block: int) -> int:
        return int(self._clock.host >= self._published.get(block, 0))

    def wait(self, block: int, version: int) -> None:
        self._clock.reach(self._published.get(block, 0))


class SimulatedBuffers(KeptGradients):
    """Buffers that an update gives back at a given time."""

    clock: SimulatedClock
    freed: Mapping[int, int]

    def claim(self, block: int) -> Tensor:
        self.clock.reach(self.freed.get(block, 0))
        return super().claim(block)


class LastLanding:
    """A sink that remembers when the last gradient has landed."""

    event: Any = None

    def turned(self, loss: Tensor, event: Any) -> None:
        pass

    def landed(self, block: int, event: Any, norms: Tensor) -> None:
        self.event = event


def simulate(
    model: BlockModel,
    durations: Durations,
    *,
    weight_slots: int = 2,
    num_micro_batches: int = 1,
    offloaded: Sequence[int] = (),
    old_share: float = 0.0,
    recompute: Mapping[int, Recompute] | None = None,
    in_hbm: Set[int] = frozenset(),
    turn_layers: int = 0,
) -> tuple[StepTimeline, SimulatedStreams]:
    """One recorded step, from the end of the step before to its own."""
    streams, store = SimulatedStreams(durations), filled_store(model, in_hbm)
    store.ledger = SimulatedLedger(streams.clock, durations.published)  # type: ignore[assignment]
    executor = Executor(model, store, streams, settings_of(model, torch.bfloat16, weight_slots, turn_layers))
    buffers = SimulatedBuffers(model.layouts, torch.bfloat16, pin=False, in_hbm=in_hbm)
    buffers.clock, buffers.freed = streams.clock, durations.buffers
    executor.use_buffers(buffers)
    keys = [(block, m) for block in offloaded for m in range(num_micro_batches)]
    space = {key: [torch.empty(ROWS * TOKENS * HIDDEN * 2, dtype=torch.uint8)] for key in keys}
    batches, sink = micro_batches(num_micro_batches), LastLanding()
    with _timed(executor, streams):
        streams.timeline.start(streams.compute)
        streams.clock.host += durations.data
        with streams.entered():
            executor.train(
                batches,
                1,
                Boundaries(streams, HostRegions(space)),
                sink,
                seed=0,
                recompute=recompute or {},
                old_share=old_share,
            )
            with streams.waiting(Cause.link, "last gradient"):
                sink.event.synchronize()
        streams.timeline.end_step()
        (step,) = streams.timeline.stop()
    return step, streams


@contextmanager
def _timed(executor: Executor, streams: SimulatedStreams) -> Iterator[None]:
    """Each forward of a block takes a kernel's time, and so does each backward."""
    passes, head = executor._passes, executor._head_loss

    def timed(function: Any, num_kernels: int) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            for _ in range(num_kernels):
                streams.kernel()
            return function(*args, **kwargs)

        return wrapped

    with (
        mock.patch.object(passes, "embed", timed(passes.embed, 1)),
        mock.patch.object(passes, "forward", timed(passes.forward, 1)),
        mock.patch.object(passes, "backward", timed(passes.backward, 2)),
        mock.patch.object(passes, "backward_kept", timed(passes.backward_kept, 1)),
        mock.patch.object(head, "backward", timed(head.backward, 2)),
    ):
        yield


def totals(step: StepTimeline) -> dict[str, float]:
    """Seconds of compute by cause, without those that have none."""
    found: dict[str, float] = {}
    for span in step.lane("compute"):
        found[str(span.cause)] = found.get(str(span.cause), 0) + span.seconds
    return found
