"""Streams for tests on CPU: everything is done at once and in order, and yet what a device could reorder is known.

A `Recorder` writes a log of labelled operations and waits, and it looks for races. Every torch operation belongs to
the stream that is current and reads and writes the memory of its arguments; two accesses to the same bytes, one of
them a write, on different streams, must be ordered by a chain of events. Freed memory goes back to compute, as with
CUDA's caching allocator. Clocks are vector clocks: stream -> operations known to be over.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from horizon.stream.streams import Streams

Site = tuple[str, str, int]  # file, function, line of a wait
Clock = dict[str, int]


@dataclass(slots=True)
class RecordedEvent:
    stream: str
    after: str  # label of the last operation before it
    clock: Clock
    waiters: list[str] = field(default_factory=list)

    def synchronize(self) -> None:
        self.waiters.append("host")


@dataclass(slots=True)
class RecordedStream:
    name: str
    recorder: Recorder

    def wait_event(self, event: RecordedEvent) -> None:
        caller = sys._getframe(1)
        site = Path(caller.f_code.co_filename).name, caller.f_code.co_name, caller.f_lineno
        self.recorder.wait(self.name, event, site)

    def record_event(self) -> RecordedEvent:
        return self.recorder.record(self.name)


class RecordedStreams(Streams):
    """What the executor is given instead of a device's streams."""

    recorder: Recorder

    def __init__(self, recorder: Recorder):
        roles = ("compute", "fetch", "drain", "update")
        super().__init__(torch.device("cpu"), *(RecordedStream(role, recorder) for role in roles))
        object.__setattr__(self, "recorder", recorder)

    def running(self, stream: Any) -> AbstractContextManager[None]:
        return self.recorder.current_stream(stream.name)

    def copy(self, stream: Any, target: Tensor, source: Tensor) -> None:
        name = self.recorder.name_of(target) or self.recorder.name_of(source) or "?"
        self.recorder.label(stream.name, f"{'load' if stream.name == 'fetch' else 'drain'} {name}")
        super().copy(stream, target, source)


class Recorder(TorchDispatchMode):
    """Open it (`with recorder:`) around the code under test.

    Args:
        dropped: ignore the waits of this place in the code, as if it had been forgotten.
    """

    def __init__(self, dropped: Site | None = None):
        super().__init__()
        self.log: list[str] = []
        self.races: list[str] = []
        self.sites: set[Site] = set()
        self.events: list[RecordedEvent] = []
        self._dropped = dropped
        self._current = "compute"
        self._labels: dict[str, str] = {}
        self._names: list[tuple[int, int, str]] = []
        self._clocks: dict[str, Clock] = {}
        self._history: dict[int, dict[tuple[int, int, str, bool], tuple[int, str]]] = {}
        self._borrowed: dict[int, tuple[StorageWeakRef, int]] = {}  # memory that other streams than compute have used

    # ---- what happened, for reading

    def name(self, tensor: Tensor, name: str) -> None:
        """Call copies from and to this memory `name`."""
        start, end = _span(tensor)
        self._names.append((start, end, name))

    def name_of(self, tensor: Tensor) -> str | None:
        start, _ = _span(tensor)
        return next((name for first, last, name in self._names if first <= start < last), None)

    def label(self, stream: str, what: str) -> None:
        self._labels[stream] = what
        self.log.append(f"{stream:<8}{what}")

    # ---- order

    def clock(self, stream: str) -> Clock:
        return self._clocks.setdefault(stream, {})

    def record(self, stream: str) -> RecordedEvent:
        event = RecordedEvent(stream, self._labels.get(stream, "nothing"), dict(self.clock(stream)))
        self.events.append(event)
        return event

    def wait(self, stream: str, event: RecordedEvent, site: Site) -> None:
        self._look_for_freed_memory()
        self.sites.add(site)
        if site != self._dropped:
            event.waiters.append(stream)
            self.log.append(f"{stream:<8}  waits for {event.stream}: {event.after}")
            self.merge(stream, event.clock)

    def merge(self, stream: str, clock: Clock) -> None:
        """What `clock` knows to be over is over for `stream` as well."""
        mine = self.clock(stream)
        for other, time in clock.items():
            mine[other] = max(mine.get(other, 0), time)

    @contextmanager
    def current_stream(self, stream: str) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    # ---- memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._look_for_freed_memory()
        result = func(*args, **(kwargs or {}))
        reads, writes = _accessed(func, args, kwargs or {}, result)
        if writes:  # else it only made a view
            self.access(self._current, str(func), reads, writes)
        return result

    def access(self, stream: str, what: str, reads: list[Tensor], writes: list[Tensor]) -> None:
        """Note one operation on `stream`."""
        self._tick(stream)
        for tensor in (*reads, *writes):
            if stream != "compute":
                storage = tensor.untyped_storage()
                self._borrowed.setdefault(storage.data_ptr(), (StorageWeakRef(storage), storage.nbytes()))
        for write, tensors in ((False, reads), (True, writes)):
            for tensor in tensors:
                if tensor.numel():
                    self._touch(stream, what, tensor.untyped_storage().data_ptr(), _span(tensor), write)

    def _tick(self, stream: str) -> None:
        self.merge(stream, self.clock("host"))  # whoever issues work has finished what it did before
        self.clock(stream)[stream] = self.clock(stream).get(stream, 0) + 1

    def _touch(self, stream: str, what: str, storage: int, span: tuple[int, int], write: bool) -> None:
        seen, clock = self._history.setdefault(storage, {}), self.clock(stream)
        for (start, end, other, written), (time, earlier) in seen.items():
            overlap = start < span[1] and span[0] < end
            if overlap and other != stream and (write or written) and clock.get(other, 0) < time:
                self.races.append(
                    f"{stream} {what} (after {self._labels.get(stream)!r}) does not wait for {other} {earlier}"
                )
        seen[*span, stream, write] = clock[stream], f"{what} (after {self._labels.get(stream)!r})"

    def _look_for_freed_memory(self) -> None:
        for storage, (reference, num_bytes) in list(self._borrowed.items()):
            if reference.expired():
                del self._borrowed[storage]
                self._tick("compute")
                self._touch("compute", "reuse of freed memory", storage, (storage, storage + num_bytes), True)


