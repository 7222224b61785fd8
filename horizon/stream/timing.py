"""How long copies and a micro-batch's passes take, measured on the real kernels: facts for `horizon.plan.cost`.

A GPU under load slows down to what its power allows, within some tenths of a second. Passes are therefore run again and
again, and timed when that has settled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from horizon.config.schema import Recompute
from horizon.layout import BlockLayout, first_trained
from horizon.models.structure import Call
from horizon.models.tiles import takes_tiles
from horizon.plan.cost import LayerKind, PassTimes, StepTimes
from horizon.store.arena import Arena
from horizon.store.split import join_master
from horizon.stream.batch import MicroBatch
from horizon.stream.gradients import GradientSlots
from horizon.stream.head import HeadLoss
from horizon.stream.passes import Passes
from horizon.stream.streams import Streams
from horizon.units import MIB

if TYPE_CHECKING:
    from horizon.models.blocks import Params

SETTLING_S = 0.5  # that passes are run for on a GPU, the second half of it timed
COPIES = 4  # of which the quickest counts
COPY_BYTES = {"cuda": 64 * MIB, "cpu": 32 * MIB}  # more than a GPU's cache holds, or a core's
JOINED = 8 << 20  # parameters that are joined to measure it


class Stopwatch:
    """Seconds between marks in the work of a stream."""

    def __init__(self, device: torch.device, stream: Any):
        self._on_gpu, self._stream = device.type == "cuda", stream
        self._marks: list[Any] = []

    def mark(self) -> None:
        """A point behind all work queued so far."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(self._stream)
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        """Seconds from each mark to the next; waits for the last, and forgets them all."""
        marks, self._marks = self._marks, []
        if not self._on_gpu:
            return [end - start for start, end in pairwise(marks)]
        marks[-1].synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairwise(marks)]


def measure_copies(streams: Streams) -> tuple[float, float, float]:
    """Bytes per second to the device, from it, and read and written within it, each alone.

    Takes `COPY_BYTES` of host memory and twice that on the device meanwhile.
    """
    size, pin = COPY_BYTES[streams.device.type], streams.device.type == "cuda"
    arena = Arena([size], "measuring the link", pin)
    one, other = (streams.empty(size, dtype=torch.uint8) for _ in range(2))
    try:
        host = arena.regions[0].zero_()
        up = _copy_seconds(streams, streams.fetch, one, host)
        down = _copy_seconds(streams, streams.drain, host, one)
        within = _copy_seconds(streams, streams.compute, other, one)
    finally:
        streams.synchronize()
        arena.close()
    return size / up, size / down, 2 * size / within


def _copy_seconds(streams: Streams, stream: Any, target: Tensor, source: Tensor) -> float:
    streams.synchronize()
    watch = Stopwatch(streams.device, stream)
    for _ in range(COPIES):
        watch.mark()
        streams.copy(stream, target, source)
    watch.mark()
    return max(min(watch.laps()), 1e-9)


def measure_joins(streams: Streams) -> float:
    """Parameters a second that become fp32 from their halves on the device."""
    high, low, values = (streams.empty(JOINED, dtype=t).zero_() for t in (torch.bfloat16, torch.int16, torch.float32))
    streams.synchronize()
    watch = Stopwatch(streams.device, streams.fetch)
    for _ in range(COPIES):
        watch.mark()
        with streams.running(streams.fetch):
            join_master(high, low, out=values)
    watch.mark()
    return JOINED / max(min(watch.laps()), 1e-9)


