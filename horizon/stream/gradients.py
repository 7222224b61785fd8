"""Gradients on their way from autograd to the buffers where they wait for their update.

A block's parameter gradients are summed in fp32 in one flat buffer over all micro-batches, measured (one norm per
parameter), cast to the host's gradient dtype in a drain slot, and cross the link once. Weight gradients of linear
layers and embedding tables are computed in their place there (`models.linear`); a place is overwritten by what comes
first, so nothing is zeroed ahead. Sums that already wait on the host (an earlier `forward_backward`, or the head's
share of a tied embedding) are fetched first and added to. The gradient of a block in HBM stays on the device, where its
buffer is.

The layers at the turn of a step are open together, for a micro-batch comes back through all of them before the next
sets out. Each has a sum of its own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from horizon.layout import BlockLayout
from horizon.plan.memory import gradient_slot_elements
from horizon.store.gradients import GradientBuffers
from horizon.stream.streams import Event, Streams
from horizon.stream.timeline import Cause


class GradientSink(Protocol):
    """Who uses the gradients: implemented by the optimizer's side."""

    def turned(self, loss: Tensor, event: Event) -> None:
        """The forward is over: after `event` the step's loss is in `loss`, a host scalar. No gradient landed before."""

    def landed(self, block: int, event: Event, norms: Tensor) -> None:
        """After `event` the block's whole gradient is in its buffer, and in `norms` each parameter's L2 norm.

        `norms`: fp32 [trainable parameters] on the host, valid until the block's next gradient.
        """


@dataclass(slots=True)
class _DrainSlot:
    flat: Tensor  # [elements of the largest block's gradients], host gradient dtype
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


@dataclass(slots=True)
class _Open:
    """A block whose gradients are being summed."""

    block: int
    target: Tensor  # of the sums
    flat: Tensor | None  # what the gradient is kept in or drained from, once that is known
    places: dict[str, Tensor]  # local name -> view of the target
    written: set[str] = field(default_factory=set)  # those that hold a sum


@dataclass(frozen=True, slots=True)
class _Partial:
    """A sum that waits on the host to be added to."""

    share: float  # of it that counts
    landed: Any  # on the drain stream, when it was written in this pass


