"""Boundary activations: the hidden states between blocks, one per block and micro-batch, kept from forward to backward.

They stay on the device while the budget allows. An offloaded one is copied to pinned host memory as soon as it exists,
from where it may go on to nvme; its device memory is given back once the next block has read it, and it returns shortly
before backward needs it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from horizon.plan.activations import LOOKAHEAD, Key
from horizon.store.offload import Away
from horizon.stream.streams import Streams
from horizon.stream.timeline import Cause


class Boundaries:
    """The boundaries of one step.

    Args:
        away: where those are that are offloaded; the others stay on the device.
    """

    def __init__(self, streams: Streams, away: Away):
        self._streams, self._away = streams, away
        self._device: dict[Key, Tensor] = {}
        self._saved: dict[Key, tuple[Any, torch.Size, torch.dtype]] = {}  # copy's event, shape, dtype
        self._returning: dict[Key, tuple[Tensor, Any]] = {}
        self._order: deque[Key] = deque()

    def save(self, key: Key, hidden: Tensor) -> None:
        """Keep `hidden`; where it is offloaded, start its way to the host."""
        hidden = self._device[key] = hidden.contiguous()
        if key in self._away:
            drain, memory = self._streams.drain, self._claim(key)
            drain.wait_event(self._streams.compute.record_event())
            with self._streams.moving(drain, "boundary", key[0]):
                for piece, part in _pieces(memory, hidden):
                    self._streams.copy(drain, piece, part)
            self._saved[key] = drain.record_event(), hidden.shape, hidden.dtype
            self._away.filled(key, self._saved[key][0])

    def read(self, key: Key) -> None:
        """The forward has read the boundary: an offloaded one gives its device memory back."""
        if key in self._saved:
            # Without this wait the allocator could hand the memory to the next kernel while it is being copied.
            with self._streams.waiting(Cause.link, "boundary on its way out", key[0]):
                self._streams.compute.wait_event(self._saved[key][0])
            del self._device[key]

    def begin_backward(self, order: Sequence[Key]) -> None:
        """Tell in which order `take` will ask, so that offloaded boundaries return in time."""
        self._order = deque(key for key in order if key in self._saved)
        self._away.expect([*self._order])
        self._bring_back()

    def take(self, key: Key) -> Tensor:
        """The boundary, on the device, for the last time."""
        if key not in self._saved:
            return self._device.pop(key)
        if key not in self._returning:
            self._bring_back(wait=True)
        hidden, landed = self._returning.pop(key)
        with self._streams.waiting(Cause.link, "boundary", key[0]):
            self._streams.compute.wait_event(landed)
        self._bring_back()
        return hidden

    def _bring_back(self, wait: bool = False) -> None:
        """Start the way back of what comes next and is on the host; with `wait`, at least of the very next."""
        while self._order and len(self._returning) < LOOKAHEAD:
            if not (wait or self._away.is_ready(self._order[0])):
                return
            key, wait = self._order.popleft(), False
            memory = self._claim(key)
            saved, shape, dtype = self._saved[key]
            fetch = self._streams.fetch
            hidden = self._streams.empty(*shape, dtype=dtype)
            fetch.wait_event(self._streams.compute.record_event())  # earlier users of this memory
            fetch.wait_event(saved)
            with self._streams.moving(fetch, "boundary", key[0]):
                for piece, part in _pieces(memory, hidden):
                    self._streams.copy(fetch, part, piece)
            landed = fetch.record_event()
            self._returning[key] = hidden, landed
            self._away.release(key, landed)

    def _claim(self, key: Key) -> Sequence[Tensor]:
        """Host memory for the boundary; the disk may still be busy with others there, or with this one."""
        if self._away.is_ready(key):
            return self._away.claim(key)
        with self._streams.waiting(Cause.disk, "boundary", key[0]):
            return self._away.claim(key)


def _pieces(memory: Sequence[Tensor], hidden: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(host bytes, the part of `hidden` that belongs there)."""
    flat, start = hidden.view(-1).view(torch.uint8), 0
    for piece in memory:
        end = min(start + piece.numel(), flat.numel())
        yield piece[: end - start], flat[start:end]
        start = end