class PassTimer:
    """Times the passes over one micro-batch while its blocks are resident: embedding, a layer of each size, head.

    Takes what the plan says of a block at work with that micro-batch. Gradients are summed on the device and dropped.

    Args:
        alone: the micro-batch is the step's only one, so that its gradients are added to nothing.
    """

    def __init__(
        self, streams: Streams, layouts: Sequence[BlockLayout], passes: Passes, head_loss: HeadLoss,
        gradients: GradientSlots, batch: MicroBatch, alone: bool,
    ):  # fmt: skip
        self._streams, self._layouts, self._passes, self._head_loss = streams, layouts, passes, head_loss
        self._gradients, self._batch, self._alone = gradients, batch, alone
        self._first, self._head = first_trained(layouts), len(layouts) - 1
        self._hidden = streams.empty(0, dtype=torch.float32)
        self._calls: list[Call] = []
        self._ends = {0: PassTimes(0.0, 0.0)}  # embedding and head
        self._layers: dict[LayerKind, PassTimes] = {}

    @property
    def blocks(self) -> list[int]:
        """The blocks to visit, in order: of layers alike, the last."""
        layers = {(lay.num_elements, lay.num_trainable): lay.index for lay in self._layouts[1 : self._head]}
        return [0, *sorted(layers.values()), self._head]

    def times(self) -> StepTimes:
        """What was measured, when all blocks were visited."""
        rows, tokens = self._batch.shape
        return StepTimes(rows * tokens, self._ends[0], self._layers, self._ends[self._head].backward_s)

    @torch.no_grad()
    def visit(self, block: int, params: Params, kinds: Collection[Recompute]) -> None:
        """Time `block`, whose parameters these are; a layer with each of `kinds`, what it keeps for its backward."""
        self._gradients.rehearse(block)
        if block == 0:
            self._ends[0] = self._embedding(params)
        elif block == self._head:
            self._ends[block] = self._turn_around(params)
        else:
            layout = self._layouts[block]
            for kind in sorted(kinds) if block >= self._first else [Recompute.full]:
                self._layers[layout.num_elements, layout.num_trainable, kind] = self._layer(block, params, kind)

    def _embedding(self, params: Params) -> PassTimes:
        def forward() -> None:
            self._hidden, self._calls = self._passes.embed(0, params, self._batch, self._gradients)

        def backward() -> None:
            if self._first == 0:
                self._begin(0)
                self._passes.backward_kept((0, 0), params, grad, self._gradients)

        forward()
        grad = torch.ones_like(self._hidden)
        return self._time(forward, backward, SETTLING_S / 10)  # takes no power to speak of

    def _layer(self, block: int, params: Params, kind: Recompute) -> PassTimes:
        passes, key, call, hidden = self._passes, (block, 0), self._calls[block - 1], self._hidden
        grad = torch.ones_like(hidden)

        def forward() -> None:
            passes.forward(key, params, hidden, call, self._gradients, kind)

        def backward() -> None:
            if block < self._first:
                return
            self._begin(block)
            if passes.keeps_graph(key):
                passes.backward_kept(key, params, grad, self._gradients)
            else:
                passes.backward(key, params, hidden, call, grad, self._gradients)

        return self._time(forward, backward)

    def _turn_around(self, params: Params) -> PassTimes:
        def turn() -> None:
            self._begin(self._head)
            self._head_loss.backward(params, self._hidden, self._batch, 1.0, self._gradients)

        return self._time(lambda: None, turn)

    def _begin(self, block: int) -> None:
        """The gradients to come overwrite the block's; those of one of several micro-batches are added to them."""
        if self._alone:
            self._gradients.rehearse(block, single=block < self._head and not takes_tiles(self._hidden))

    def _time(
        self, forward: Callable[[], None], backward: Callable[[], None], settling_s: float = SETTLING_S
    ) -> PassTimes:
        """Mean seconds of each, when run in turns until the device's pace has settled."""
        self._run(forward, backward, 1)  # kernels compile
        once = self._run(forward, backward, 1)
        if self._streams.device.type != "cuda":
            return once
        seconds = max(once.forward_s + once.backward_s, 1e-6)
        return self._run(forward, backward, min(max(2, round(settling_s / seconds)), 200))

    def _run(self, forward: Callable[[], None], backward: Callable[[], None], times: int) -> PassTimes:
        """Mean seconds of each in the later half of so many runs."""
        watch = Stopwatch(self._streams.device, self._streams.compute)
        watch.mark()
        for _ in range(times):
            forward()
            watch.mark()
            backward()
            watch.mark()
        laps = watch.laps()[times // 2 * 2 :]
        runs = len(laps) // 2
        return PassTimes(sum(laps[::2]) / runs, sum(laps[1::2]) / runs)