class GradientSlots:
    """Sums, measures and drains blocks' gradients, one block after another.

    Args:
        buffers: where they go.
        num_slots: drain slots; 2 lets a block's copy run beside the next block's backward.
        turn: layers that may be open together.
    """

    def __init__(
        self, streams: Streams, layouts: Sequence[BlockLayout], buffers: GradientBuffers, num_slots: int = 2,
        turn: Collection[int] = (),
    ):  # fmt: skip
        self._streams, self._layouts, self._buffers = streams, layouts, buffers
        self._in_hbm = buffers.in_hbm
        size, total = gradient_slot_elements(layouts, self._in_hbm, buffers.dtype)
        self._slots = [_DrainSlot(streams.empty(size, dtype=buffers.dtype)) for _ in range(num_slots)]
        self._sum = streams.empty(total, dtype=torch.float32)
        self._own = {b: streams.empty(layouts[b].num_grad_elements, dtype=torch.float32) for b in turn}
        self._spans = _all_spans(layouts)
        self._padding = [_padding(lay, spans) for lay, spans in zip(layouts, self._spans, strict=True)]
        self._order = list(dict.fromkeys(span.owner for spans in reversed(self._spans) for span in spans))  # as claimed
        self._partial: dict[int, dict[tuple[int, int], _Partial]] = {}  # by owner and host range
        self._first_norm = _first_norms(layouts)
        self.norms = torch.zeros(self._first_norm[-1], dtype=torch.float32, device=streams.device)
        pin = streams.device.type == "cuda"
        self._host_norms = torch.zeros(self._first_norm[-1], dtype=torch.float32, pin_memory=pin)
        self._next_slot = 0
        self._open: dict[int, _Open] = {}
        self._now = _Open(-1, self._sum, None, {})

    def begin_step(self, old_share: float) -> None:
        """Start a backward pass that leaves old_share * (sums on the host) + this pass's gradients; 0 replaces them."""
        self._partial, self._open = {}, {}
        if old_share:
            for spans in self._spans:
                for span in spans:
                    parts = self._partial.setdefault(span.owner, {})
                    parts[span.host.start, span.host.stop] = _Partial(old_share, None)
        else:
            self.norms.zero_()

    def open(self, block: int, single: bool) -> None:
        """Sum `block`'s gradients from now on; with `single`, `add` will be called just once."""
        if block in self._open:
            self._now = self._open[block]
            return
        if block == len(self._layouts) - 1:  # the first; blocks have seen the step before, or they were not loaded
            self._buffers.begin(self._order, adds=bool(self._partial))
        flat = None if block in self._own else self._flat(block)
        target = flat if flat is not None else self._own[block]
        if flat is not None and self._needs_sum(block, single):
            target = self._sum
        self._open[block] = self._begin(block, target, flat)
        for span in self._spans[block]:
            for (start, stop), partial in self._partial.get(span.owner, {}).items():
                fetched = self._add_partial(span, start, stop, partial)
                ranges = self._layouts[block].grad_ranges()
                self._now.written |= {name for name, offset, _ in ranges if offset in fetched}

    def _flat(self, block: int) -> Tensor:
        """What the block's gradient is kept in, if it is in HBM, or drained from."""
        if block in self._in_hbm:
            trains = self._layouts[block].num_trainable > 0  # else no update would release the buffer
            return self._claim(block) if trains else self._sum[:0]
        return self._free_slot(block)

    def _free_slot(self, block: int) -> Tensor:
        """The drain slot whose turn it is."""
        if self._slot.drained is not None:  # its last copy to the host must be over before it is written again
            with self._streams.waiting(Cause.link, "gradient slot", block):
                self._streams.compute.wait_event(self._slot.drained)
        return self._slot.flat

    def rehearse(self, block: int, single: bool = False) -> None:
        """As `open`, for gradients that are dropped: in memory that keeps none, and with no buffer claimed."""
        size, slot = self._layouts[block].num_grad_elements, self._slot
        dtype = self._buffers.dtype if single else torch.float32
        target = self._sum.view(dtype)
        if target.numel() < size and slot.flat.dtype is dtype and slot.flat.numel() >= size:
            if slot.drained is not None:
                self._streams.compute.wait_event(slot.drained)
            target = slot.flat
        elif target.numel() < size:
            target = self._streams.empty(size, dtype=dtype)
        self._begin(block, target, None)

    def _begin(self, block: int, target: Tensor, flat: Tensor | None) -> _Open:
        """Take the block's gradients in `target` from now on."""
        ranges = self._layouts[block].grad_ranges()
        places = {n: target[start : start + math.prod(shape)].view(shape) for n, start, shape in ranges}
        self._now = _Open(block, target, flat, places)
        return self._now

    def _needs_sum(self, block: int, single: bool) -> bool:
        """Whether the gradient is summed elsewhere than in the memory that it is kept in or drained from."""
        if block in self._in_hbm and self._layouts[block].borrowed:
            return True  # its buffer has no place for its share in another block's gradient
        # A gradient that is no sum needs no fp32 detour: it is computed in the dtype that it is kept in.
        return self._buffers.dtype is not torch.float32 and not (single and not self._waiting(block))

    def add(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Add one micro-batch's gradients, by local name; a parameter that took no part may be None."""
        for name, gradient in gradients.items():
            if gradient is not None:
                self._add(name, gradient)

    def add_product(self, name: str, grad: Tensor, x: Tensor) -> None:
        """Add grad^T x, the weight gradient of a linear layer: in place, where the device can sum it in fp32."""
        place, first = self._now.places[name], name not in self._now.written
        self._now.written.add(name)
        if place.is_cuda and place.dtype is torch.float32 and grad.dtype is not torch.float32:
            if first:
                torch.mm(grad.t(), x, out_dtype=torch.float32, out=place)
            else:
                torch.addmm(place, grad.t(), x, out_dtype=torch.float32, out=place)
        elif first and place.dtype is grad.dtype:
            torch.mm(grad.t(), x, out=place)
        elif first:
            place.copy_(grad.t().mm(x))
        else:
            place.add_(grad.t().mm(x))

    def add_rows(self, name: str, rows: Tensor, grad: Tensor, padding_idx: int | None) -> None:
        """Add each row of `grad` to a row of an embedding table's gradient."""
        place = self._now.places[name]
        if not (place.is_cuda and place.dtype is torch.float32):
            padding = -1 if padding_idx is None else padding_idx
            self._add(name, torch.ops.aten.embedding_dense_backward(grad, rows, place.shape[0], padding, False))
            return
        if name not in self._now.written:
            self._now.written.add(name)
            place.zero_()
        if padding_idx is not None:
            grad = grad.masked_fill((rows == padding_idx).unsqueeze(1), 0)
        place.index_put_((rows,), grad.float(), accumulate=True)  # sorts, hence the same bits every time

    def _add(self, name: str, gradient: Tensor) -> None:
        if name in self._now.written:
            self._now.places[name].add_(gradient)
        else:
            self._now.written.add(name)
            self._now.places[name].copy_(gradient)

    def close(self, sink: GradientSink) -> None:
        """Measure the open sums, cast them, start their way to the host; what belongs to a block in HBM stays there."""
        now, block = self._now, self._now.block
        flat = self._flat(block) if now.flat is None else now.flat
        for name in now.places.keys() - now.written:
            now.places[name].zero_()
        for start, stop in self._padding[block]:
            now.target[start:stop].zero_()
        for span in self._spans[block]:
            source, stays = now.target[span.start : span.end], span.owner in self._in_hbm
            place = self._claim(span.owner)[span.host] if stays else flat[span.start : span.end]
            if place.data_ptr() != source.data_ptr():
                place.copy_(source)
        self._measure(block, flat)
        self._drain(block, self._slot, sink)
        del self._open[block]

    def _waiting(self, block: int) -> bool:
        """Whether sums to add to wait on the host."""
        return any(self._partial.get(span.owner) for span in self._spans[block])

    @property
    def _slot(self) -> _DrainSlot:
        return self._slots[self._next_slot]

    def _add_partial(self, span: _Span, start: int, stop: int, partial: _Partial) -> range:
        """Fetch what of a waiting sum belongs to `span`; gives the range of the block's sums that now holds it."""
        start, stop = max(span.host.start, start), min(span.host.stop, stop)
        if start >= stop:
            return range(0)
        source = self._claim(span.owner)[start:stop]
        to = slice(span.start + start - span.host.start, span.start + stop - span.host.start)
        target = self._now.target[to]
        if span.owner not in self._in_hbm:
            fetch, compute = self._streams.fetch, self._streams.compute
            landing = target
            if target.dtype is not self._buffers.dtype:
                landing = self._free_slot(self._now.block)[to]
            fetch.wait_event(compute.record_event())  # it is free for writing
            if partial.landed is not None:
                fetch.wait_event(partial.landed)
            with self._streams.moving(fetch, "gradient", span.owner):
                self._streams.copy(fetch, landing, source)
            with self._streams.waiting(Cause.link, "gradient", span.owner):
                compute.wait_event(fetch.record_event())
            source = landing
        if target.data_ptr() != source.data_ptr():
            target.copy_(source)
        if partial.share != 1:
            target.mul_(partial.share)
        return range(to.start, to.stop)

    def _claim(self, owner: int) -> Tensor:
        """The owner's host buffer; of a ring, when an update, or the disk, gives one back."""
        cause = Cause.disk if owner in self._buffers.on_nvme else Cause.optimizer
        with self._streams.waiting(cause, "gradient buffer", owner):
            return self._buffers.claim(owner)

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
        leaving = [span for span in self._spans[block] if span.owner not in self._in_hbm]
        targets = [self._claim(span.owner)[span.host] for span in leaving]
        with self._streams.moving(drain, "gradient", block) if leaving else nullcontext():
            for span, target in zip(leaving, targets, strict=True):
                self._streams.copy(drain, target, slot.flat[span.start : span.end])
        drained = drain.record_event()
        if block not in self._in_hbm:
            slot.drained = drained
            self._next_slot = (self._next_slot + 1) % len(self._slots)
        if self._layouts[block].num_trainable:
            self._buffers.filled(block, drained)
            sink.landed(block, drained, self._host_norms[own])
        for span in self._spans[block]:
            if span.owner != block:
                parts = self._partial.setdefault(span.owner, {})
                parts[span.host.start, span.host.stop] = _Partial(1.0, drained)


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


def _padding(layout: BlockLayout, spans: Sequence[_Span]) -> list[tuple[int, int]]:
    """The ranges of a block's spans that belong to no parameter."""
    owned = sorted((offset, offset + math.prod(shape)) for _, offset, shape in layout.grad_ranges())
    edges = sorted((span.start, span.end) for span in spans)
    gaps, position = [], 0
    for start, end in owned:
        gaps += [(max(position, a), min(start, b)) for a, b in edges]
        position = end
    gaps += [(max(position, a), b) for a, b in edges]
    return [(start, stop) for start, stop in gaps if start < stop]


def _first_norms(layouts: Sequence[BlockLayout]) -> list[int]:
    first = [0]
    for layout in layouts:
        first.append(first[-1] + len(layout.trainable))
    return first
