"""Streams and events by role, and the stand-in that runs the same executor without a GPU.

On a GPU the streams overlap: `compute` runs kernels, `fetch` brings bytes to the device ahead of them, `drain` takes
bytes away behind them, `update` runs AdamW beside them on blocks that live on the device. On CPU every call completes
before it returns, so streams and events have nothing to order; the executor's code is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from horizon.stream.timeline import DRAIN, FETCH, Cause, CudaClock, Timeline


class Event(Protocol):
    """A point in a stream's work."""

    def synchronize(self) -> None:
        """Block the calling thread until the point has been reached."""


class Stream(Protocol):
    """An ordered queue of device work."""

    def wait_event(self, event: Any) -> None:
        """Later work on this stream starts after `event`."""

    def record_event(self) -> Any:
        """An event after all work queued so far."""


class DoneEvent:
    """An event on a device that works synchronously: always in the past."""

    def synchronize(self) -> None:
        pass


class HostStream:
    """A stream whose work is done when the call returns."""

    def wait_event(self, event: Event) -> None:
        pass

    def record_event(self) -> DoneEvent:
        return DoneEvent()


@dataclass(frozen=True, slots=True)
class Streams:
    """The streams of one device, by role."""

    device: torch.device
    compute: Stream  # kernels
    fetch: Stream  # host -> device, overlaps compute
    drain: Stream  # device -> host, overlaps compute and fetch
    update: Stream  # AdamW on blocks in HBM, overlaps the backward of others
    timeline: Timeline = field(default_factory=Timeline)  # of what they do, while steps are recorded

    @classmethod
    def on(cls, device: torch.device) -> Streams:
        """Streams for `device`; compute is the stream that is current now."""
        if device.type != "cuda":
            return cls(device, HostStream(), HostStream(), HostStream(), HostStream())
        fetch, drain, update = (torch.cuda.Stream(device) for _ in range(3))  # type: ignore[no-untyped-call]
        return cls(device, torch.cuda.current_stream(device), fetch, drain, update, Timeline(CudaClock()))

    def running(self, stream: Stream) -> AbstractContextManager[Any]:
        """Kernels and copies issued while open go to `stream`."""
        return torch.cuda.stream(stream) if isinstance(stream, torch.cuda.Stream) else nullcontext()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """While open, kernels go to `compute`, after what the caller's own stream (and device) was given before."""
        if self.device.type == "cuda":
            with self.timeline.during(Cause.data, "the caller's stream"):
                self.compute.wait_event(torch.cuda.current_stream(self.device).record_event())
        with self.running(self.compute), self.timeline.during(Cause.launch, "issuing"):
            yield

    def copy(self, stream: Stream, target: Tensor, source: Tensor) -> None:
        """Copy between host and device on `stream`, without waiting for it."""
        with self.running(stream):
            target.copy_(source, non_blocking=True)
        self.timeline.count(self._lane(stream), target.nbytes)

    def moving(self, stream: Stream, what: str, block: int | None = None) -> AbstractContextManager[None]:
        """The copies issued on `stream` while open bring one thing across the link; open it after `stream`'s waits."""
        return self.timeline.transfer(self._lane(stream), stream, what, block)

    def waiting(self, cause: Cause, what: str, block: int | None = None) -> AbstractContextManager[None]:
        """Around every wait of compute for an event, and of the host for a thread: what it is for, and who is late."""
        return self.timeline.during(cause, what, block)

    def _lane(self, stream: Stream) -> str:
        return FETCH if stream is self.fetch else DRAIN

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised device memory."""
        return torch.empty(*shape, dtype=dtype, device=self.device)

    def release_memory(self) -> None:
        """Give back what the allocator keeps for later: what comes next has other sizes."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait for all work; used at step boundaries and on failure only."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
