"""Boundary activations: the hidden states between blocks, one per block and micro-batch, kept from forward to backward.

They stay on the device while the budget allows. An offloaded one is copied to pinned host memory as soon as it exists;
its device memory is given back once the next block has read it, and it returns shortly before backward needs it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from horizon.plan.activations import LOOKAHEAD
from horizon.stream.streams import Streams
from horizon.stream.timeline import Cause

Key = tuple[int, int]  # block that takes the hidden states as input, micro-batch


class Boundaries:
    """The boundaries of one step.

    Args:
        host: pinned host memory (bytes, in pieces) for every boundary that is offloaded; the others stay on the device.
    """

    def __init__(self, streams: Streams, host: Mapping[Key, Sequence[Tensor]]):
        self._streams, self._host = streams, host
        self._device: dict[Key, Tensor] = {}
        self._saved: dict[Key, tuple[Any, torch.Size, torch.dtype]] = {}  # copy's event, shape, dtype
        self._returning: dict[Key, tuple[Tensor, Any]] = {}
        self._order: deque[Key] = deque()

    def save(self, key: Key, hidden: Tensor) -> None:
        """Keep `hidden`; where it is offloaded, start its way to the host."""
        hidden = self._device[key] = hidden.contiguous()
        if key in self._host:
            drain = self._streams.drain
            drain.wait_event(self._streams.compute.record_event())
            with self._streams.moving(drain, "boundary", key[0]):
                for piece, part in self._pieces(key, hidden):
                    self._streams.copy(drain, piece, part)
            self._saved[key] = drain.record_event(), hidden.shape, hidden.dtype

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
        self._bring_back()

    def take(self, key: Key) -> Tensor:
        """The boundary, on the device, for the last time."""
        if key not in self._saved:
            return self._device.pop(key)
        hidden, landed = self._returning.pop(key)
        with self._streams.waiting(Cause.link, "boundary", key[0]):
            self._streams.compute.wait_event(landed)
        self._bring_back()
        return hidden

    def _bring_back(self) -> None:
        while self._order and len(self._returning) < LOOKAHEAD:
            key = self._order.popleft()
            saved, shape, dtype = self._saved[key]
            fetch = self._streams.fetch
            hidden = self._streams.empty(*shape, dtype=dtype)
            fetch.wait_event(self._streams.compute.record_event())  # earlier users of this memory
            fetch.wait_event(saved)
            with self._streams.moving(fetch, "boundary", key[0]):
                for piece, part in self._pieces(key, hidden):
                    self._streams.copy(fetch, part, piece)
            self._returning[key] = hidden, fetch.record_event()

    def _pieces(self, key: Key, hidden: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(host bytes, the part of `hidden` that belongs there)."""
        flat, start = hidden.view(-1).view(torch.uint8), 0
        for piece in self._host[key]:
            end = min(start + piece.numel(), flat.numel())
            yield piece[: end - start], flat[start:end]
            start = end
