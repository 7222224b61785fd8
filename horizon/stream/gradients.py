"""Gradients on their way from autograd to the host.

A block's parameter gradients are summed in fp32 in one flat buffer over all micro-batches, measured (one norm per
parameter), cast to the host's gradient dtype in a drain slot, and cross the link once. Sums that already wait on the
host (an earlier `forward_backward`, or the head's share of a tied embedding) are fetched first and added to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from horizon.layout import BlockLayout
from horizon.store.gradients import GradientBuffers
from horizon.stream.streams import Event, Streams


class GradientSink(Protocol):
    """Who uses the gradients: implemented by the optimizer's side."""

    def turned(self, loss: Tensor, event: Event) -> None:
        """The forward is over: after `event` the step's loss is in `loss`, a host scalar. No gradient landed before."""

    def landed(self, block: int, event: Event, norms: Tensor) -> None:
        """After `event` the block's whole gradient is in its host buffer, and in `norms` each parameter's L2 norm.

        `norms`: fp32 [trainable parameters] on the host, valid until the block's next gradient.
        """


@dataclass(slots=True)
class _DrainSlot:
    flat: Tensor  # [largest block's slot elements], host gradient dtype
    drained: Any = None  # on the drain stream, after the copy to the host


@dataclass(frozen=True, slots=True)
class _Span:
    """A range of a block's gradient slot and where it belongs on the host."""

    start: int
    end: int
    owner: int
    owner_start: int

    @property
    def host(self) -> slice:
        return slice(self.owner_start, self.owner_start + self.end - self.start)


@dataclass(frozen=True, slots=True)
class _Partial:
    """A sum that waits on the host to be added to."""

    share: float  # of it that counts
    landed: Any  # on the drain stream, when it was written in this pass


