"""The streaming executor: walks a step's blocks through the slots, forward and backward.

Layer-major: all micro-batches pass a block while it is resident, so weights cross the link once per pass. Forward
keeps only what enters each block; backward recomputes a block from that and differentiates it by hand. The head
turns the pass around within one residency, and the last layer is still in its slot when backward begins.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from horizon.models.blocks import BlockModel
from horizon.models.structure import Call
from horizon.store.gradients import GradientBuffers
from horizon.store.host import HostStore
from horizon.stream.batch import MicroBatch
from horizon.stream.boundaries import Boundaries
from horizon.stream.gradients import GradientSink, GradientSlots
from horizon.stream.head import HeadLoss, LossFn
from horizon.stream.slots import WeightSlots
from horizon.stream.streams import Streams


@dataclass(frozen=True, slots=True)
class ForwardState:
    """What the forward pass leaves behind."""

    hidden: list[Tensor]  # the last layer's output per micro-batch, [B, T, H]
    calls: list[list[Call]]  # per micro-batch and layer


@dataclass(frozen=True, slots=True)
class ExecutorSettings:
    """Sizes the plan has chosen."""

    compute_dtype: torch.dtype
    weight_slots: int
    head_chunk: int  # tokens


class Executor:
    """Runs blocks on the device; owns the slots, nothing that outlives a step."""

    def __init__(
        self,
        model: BlockModel,
        store: HostStore,
        streams: Streams,
        settings: ExecutorSettings,
    ):
        self._model, self._streams = model, streams
        self._layouts = model.layouts
        self._head = model.head
        self._weights = WeightSlots(streams, store, settings.weight_slots, settings.compute_dtype)
        self._head_loss = HeadLoss(model, settings.head_chunk)
        self._first = min(lay.index for lay in self._layouts if lay.num_trainable)  # backward ends here
        self._replays_random = model.uses_dropout()
        self._seed = 0
        self._host_loss = torch.zeros((), pin_memory=streams.device.type == "cuda")
        self.gradients: GradientSlots | None = None

    @property
    def device(self) -> torch.device:
        """Where blocks compute."""
        return self._streams.device

    @property
    def vocab_size(self) -> int:
        """Tokens the model knows."""
        return self._model.vocab_size

    def use_buffers(self, buffers: GradientBuffers) -> None:
        """Drain gradients into these host buffers from now on."""
        self.gradients = None  # give the old slots back first
        self.gradients = GradientSlots(self._streams, self._layouts, buffers)

    def train(
        self,
        batches: Sequence[MicroBatch],
        version: int,
        boundaries: Boundaries,
        sink: GradientSink,
        *,
        seed: int,
        old_share: float = 0.0,
        loss_fn: LossFn | None = None,
    ) -> Tensor:
        """Forward and backward of a step; gradients drain to the host on the way.

        Args:
            version: the weights' version to compute with; loading waits for it block by block.
            seed: of dropout masks, so that recomputation draws the same.
            old_share: leave old_share * (gradients on the host) + (1 - old_share) * (this batch's); 0 replaces them.

        Returns:
            the step's loss, an fp32 scalar on the device; the caller decides when to wait for it.
        """
        assert self.gradients is not None
        self._seed = seed
        layers = range(1, self._head)
        self._weights.begin([0, *layers, self._head, *reversed(range(self._first, self._head))], version)
        self.gradients.begin_step(old_share)
        self._model.train(True)
        state = self._forward(batches, boundaries)
        loss, grads = self._turn_around(batches, state.hidden, sink, 1 - old_share, loss_fn)
        state.hidden.clear()
        back = [b for b in reversed(layers) if b >= self._first]
        boundaries.begin_backward([(b, m) for b in back for m in range(len(batches))])
        for _ in back:
            self._backward_layer(state.calls, boundaries, grads, sink)
        if self._first == 0:
            self._backward_embedding(batches, grads, sink)
        return loss

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch], version: int, loss_fn: LossFn | None = None) -> list[Tensor]:
        """Per micro-batch: the summed cross-entropy (or the custom loss), fp32 scalars on the device."""
        hidden = self._forward_only(batches, version)
        with self._visit() as (_, params):
            return [self._head_loss.loss(params, h, b, loss_fn) for h, b in zip(hidden, batches, strict=True)]

    @torch.no_grad()
    def last_logits(self, batches: Sequence[MicroBatch], version: int) -> list[Tensor]:
        """Per micro-batch: the logits of each row's last position, [B, V]."""
        hidden = self._forward_only(batches, version)
        with self._visit() as (_, params):
            return [self._model.logits(params, h[:, -1:])[:, 0] for h in hidden]

    @torch.no_grad()
    def first_non_finite(self, batches: Sequence[MicroBatch], version: int) -> int | None:
        """The first block whose output is not finite, from a forward pass that looks; None if all are."""
        self._weights.begin(list(range(self._head + 1)), version)
        self._model.train(True)
        hidden: list[Tensor] = []
        calls: list[list[Call]] = []
        for _ in range(self._head):
            with self._visit() as (block, params):
                hidden = self._forward_block(block, params, batches, hidden, calls)
            if not all(bool(h.isfinite().all()) for h in hidden):
                return block
        with self._visit() as (block, params):
            finite = all(self._head_loss.is_finite(params, h, b) for h, b in zip(hidden, batches, strict=True))
        return None if finite else block

    def rehearse_layers(self, batches: Sequence[MicroBatch], version: int) -> None:
        """Forward and backward of one layer of each kind, gradients dropped: for measuring what a layer takes."""
        kinds = {self._layouts[b].num_elements: b for b in reversed(range(1, self._head))}
        self._weights.begin([0, *sorted(kinds.values())], version)
        self._model.train(True)
        calls: list[list[Call]] = []
        with self._visit() as (block, params):
            hidden = self._forward_block(block, params, batches, [], calls)
        for _ in kinds:
            with self._visit() as (block, params):
                for states, layer_calls in zip(hidden, calls, strict=True):
                    leaves = self._leaves(block, params)
                    states = states.detach().requires_grad_()
                    with torch.enable_grad():
                        output = self._model.recompute(block, leaves, states, layer_calls[block - 1])
                    wanted = [states, *(leaf for leaf in leaves.values() if leaf.requires_grad)]
                    torch.autograd.grad(output, wanted, torch.ones_like(output), allow_unused=True)

    def rehearse_head(self, num_tokens: int, version: int) -> None:
        """Forward and backward of the head's first chunk of `num_tokens` tokens, gradients dropped."""
        self._weights.begin([self._head], version)
        num_tokens = min(num_tokens, self._head_loss.chunk)
        tokens = torch.zeros(1, num_tokens, dtype=torch.long, device=self.device)
        batch = MicroBatch({"input_ids": tokens}, tokens, tokens.numel(), {})
        with self._visit() as (_, params):
            dtype = next(iter(params.values())).dtype
            hidden = self._streams.empty(1, num_tokens, self._model.hidden_size, dtype=dtype).normal_()
            self._head_loss.backward(params, hidden, batch, 1.0, lambda gradients: None)

    def reset(self) -> None:
        """After a failed step: wait for what is in flight, then forget it."""
        self._streams.synchronize()
        self._weights.reset()

    def _forward_only(self, batches: Sequence[MicroBatch], version: int) -> list[Tensor]:
        self._weights.begin(list(range(self._head + 1)), version)
        self._model.train(False)
        return self._forward(batches, None).hidden

    def _forward(self, batches: Sequence[MicroBatch], boundaries: Boundaries | None) -> ForwardState:
        hidden: list[Tensor] = []
        calls: list[list[Call]] = []
        for _ in range(self._head):
            with self._visit() as (block, params):
                if boundaries is not None and block > 0:
                    for m, h in enumerate(hidden):
                        boundaries.save((block, m), h)
                hidden = self._forward_block(block, params, batches, hidden, calls, boundaries)
        return ForwardState(hidden, calls)

    @torch.no_grad()
    def _forward_block(
        self,
        block: int,
        params: Mapping[str, Tensor],
        batches: Sequence[MicroBatch],
        hidden: list[Tensor],
        calls: list[list[Call]],
        boundaries: Boundaries | None = None,
    ) -> list[Tensor]:
        """Pass all micro-batches through one block; `hidden` is emptied as it is read."""
        output = []
        for m, batch in enumerate(batches):
            with self._randomness(block, m):
                if block == 0:
                    states, layer_calls = self._model.embed(params, batch.inputs)
                    calls.append(layer_calls)
                else:
                    states = self._model.layer(block, params, hidden[m], calls[m][block - 1])
                    hidden[m] = states  # the input's memory may go now
            if boundaries is not None and block > 0:
                boundaries.read((block, m))
            output.append(states)
        return output

    def _turn_around(
        self,
        batches: Sequence[MicroBatch],
        hidden: list[Tensor],
        sink: GradientSink,
        share: float,
        loss_fn: LossFn | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The head's forward and backward: the step's loss, and `share` times the gradient of each `hidden`."""
        losses, grads = [], []
        divisors = _divisors(batches, share, custom=loss_fn is not None)
        assert self.gradients is not None
        with self._visit() as (block, params), self._gradients_of(block, sink):
            for m, batch in enumerate(batches):
                with self._randomness(block, m):
                    loss, grad = self._head_loss.backward(
                        params, hidden[m], batch, divisors[m], self.gradients.add, loss_fn
                    )
                losses.append(loss)
                grads.append(grad)
            loss = torch.stack(losses).sum() / share
            self._announce(loss, sink)
        return loss, grads

    def _announce(self, loss: Tensor, sink: GradientSink) -> None:
        """Bring the loss to the host beside the kernels, so that updates may begin inside the backward."""
        drain = self._streams.drain
        drain.wait_event(self._streams.compute.record_event())
        self._streams.copy(drain, self._host_loss, loss)
        sink.turned(self._host_loss, drain.record_event())

    def _backward_layer(
        self, calls: list[list[Call]], boundaries: Boundaries, grads: list[Tensor], sink: GradientSink
    ) -> None:
        """Recompute and differentiate the next layer of the backward walk; `grads` is replaced in place."""
        assert self.gradients is not None
        with self._visit() as (block, params), self._gradients_of(block, sink, len(grads)):
            for m in range(len(grads)):
                hidden = boundaries.take((block, m)).detach().requires_grad_(block > self._first)
                leaves = self._leaves(block, params)
                with torch.enable_grad(), self._randomness(block, m):
                    output = self._model.recompute(block, leaves, hidden, calls[m][block - 1])
                grad_hidden = self._differentiate(block, output, grads[m], leaves, hidden)
                if grad_hidden is not None:
                    grads[m] = grad_hidden

    def _backward_embedding(self, batches: Sequence[MicroBatch], grads: list[Tensor], sink: GradientSink) -> None:
        with self._visit() as (block, params), self._gradients_of(block, sink, len(batches)):
            for m, batch in enumerate(batches):
                leaves = self._leaves(block, params)
                with torch.enable_grad(), self._randomness(block, m):
                    output, _ = self._model.embed(leaves, batch.inputs)
                self._differentiate(block, output, grads[m], leaves, None)

    def _leaves(self, block: int, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The block's parameters as autograd leaves over the slot's memory."""
        trainable = {name for name, _, _ in self._layouts[block].grad_ranges()}
        return {name: p.detach().requires_grad_(name in trainable) for name, p in params.items()}

    def _differentiate(
        self, block: int, output: Tensor, grad_output: Tensor, leaves: Mapping[str, Tensor], hidden: Tensor | None
    ) -> Tensor | None:
        """Hand the parameter gradients over; return the gradient of `hidden` where it is needed."""
        names = [name for name, leaf in leaves.items() if leaf.requires_grad]
        inputs = [leaves[n] for n in names]
        num_parameters = len(inputs)
        if hidden is not None and hidden.requires_grad:
            inputs.append(hidden)
        grads = torch.autograd.grad(output, inputs, grad_output, allow_unused=True)
        assert self.gradients is not None
        self.gradients.add(dict(zip(names, grads, strict=False)))
        return grads[-1] if len(grads) > num_parameters else None

    @contextmanager
    def _visit(self) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
        """The next block of the walk, resident while open."""
        visit = self._weights.acquire()
        self._weights.prefetch()
        yield visit
        self._weights.release()

    @contextmanager
    def _gradients_of(self, block: int, sink: GradientSink, num_parts: int | None = None) -> Iterator[None]:
        """Sum the block's gradients, of `num_parts` parts where that is known, then send them to the host."""
        assert self.gradients is not None
        self.gradients.open(block, single=num_parts == 1)
        yield
        self.gradients.close(sink)

    @contextmanager
    def _randomness(self, block: int, micro_batch: int) -> Iterator[None]:
        """Dropout masks that depend on (step, block, micro-batch) only, so that a recomputation draws them again."""
        if not self._replays_random or not self._model.skeleton.training:
            yield
            return
        device = self._streams.device
        with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
            torch.manual_seed(_mix(self._seed, block, micro_batch))
            yield


def _divisors(batches: Sequence[MicroBatch], share: float, custom: bool) -> list[float]:
    """What each micro-batch's loss is divided by: summed losses by all trained tokens, custom ones by their weight."""
    weights = [b.num_tokens for b in batches]
    if not custom:
        return [sum(weights) / share] * len(batches)
    return [sum(weights) / (share * w) if w else math.inf for w in weights]


def _mix(*values: int) -> int:
    """A 63-bit seed from a few small integers."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = ((state ^ value) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1
