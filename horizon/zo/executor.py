"""Walks all blocks once through the device, forward only: a step's losses, an evaluation, or the weights' way back.

    fetch    | W1 W2 W3 ...                          up: the masters
    compute  |    U1 F1+ F1- U2 F2+ F2- ...          U: pending updates and perturbed copies, one kernel a block
    drain    |       W1'    W2' ...                  down: the updated masters, every step or every k-th

Layer-major: all queries and all micro-batches pass a block while it is on the device, so its weights cross the link
once a step. After ZO2 (https://arxiv.org/abs/2503.12668), whose deferred update this is; what is perturbed here is a
copy, so the master does not drift.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from horizon.models.blocks import BlockModel, Params
from horizon.models.structure import Call
from horizon.stream.batch import MicroBatch
from horizon.stream.forward import ForwardPasses, Visits
from horizon.stream.head import LossFn
from horizon.stream.streams import Streams
from horizon.stream.timeline import HBM_UPDATE, Cause
from horizon.zo.copies import Copies, Piece, pieces_of
from horizon.zo.estimator import History
from horizon.zo.losses import HeadLosses, share_of
from horizon.zo.perturb import Perturber
from horizon.zo.slots import UNKNOWN, Back, MasterSlots, Slot
from horizon.zo.table import Work


@dataclass(slots=True)
class _Lane:
    """One forward pass: a step has two a query, an evaluation one."""

    hidden: list[Tensor] = field(default_factory=list)  # per micro-batch, [B, T, H]
    calls: list[list[Call]] = field(default_factory=list)  # per micro-batch and layer


class ForwardExecutor(ForwardPasses):
    """Runs blocks on the device; owns what a walk needs there, and the host's weights while it walks.

    Args:
        writeback_every: steps between two walks of steps that send weights back.
    """

    def __init__(
        self, model: BlockModel, slots: MasterSlots, copies: Copies, perturber: Perturber, history: History,
        streams: Streams, head_chunk: int, writeback_every: int,
    ):  # fmt: skip
        super().__init__(model, HeadLosses(model, head_chunk, streams.device))
        self._slots, self._copies, self._perturb = slots, copies, perturber
        self._history, self._streams, self._every = history, streams, writeback_every

    @property
    def device(self) -> torch.device:
        """Where blocks compute."""
        return self._streams.device

    @property
    def vocab_size(self) -> int:
        """Tokens the model knows."""
        return self._model.vocab_size

    @torch.no_grad()
    def losses(self, batches: Sequence[MicroBatch], num_queries: int, loss_fn: LossFn | None) -> Tensor:
        """The summed losses at w + eps z and w - eps z of each query in turn: doubles [2 queries] on the device."""
        lanes = [_Lane() for _ in range(2 * num_queries)]
        totals: list[Tensor] = []
        back = Back.STREAMED if self._history.version % self._every == 0 else Back.NOTHING
        for block, query, copies in self._walk(2, num_queries, back):
            for lane, params in zip(lanes[2 * query : 2 * query + 2], copies, strict=True):
                if block == self._model.head:
                    losses = [
                        share_of(batch, loss_fn) * self._loss.loss(params, hidden, batch, loss_fn)
                        for hidden, batch in zip(lane.hidden, batches, strict=True)
                    ]
                    totals.append(torch.stack(losses).sum())
                else:
                    self._pass(block, params, lane, batches)
        return torch.stack(totals)

    def visits(self, version: int, blocks: Sequence[int] | None = None) -> Visits:
        """The blocks in order, or only `blocks`, at the weights.

        Args:
            version: of the weights; there is no other than the history's.
        """
        wanted = set(range(self._model.head + 1) if blocks is None else blocks)
        return ((block, params) for block, _, (params,) in self._walk(1, 1, Back.ALL) if block in wanted)

    @torch.no_grad()
    def first_non_finite(self, batches: Sequence[MicroBatch]) -> int | None:
        """The first block whose output at the weights is not finite, from a forward pass that looks; None if none."""
        lane, found = _Lane(), None
        for block, _, (params,) in self._walk(1, 1, Back.ALL):
            if block != self._model.head:
                self._pass(block, params, lane, batches)
                outputs = lane.hidden
            else:
                outputs = [self._model.logits(params, h[:, -1:]) for h in lane.hidden]
            if found is None and not all(bool(output.isfinite().all()) for output in outputs):
                found = block
        return found

    @torch.no_grad()
    def flush(self) -> None:
        """Have the host's weights see every step; returns when they have."""
        for _ in self._walk(0, 1, Back.ALL):
            pass
        self._streams.synchronize()

    @torch.no_grad()
    def rehearse(self, batch: MicroBatch) -> None:
        """A walk in which each kind of layer takes one micro-batch once, to see what it takes; nothing is kept."""
        lane, seen = _Lane(), set()
        for block, _, (params,) in self._walk(1, 1, Back.NOTHING):
            size = self._model.layouts[block].num_elements
            if block == 0 or (block != self._model.head and size not in seen):
                self._pass(block, params, lane, [batch])
                seen.add(size)
            elif block == self._model.head:
                self._loss.loss(params, lane.hidden[0], batch, None)

    def reset(self) -> None:
        """After a failed walk: wait for what is in flight, then forget it."""
        self._streams.synchronize()
        self._slots.reset()

    def _walk(self, num_copies: int, num_queries: int, back: Back) -> Iterator[tuple[int, int, list[Params]]]:
        """Visit the blocks in order: (block, query, the parameters in each copy).

        Args:
            num_copies: 2: with the noise of the coming step; 1: the weights; 0: none.
            back: which of the blocks that have pending updates go back to the host.
        """
        self._model.train(False)  # no dropout: the two losses of a query must differ by the noise alone
        layouts, version = self._model.layouts, self._history.version
        works = [
            Work(block, self._history.since(self._slots.version(block)), version + 1, num_queries)
            for block in range(len(layouts))
        ]
        self._perturb.begin(works)
        self._slots.begin()
        for layout in layouts:
            pieces = [(self._slots.acquire(piece.layout.index), piece) for piece in pieces_of(layout, layouts)]
            for query in range(num_queries):
                self._streams.timeline.enter(Cause.optimizer, HBM_UPDATE, layout.index)
                for slot, piece in pieces:
                    self._fill(slot, piece, num_copies, query, version)
                if query == num_queries - 1:
                    self._slots.release(pieces[0][0], back)
                what = "head" if layout.index == self._model.head else "forward"
                self._streams.timeline.enter(Cause.arithmetic, what, layout.index)
                yield layout.index, query, self._copies.params(layout.index)[:num_copies]
                self._streams.timeline.enter(Cause.launch, "issuing")

    def _fill(self, slot: Slot, piece: Piece, num_copies: int, query: int, version: int) -> None:
        """Bring a slot's master to `version`, and make its copies; what is frozen is the same for all queries."""
        block, seen, states = piece.layout.index, slot.version, self._slots.states(slot)
        trained = piece.layout.num_trainable
        slot.version = UNKNOWN  # until the kernels are launched: if that fails, what is there is of no use
        if trained and (num_copies or seen < version):
            targets = self._copies.targets(piece, num_copies)
            self._perturb(block, [s[:trained] for s in states], targets, query, updates=seen < version)
        if trained < piece.layout.num_elements and num_copies and query == 0:
            self._perturb(block, [s[trained:] for s in states], [self._copies.frozen(piece)], query, updates=False)
        slot.version = version

    def _pass(self, block: int, params: Params, lane: _Lane, batches: Sequence[MicroBatch]) -> None:
        """Pass all micro-batches of a lane through the embedding or a layer."""
        if block > 0:
            for m, calls in enumerate(lane.calls):
                lane.hidden[m] = self._model.layer(block, params, lane.hidden[m], calls[block - 1])
            return
        for batch in batches:
            hidden, calls = self._model.embed(params, batch.inputs, batch.documents)
            lane.hidden.append(hidden)
            lane.calls.append(calls)