class GradientSlots:
    """Sums, measures and drains one block's gradients at a time.

    Args:
        buffers: the host side.
        num_slots: drain slots; 2 lets a block's copy run beside the next block's backward.
    """

    def __init__(self, streams: Streams, layouts: Sequence[BlockLayout], buffers: GradientBuffers, num_slots: int = 2):
        self._streams, self._layouts, self._buffers = streams, layouts, buffers
        size = max(lay.num_slot_elements for lay in layouts)
        self._slots = [_DrainSlot(streams.empty(size, dtype=buffers.dtype)) for _ in range(num_slots)]
        self._sum = streams.empty(size, dtype=torch.float32) if buffers.dtype is not torch.float32 else None
        self._spans = _all_spans(layouts)
        self._partial: dict[int, dict[tuple[int, int], _Partial]] = {}  # by owner and host range
        self._first_norm = _first_norms(layouts)
        self.norms = torch.zeros(self._first_norm[-1], dtype=torch.float32, device=streams.device)
        pin = streams.device.type == "cuda"
        self._host_norms = torch.zeros(self._first_norm[-1], dtype=torch.float32, pin_memory=pin)
        self._turn = 0
        self._block = -1
        self._target = self._slots[0].flat

    def begin_step(self, old_share: float) -> None:
        """Start a backward pass that leaves old_share * (sums on the host) + this pass's gradients; 0 replaces them."""
        self._partial = {}
        if old_share:
            for spans in self._spans:
                for span in spans:
                    parts = self._partial.setdefault(span.owner, {})
                    parts[span.host.start, span.host.stop] = _Partial(old_share, None)
        else:
            self.norms.zero_()

    def open(self, block: int, single: bool) -> None:
        """Start summing `block`'s gradients; with `single`, `add` will be called just once."""
        self._block = block
        slot = self._slot
        if slot.drained is not None:  # its last copy to the host must be over before it is written again
            self._streams.compute.wait_event(slot.drained)
        # A gradient that is no sum needs no fp32 detour: autograd made it in the dtype it is computed and kept in.
        self._target = slot.flat if self._sum is None or (single and not self._waiting(block)) else self._sum
        for span in self._spans[block]:
            self._target[span.start : span.end].zero_()
            for (start, stop), partial in self._partial.get(span.owner, {}).items():
                self._add_partial(slot, span, start, stop, partial)

    def add(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Add one micro-batch's gradients, by local name; a parameter that took no part may be None."""
        for name, offset, _ in self._layouts[self._block].grad_ranges():
            gradient = gradients[name]
            if gradient is not None:
                view = self._target[offset : offset + gradient.numel()].view(gradient.shape)
                view.add_(gradient)

    def close(self, sink: GradientSink) -> None:
        """Measure the sums, cast them, start their way to the host."""
        block, slot = self._block, self._slot
        if self._target is not slot.flat:
            for span in self._spans[block]:
                slot.flat[span.start : span.end].copy_(self._target[span.start : span.end])
        self._measure(block, slot.flat)
        self._drain(block, slot, sink)
        self._turn = (self._turn + 1) % len(self._slots)
        self._block = -1

    def _waiting(self, block: int) -> bool:
        """Whether sums to add to wait on the host."""
        return any(self._partial.get(span.owner) for span in self._spans[block])

    @property
    def _slot(self) -> _DrainSlot:
        return self._slots[self._turn]

    def _add_partial(self, slot: _DrainSlot, span: _Span, start: int, stop: int, partial: _Partial) -> None:
        start, stop = max(span.host.start, start), min(span.host.stop, stop)
        if start >= stop:
            return
        source = self._buffers.claim(span.owner)[start:stop]
        to = slice(span.start + start - span.host.start, span.start + stop - span.host.start)
        fetch, compute = self._streams.fetch, self._streams.compute
        fetch.wait_event(compute.record_event())  # the slot is free for writing
        if partial.landed is not None:
            fetch.wait_event(partial.landed)
        self._streams.copy(fetch, slot.flat[to], source)
        compute.wait_event(fetch.record_event())
        target = self._target[to]
        if self._target is not slot.flat:
            target.copy_(slot.flat[to])
        if partial.share != 1:
            target.mul_(partial.share)

    def _measure(self, block: int, flat: Tensor) -> None:
        params = self._layouts[block].trainable
        if params:
            views = [flat[p.offset : p.end] for p in params]
            first = self._first_norm[block]
            norms = torch._foreach_norm(views, 2, dtype=torch.float32)
            torch.stack(norms, out=self.norms[first : first + len(params)])

    def _drain(self, block: int, slot: _DrainSlot, sink: GradientSink) -> None:
        drain = self._streams.drain
        drain.wait_event(self._streams.compute.record_event())
        own = slice(self._first_norm[block], self._first_norm[block + 1])
        if self._layouts[block].num_trainable:
            self._streams.copy(drain, self._host_norms[own], self.norms[own])
        for span in self._spans[block]:
            self._streams.copy(drain, self._buffers.claim(span.owner)[span.host], slot.flat[span.start : span.end])
        slot.drained = drain.record_event()
        if self._layouts[block].num_trainable:
            sink.landed(block, slot.drained, self._host_norms[own])
        for span in self._spans[block]:
            if span.owner != block:
                parts = self._partial.setdefault(span.owner, {})
                parts[span.host.start, span.host.stop] = _Partial(1.0, slot.drained)


def _all_spans(layouts: Sequence[BlockLayout]) -> list[list[_Span]]:
    """Per block the ranges it drains, cut so that a lent parameter is the same range for owner and borrower."""
    lent: dict[int, list[tuple[int, int]]] = {}
    for layout in layouts:
        for b in layout.borrowed:
            lent.setdefault(b.owner, []).append((b.param.offset, b.param.end))
    return [_own_spans(lay, sorted(set(lent.get(lay.index, [])))) + _borrowed_spans(lay) for lay in layouts]


def _own_spans(layout: BlockLayout, lent: list[tuple[int, int]]) -> list[_Span]:
    cuts = sorted({0, layout.num_trainable, *(edge for pair in lent for edge in pair if edge < layout.num_trainable)})
    return [_Span(start, end, layout.index, start) for start, end in pairwise(cuts)]


def _borrowed_spans(layout: BlockLayout) -> list[_Span]:
    return [_Span(b.offset, b.end, b.owner, b.param.offset) for b in layout.borrowed if b.param.spec.trainable]


def _first_norms(layouts: Sequence[BlockLayout]) -> list[int]:
    first = [0]
    for layout in layouts:
        first.append(first[-1] + len(layout.trainable))
    return first
