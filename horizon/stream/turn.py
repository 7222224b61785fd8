"""The turn of a step: each micro-batch on its own up through the last layers and the head, and straight back.

Their blocks are resident together meanwhile, and their gradients are summed together. What a layer keeps for its
backward is then of one micro-batch, where it would be of all of them if each block saw all before the next; so the room
that keeps few layers from being run again, as `horizon.stream.executor` goes through the others, keeps many here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from horizon.config.schema import Recompute
from horizon.models.structure import Call
from horizon.stream.batch import MicroBatch
from horizon.stream.gradients import GradientSink, GradientSlots
from horizon.stream.head import HeadLoss, LossFn
from horizon.stream.passes import Passes
from horizon.stream.randomness import Randomness
from horizon.stream.slots import WeightSlots
from horizon.stream.streams import Streams
from horizon.stream.timeline import Cause

Params = Mapping[str, Tensor]


@dataclass(slots=True)
class ForwardState:
    """What the forward pass up to the turn leaves behind."""

    hidden: list[Tensor]  # what enters the turn, per micro-batch, [B, T, H]
    calls: list[list[Call]]  # per micro-batch and layer


class Turn:
    """Goes through the next blocks of the slots' walk: `layers`, then the head.

    Args:
        layers: the last layers, all with something to train below the head; none: the turn is the head.
    """

    def __init__(
        self, layers: range, head: int, weights: WeightSlots, gradients: GradientSlots, passes: Passes,
        head_loss: HeadLoss, randomness: Randomness, streams: Streams,
    ):  # fmt: skip
        self._layers, self._head, self._weights, self._gradients = layers, head, weights, gradients
        self._passes, self._head_loss, self._randomness, self._streams = passes, head_loss, randomness, streams
        self._resident: dict[int, Params] = {}
        self._host_loss = torch.zeros((), pin_memory=streams.device.type == "cuda")

    def run(
        self, batches: Sequence[MicroBatch], state: ForwardState, sink: GradientSink, share: float,
        loss_fn: LossFn | None,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """Forward and backward: the step's loss, and `share` times the gradient of what entered, per micro-batch.

        `state.hidden` is used up. Blocks' gradients are sent on with the last micro-batch.
        """
        losses, grads = [], []
        self._resident.clear()
        for m, (batch, divisor) in enumerate(zip(batches, _divisors(batches, share, loss_fn is not None), strict=True)):
            is_last, hidden = m == len(batches) - 1, state.hidden.pop(0)
            for block in self._layers:
                params, call = self._at_work(block, "forward"), state.calls[m][block - 1]
                hidden = self._passes.forward((block, m), params, hidden, call, self._gradients, Recompute.none)
            params = self._at_work(self._head, "head")
            self._gradients.open(self._head, single=False)
            with self._randomness.of(self._head, m):
                loss, grad = self._head_loss.backward(params, hidden, batch, divisor, self._gradients, loss_fn)
            losses.append(loss)
            if is_last:
                total = torch.stack(losses).sum() / share
                self._announce(total, sink)
                self._leave(self._head, sink)
            for block in reversed(self._layers):
                params = self._at_work(block, "backward")
                self._gradients.open(block, single=False)
                below = self._passes.backward_kept((block, m), params, grad, self._gradients)
                grad = grad if below is None else below
                if is_last:
                    self._leave(block, sink)
            grads.append(grad)
        return total, grads

    def _at_work(self, block: int, what: str) -> Params:
        """The block's parameters; the first micro-batch brings it here."""
        if block not in self._resident:
            _, self._resident[block] = self._weights.acquire()
        elif self._layers:
            self._streams.timeline.enter(Cause.arithmetic, what, block)
        return self._resident[block]

    def _leave(self, block: int, sink: GradientSink) -> None:
        """The block has seen all micro-batches."""
        self._gradients.close(sink)
        self._weights.release(block)
        del self._resident[block]

    def _announce(self, loss: Tensor, sink: GradientSink) -> None:
        """Bring the loss to the host beside the kernels, so that updates may begin inside the backward."""
        drain = self._streams.drain
        drain.wait_event(self._streams.compute.record_event())
        self._streams.copy(drain, self._host_loss, loss)
        sink.turned(self._host_loss, drain.record_event())


def _divisors(batches: Sequence[MicroBatch], share: float, custom: bool) -> list[float]:
    """What each micro-batch's loss is divided by: summed losses by all trained tokens, custom ones by their weight."""
    weights = [b.num_tokens for b in batches]
    if not custom:
        return [sum(weights) / share] * len(batches)
    return [sum(weights) / (share * w) if w else math.inf for w in weights]
