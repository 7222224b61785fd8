"""Bytes and times of an engine that does not exist, from its model's shapes and its machine's facts.

An engine measures these on its own kernels (`horizon.stream.measure`, `horizon.stream.timing`); whatever follows from
them is decided by the same code. The constants below were fitted to measured steps of 3 B and 7 B parameters on one
H200 (`profiling/results/`); docs/planning.md says how far off they are.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import torch

from horizon.config.schema import Moments, Recompute
from horizon.layout import first_trained
from horizon.models.shape import ModelShape
from horizon.models.tiles import TILE
from horizon.models.work import LayerWork, ModelWork
from horizon.plan.activations import WorkingSet
from horizon.plan.cost import LayerKind, PassTimes, Rates, StepTimes
from horizon.plan.facts import MachineFacts
from horizon.units import GIB, MIB

# ---- bytes
GRADIENTS_AT_WORK = 2  # of the widest activation, that a layer's backward holds beside its graph
WORKSPACE = 128 * MIB  # of the products' library
LOGITS = {True: 2, False: 6}  # copies in bf16 of a chunk's logits that the head holds, with the fused loss and without
SCORES = 8  # bytes a score and head, where attention forms them: in fp32, and rounded

# ---- times
ATTENTION = 0.8  # of the rate of products, that attention kernels reach
BACKWARD = 2.5  # of the forward's attention: scores again, and their gradients
SWEEPS = {True: 1.5, False: 4.0}  # over what a graph holds, by a forward's norms, activations and sums; fused or not
LOGIT_SWEEPS = 6  # over a chunk's logits
JOIN_BYTES = 24  # that a join of one parameter reads and writes, in three sweeps
LAUNCHES_S = 0.001  # a GPU's layer takes at least so long forward, and twice as long to run again, and backward
CPU_OVERHEAD_S = 0.0005  # the same on CPU


@dataclass(frozen=True, slots=True)
class Estimator:
    """Estimates for one model on one machine.

    Args:
        fused: Liger's kernels run.
        on_gpu: blocks compute on the machine's GPU, else on its cores.
    """

    work: ModelWork
    kinds: dict[LayerKind, LayerWork]  # without what is kept, which is always `full` here
    first: int  # where backward ends
    facts: MachineFacts
    dtype: torch.dtype
    fused: bool
    on_gpu: bool
    chunk: int  # tokens of a chunk of the head

    @classmethod
    def of(
        cls, model: ModelShape, facts: MachineFacts, dtype: torch.dtype, fused: bool, on_gpu: bool, chunk: int
    ) -> Estimator:
        """For a model of this shape."""
        layers = zip(model.layouts[1:-1], model.work.layers, strict=True)
        kinds = {(lay.num_elements, lay.num_trainable, Recompute.full): layer for lay, layer in layers}
        return cls(model.work, kinds, first_trained(model.layouts), facts, dtype, fused, on_gpu, chunk)

    # ---- bytes

    def working_set(self, seq_len: int, rows: int, version: int, kinds: Set[Recompute]) -> WorkingSet:
        """As `horizon.stream.measure.measure_working_set` gives it; `version` changes nothing."""
        selective = max(self._outputs(layer) for layer in self.work.layers) if Recompute.selective in kinds else 0
        graph = max(self._graph(layer, seq_len) for layer in self.work.layers)
        kept = graph if Recompute.none in kinds else 0
        if not self.on_gpu:
            return WorkingSet(0, 0, 0, selective, kept)
        at_work = max(self._at_work(layer, seq_len) for layer in self.work.layers)
        logits = min(self.chunk, rows * seq_len) * self.work.vocab_size * 2 * LOGITS[self.fused]
        return WorkingSet(WORKSPACE, at_work, WORKSPACE + logits, selective, kept)

    def _outputs(self, layer: LayerWork) -> int:
        return layer.outputs * self.dtype.itemsize

    def _at_work(self, layer: LayerWork, seq_len: int) -> int:
        """Bytes a token while a layer's backward runs. Rows longer than a tile have one tile of an MLP at a time."""
        share = min(1.0, TILE / seq_len) if layer.tiled else 1.0
        inside = layer.tiled + GRADIENTS_AT_WORK * layer.widest
        return self._graph(layer, seq_len) + int((share * inside - layer.tiled) * self.dtype.itemsize)

    def _graph(self, layer: LayerWork, seq_len: int) -> int:
        """Bytes a token that the layer's graph holds."""
        elements = layer.graph if self.fused else layer.graph + layer.plain
        in_fp32 = 0 if self.fused or self.dtype is torch.float32 else 4 * layer.norms
        scores = SCORES * layer.heads * seq_len if layer.materialises else 0
        return elements * self.dtype.itemsize + in_fp32 + scores

    # ---- times

    def rates(self, moments: Moments, threads: int | None) -> Rates:
        """What the machine does with copies and updates."""
        device, host = self.facts.device, self.facts.host_bytes_per_s
        up, down, within = (host / 2, host / 2, host)
        if self.on_gpu and device is not None:
            up, down, within = device.up_bytes_per_s, device.down_bytes_per_s, device.bytes_per_s
        return Rates(
            up_bytes_per_s=up,
            down_bytes_per_s=down,
            device_bytes_per_s=within,
            updates_per_s=self.facts.update_rate(moments, threads),
            overlaps=self.on_gpu,
            joins_per_s=within / JOIN_BYTES,
        )

    def step_times(self, shape: tuple[int, int], version: int, kinds: Set[Recompute], alone: bool) -> StepTimes:
        """As `horizon.stream.timing.PassTimer` gives them; `version` and `alone` change nothing."""
        rows, seq_len = shape
        tokens = rows * seq_len
        layers: dict[LayerKind, PassTimes] = {}
        for (elements, trainable, _), layer in self.kinds.items():
            for kind in {*kinds, Recompute.full}:
                layers[elements, trainable, kind] = self._layer_times(layer, tokens, seq_len, kind)
        sweep = tokens * self.work.hidden_size * self.dtype.itemsize / self._bytes_per_s
        embedding = PassTimes(self._at_least(2 * sweep, 1), self._at_least(3 * sweep, 1))
        head = 6 * tokens * self.work.head / self._flops_per_s
        head += LOGIT_SWEEPS * tokens * self.work.vocab_size * self.dtype.itemsize / self._bytes_per_s
        return StepTimes(tokens, embedding, layers, self._at_least(head, 3))

    def _layer_times(self, layer: LayerWork, tokens: int, seq_len: int, kind: Recompute) -> PassTimes:
        seen = min(seq_len, 2 * layer.window) if layer.window else seq_len
        attention = tokens * 2 * seen * layer.attention / (ATTENTION * self._flops_per_s)  # half of all pairs
        products = 2 * tokens / self._flops_per_s
        sweep = SWEEPS[self.fused] * tokens * self._graph(layer, 0) / self._bytes_per_s
        again = 0.0
        if kind is not Recompute.none:
            again = attention + sweep
        if kind is Recompute.full:
            again += products * (layer.products - layer.tail)
        forward = products * layer.products + attention + sweep
        backward = 2 * products * layer.products + BACKWARD * attention + 2 * sweep + again
        return PassTimes(self._at_least(forward, 1), self._at_least(backward, 2 if kind is Recompute.none else 3))

    def _at_least(self, seconds: float, passes: int) -> float:
        return max(seconds, passes * (LAUNCHES_S if self.on_gpu else CPU_OVERHEAD_S))

    @property
    def _flops_per_s(self) -> float:
        device = self.facts.device
        return device.flops_per_s if self.on_gpu and device is not None else self.facts.host_flops_per_s

    @property
    def _bytes_per_s(self) -> float:
        device = self.facts.device
        return device.bytes_per_s if self.on_gpu and device is not None else self.facts.host_bytes_per_s


def typical_process(on_gpu: bool) -> int:
    """Host bytes of a training process beside its states; on a GPU with the libraries that its first steps load."""
    return (3 * GIB) // 2 if on_gpu else 640 * MIB
