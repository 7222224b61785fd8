"""The streaming executor: walks a step's blocks through the slots, forward and backward.

Layer-major: all micro-batches pass a block while it is resident, so weights cross the link once per pass. Forward
keeps what enters each block, and of some blocks more (`stream.passes`); backward runs a block again from that and
differentiates it by hand. The head turns the pass around within one residency, and the layer below is still in its slot
when backward begins.

Where the device has room, the last layers are at the turn with the head: resident together, each micro-batch passes
them and comes straight back before the next sets out. What they keep for their backward, so that nothing is run again,
is of one micro-batch only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from horizon.config.schema import Recompute
from horizon.layout import first_trained
from horizon.models.blocks import BlockModel
from horizon.models.structure import Call
from horizon.models.tiles import takes_tiles
from horizon.plan.cost import StepTimes
from horizon.store.gradients import GradientBuffers
from horizon.store.host import HostStore
from horizon.stream.batch import MicroBatch
from horizon.stream.boundaries import Boundaries
from horizon.stream.forward import ForwardPasses, Visits
from horizon.stream.gradients import GradientSink, GradientSlots
from horizon.stream.head import HeadLoss, LossFn
from horizon.stream.passes import Passes
from horizon.stream.randomness import Randomness
from horizon.stream.slots import WeightSlots
from horizon.stream.streams import Streams
from horizon.stream.timing import PassTimer
from horizon.stream.turn import ForwardState, Turn

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ExecutorSettings:
    """Sizes the plan has chosen."""

    compute_dtype: torch.dtype
    weight_slots: int
    head_chunk: int  # tokens
    turn: range  # the layers at the turn, up to the head


class Executor(ForwardPasses):
    """Runs blocks on the device; owns the slots, nothing that outlives a step."""

    def __init__(
        self,
        model: BlockModel,
        store: HostStore,
        streams: Streams,
        settings: ExecutorSettings,
    ):
        self._head_loss = HeadLoss(model, settings.head_chunk)
        super().__init__(model, self._head_loss)
        self._streams = streams
        self._layouts = model.layouts
        self._head = model.head
        self._weights = WeightSlots(streams, store, settings.weight_slots, settings.compute_dtype, settings.turn)
        self._first, self._turn = first_trained(self._layouts), settings.turn
        self._randomness = Randomness(model, streams.device)
        self._passes = Passes(model, self._randomness, self._first)
        self.gradients: GradientSlots | None = None
        self._turn_around: Turn | None = None

    @property
    def device(self) -> torch.device:
        """Where blocks compute."""
        return self._streams.device

    @property
    def recording(self) -> bool:
        """Whether what is run is taken down as a step's."""
        return self._streams.timeline.recording

    @property
    def vocab_size(self) -> int:
        """Tokens the model knows."""
        return self._model.vocab_size

    def use_buffers(self, buffers: GradientBuffers) -> None:
        """Send gradients into these buffers from now on."""
        self.gradients = self._turn_around = None  # give the old slots back first
        self.gradients = GradientSlots(self._streams, self._layouts, buffers, turn=self._turn)
        self._turn_around = Turn(
            self._turn, self._head, self._weights, self.gradients, self._passes, self._head_loss, self._randomness,
            self._streams,
        )  # fmt: skip

    def free_slots(self) -> None:
        """Give the slots' memory back, until `make_slots`."""
        self._weights.free()
        self.gradients = self._turn_around = None
        self._streams.release_memory()

    def make_slots(self, buffers: GradientBuffers, weight_slots: int, turn: range) -> None:
        """Slots for blocks and buffers that have moved, and others that are at the turn."""
        self._turn = turn
        self._weights.make(weight_slots, turn)
        self.use_buffers(buffers)

    def train(
        self,
        batches: Sequence[MicroBatch],
        version: int,
        boundaries: Boundaries,
        sink: GradientSink,
        *,
        seed: int,
        recompute: Mapping[int, Recompute],
        old_share: float = 0.0,
        loss_fn: LossFn | None = None,
    ) -> Tensor:
        """Forward and backward of a step; gradients drain to the host on the way.

        Args:
            version: the weights' version to compute with; loading waits for it block by block.
            seed: of dropout masks, so that recomputation draws the same.
            recompute: by layer block, what its backward runs again; blocks that are not named: all, but at the turn.
            old_share: leave old_share * (gradients on the host) + (1 - old_share) * (this batch's); 0 replaces them.

        Returns:
            the step's loss, an fp32 scalar on the device; the caller decides when to wait for it.
        """
        assert self.gradients is not None and self._turn_around is not None
        self._randomness.seed = seed
        back = [*reversed(range(max(1, self._first), self._turn.start))]
        self._weights.begin([*range(self._head + 1), *back, *([0] if self._first == 0 else [])], version)
        self.gradients.begin_step(old_share)
        self._model.train(True)
        state = self._forward(batches, boundaries, recompute)
        loss, grads = self._turn_around.run(batches, state, sink, 1 - old_share, loss_fn)
        boundaries.begin_backward([(b, m) for b in back for m in range(len(batches))])
        for _ in back:
            self._backward_layer(state.calls, boundaries, grads, sink)
        if self._first == 0:
            self._backward_embedding(grads, sink)
        return loss

    def visits(self, version: int, blocks: Sequence[int] | None = None) -> Visits:
        """All blocks in order, or only `blocks`; loading begins at once."""
        return self._weights.visits(range(self._head + 1) if blocks is None else blocks, version)

    @torch.no_grad()
    def first_non_finite(self, batches: Sequence[MicroBatch], version: int) -> int | None:
        """The first block whose output is not finite, from a forward pass that looks; None if all are."""
        self._weights.begin(list(range(self._head + 1)), version)
        self._model.train(True)
        hidden: list[Tensor] = []
        calls: list[list[Call]] = []
        for _ in range(self._head):
            with self._weights.visit() as (block, params):
                hidden = self._forward_block(block, params, batches, hidden, calls)
            if not all(bool(h.isfinite().all()) for h in hidden):
                return block
        with self._weights.visit() as (block, params):
            finite = all(self._head_loss.is_finite(params, h, b) for h, b in zip(hidden, batches, strict=True))
        return None if finite else block

    def rehearse_layers(self, batches: Sequence[MicroBatch], version: int) -> None:
        """Forward and backward of one layer of each kind, gradients dropped: for measuring what a layer takes."""
        assert self.gradients is not None
        kinds = {self._layouts[b].num_elements: b for b in range(1, self._head)}
        for block, params, hidden, calls in self._rehearse(batches, version, sorted(kinds.values())):
            if block < self._first:
                self._forward_block(block, params, batches, hidden, calls)
                continue
            self.gradients.rehearse(block)
            for m, states in enumerate(hidden):
                grad = torch.ones_like(states)
                self._passes.backward((block, m), params, states, calls[m][block - 1], grad, self.gradients)

    def rehearse_keeping(self, batch: MicroBatch, version: int, kinds: Sequence[Recompute]) -> list[int]:
        """Per kind the bytes that the layer which keeps most keeps of a micro-batch.

        Goes through all layers: each learns which outputs backward needs, and which of those are overwritten.
        """
        assert self.gradients is not None
        most, layers = [0] * len(kinds), list(range(max(1, self._first), self._head))
        for block, params, (hidden,), (calls,) in self._rehearse([batch], version, layers):
            self.gradients.rehearse(block)
            call, grad = calls[block - 1], torch.ones_like(hidden)
            self._passes.backward((block, 0), params, hidden, call, grad, self.gradients)
            for i, kind in enumerate(kinds):
                self._passes.forward((block, 0), params, hidden, call, self.gradients, kind)
                most[i] = max(most[i], self._passes.kept_bytes((block, 0)))
                self._passes.reset()
        return most

    def _rehearse(
        self, batches: Sequence[MicroBatch], version: int, layers: Sequence[int]
    ) -> Iterator[tuple[int, Mapping[str, Tensor], list[Tensor], list[list[Call]]]]:
        """Visit some layers, each with the embedding's hidden states."""
        self._weights.begin([0, *layers], version)
        self._model.train(True)
        calls: list[list[Call]] = []
        with self._weights.visit() as (block, params):
            hidden = self._forward_block(block, params, batches, [], calls)
        for _ in layers:
            with self._weights.visit() as (block, params):
                yield block, params, list(hidden), calls

    def rehearse_head(self, num_tokens: int, version: int) -> None:
        """Forward and backward of the head's first chunk of `num_tokens` tokens, gradients dropped."""
        assert self.gradients is not None
        self._weights.begin([self._head], version)
        num_tokens = min(num_tokens, self._head_loss.chunk)
        tokens = torch.zeros(1, num_tokens, dtype=torch.long, device=self.device)
        batch = MicroBatch({"input_ids": tokens}, tokens, tokens.numel(), {})
        with self._weights.visit() as (_, params):
            dtype = next(iter(params.values())).dtype
            hidden = self._streams.empty(1, num_tokens, self._model.hidden_size, dtype=dtype).normal_()
            self.gradients.rehearse(self._head)
            self._head_loss.backward(params, hidden, batch, 1.0, self.gradients)

    def time_passes(self, batch: MicroBatch, version: int, kinds: Collection[Recompute], alone: bool) -> StepTimes:
        """Run and time the passes over a micro-batch; see `stream.timing.PassTimer`."""
        assert self.gradients is not None
        timer = PassTimer(self._streams, self._layouts, self._passes, self._head_loss, self.gradients, batch, alone)
        self._weights.begin(timer.blocks, version)
        self._model.train(True)
        for _ in timer.blocks:
            with self._weights.visit() as (block, params):
                timer.visit(block, params, kinds)
        return timer.times()

    def reset(self) -> None:
        """After a failed step: wait for what is in flight, then forget it."""
        self._streams.synchronize()
        self._weights.reset()
        self._passes.reset()

    def _forward_block(
        self,
        block: int,
        params: Mapping[str, Tensor],
        batches: Sequence[MicroBatch],
        hidden: list[Tensor],
        calls: list[list[Call]],
    ) -> list[Tensor]:
        """Pass all micro-batches through one block, keeping nothing."""
        if block > 0:
            calls_of = [layer_calls[block - 1] for layer_calls in calls]
            return [
                self._passes.forward((block, m), params, hidden[m], call, None, Recompute.full)
                for m, call in enumerate(calls_of)
            ]
        embedded = [self._passes.embed(m, params, batch, None) for m, batch in enumerate(batches)]
        calls += [layer_calls for _, layer_calls in embedded]
        return [states for states, _ in embedded]

    def _forward(
        self, batches: Sequence[MicroBatch], boundaries: Boundaries, recompute: Mapping[int, Recompute]
    ) -> ForwardState:
        """The forward of a training step up to the turn."""
        state = ForwardState([], [])
        with self._weights.visit() as (_, params):
            for m, batch in enumerate(batches):
                states, layer_calls = self._passes.embed(m, params, batch, self.gradients)
                state.hidden.append(states)
                state.calls.append(layer_calls)
        for _ in range(1, self._turn.start):
            with self._weights.visit() as (block, params):
                self._forward_layer(block, params, state, boundaries, recompute.get(block, Recompute.full))
        return state

    def _forward_layer(
        self,
        block: int,
        params: Mapping[str, Tensor],
        state: ForwardState,
        boundaries: Boundaries,
        recompute: Recompute,
    ) -> None:
        """Pass all micro-batches through one layer; an input's memory may go when it was read."""
        if block < self._first:  # backward does not come here
            state.hidden[:] = self._forward_block(block, params, [], state.hidden, state.calls)
            return
        keeps_boundary = recompute is not Recompute.none
        if keeps_boundary:
            for m, hidden in enumerate(state.hidden):
                boundaries.save((block, m), hidden)
        for m, layer_calls in enumerate(state.calls):
            call = layer_calls[block - 1]
            state.hidden[m] = self._passes.forward((block, m), params, state.hidden[m], call, self.gradients, recompute)
            if keeps_boundary:
                boundaries.read((block, m))

    def _backward_layer(
        self, calls: list[list[Call]], boundaries: Boundaries, grads: list[Tensor], sink: GradientSink
    ) -> None:
        """Differentiate the next layer of the backward walk; `grads` is replaced in place."""
        assert self.gradients is not None
        with self._weights.visit() as (block, params), self._gradients_of(block, sink, _is_single(grads)):
            for m, grad in enumerate(grads):
                if self._passes.keeps_graph((block, m)):
                    grad_hidden = self._passes.backward_kept((block, m), params, grad, self.gradients)
                else:
                    hidden, call = boundaries.take((block, m)), calls[m][block - 1]
                    grad_hidden = self._passes.backward((block, m), params, hidden, call, grad, self.gradients)
                if grad_hidden is not None:
                    grads[m] = grad_hidden

    def _backward_embedding(self, grads: list[Tensor], sink: GradientSink) -> None:
        assert self.gradients is not None
        with self._weights.visit() as (block, params), self._gradients_of(block, sink, _is_single(grads)):
            for m, grad in enumerate(grads):
                self._passes.backward_kept((block, m), params, grad, self.gradients)

    @contextmanager
    def _gradients_of(self, block: int, sink: GradientSink, single: bool = False) -> Iterator[None]:
        """Sum the block's gradients, or take a `single` one as it is, then send them to the host."""
        assert self.gradients is not None
        self.gradients.open(block, single)
        yield
        self.gradients.close(sink)


def _is_single(grads: Sequence[Tensor]) -> bool:
    """Whether each weight's gradient is computed at once, not summed over micro-batches or tiles of one."""
    return len(grads) == 1 and not takes_tiles(grads[0])