def _span(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize


def _accessed(func: Any, args: Any, kwargs: Any, result: Any) -> tuple[list[Tensor], list[Tensor]]:
    reads: list[Tensor] = []
    writes: list[Tensor] = []
    schema = func._schema
    given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | dict(kwargs)
    for argument in schema.arguments:
        tensors = [t for t in tree_leaves(given.get(argument.name)) if isinstance(t, Tensor)]
        written = argument.alias_info is not None and argument.alias_info.is_write
        (writes if written else reads).extend(tensors)
    if all(returned.alias_info is None for returned in schema.returns):
        writes += [t for t in tree_leaves(result) if isinstance(t, Tensor)]
    return reads, writes


class RecordedSink:
    """Takes gradients as the optimizer does: reads them after their event, then writes the block's weights.

    Blocks in HBM are updated by kernels on compute, once all gradients have landed.
    """

    def __init__(
        self, recorder: Recorder, gradients: list[Tensor], weights: list[list[Tensor]], in_hbm: Set[int] = frozenset()
    ):
        self._recorder, self._gradients, self._weights, self._in_hbm = recorder, gradients, weights, in_hbm
        self.landings: list[int] = []

    def turned(self, loss: Tensor, event: RecordedEvent) -> None:
        self._follow(event)
        self._recorder.access("updater", "read of the loss", [loss], [])

    def landed(self, block: int, event: RecordedEvent, norms: Tensor) -> None:
        self.landings.append(block)
        self._follow(event)
        if block not in self._in_hbm:
            self._update("updater", block, norms)

    def finish(self) -> None:
        """The host goes on when all updates are done; those on compute it has given to the device."""
        self._recorder.merge("host", self._recorder.clock("updater"))
        for block in sorted(self._in_hbm):
            self._recorder.label("compute", f"update {block}")
            self._update("compute", block)

    def _update(self, stream: str, block: int, *norms: Tensor) -> None:
        self._recorder.access(stream, "update", [self._gradients[block], *norms], [s[block] for s in self._weights])

    def _follow(self, event: RecordedEvent) -> None:
        event.waiters.append("updater")
        self._recorder.merge("updater", event.clock)
