"""Forward and backward of one block on one micro-batch, with what is kept from the one for the other.

    full       nothing but what enters the layer: backward runs the layer again
    selective  also the outputs of its linear layers: running it again multiplies nothing
    none       its autograd graph: backward runs nothing again

A kept graph must not hold the block's weights, whose slot is loaded with other blocks meanwhile: where it would save a
view of the slot, it saves a place, which is looked up in the slot that holds the block by then. The embedding's graph
is always kept, for it holds next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from horizon.config.schema import Recompute
from horizon.models.linear import GradientSums
from horizon.models.structure import Call
from horizon.stream.batch import MicroBatch
from horizon.stream.gradients import GradientSlots
from horizon.stream.randomness import Randomness

if TYPE_CHECKING:
    from horizon.models.blocks import BlockModel, Params

Key = tuple[int, int]  # block, micro-batch


@dataclass(frozen=True, slots=True)
class _Place:
    """A view of a block's weights, wherever they are: relative to the view that is a parameter."""

    name: str
    shift: int
    size: torch.Size
    stride: tuple[int, ...]


class _SavedWeights:
    """What a graph that outlives its block's slot keeps in the place of weights."""

    def __init__(self, params: Params):
        self._params = params
        self._names = {p.untyped_storage().data_ptr(): name for name, p in params.items()}
        self._others: dict[int, int] = {}  # bytes of what is saved besides weights, by storage

    @property
    def num_bytes(self) -> int:
        """Bytes that the graph holds."""
        return sum(self._others.values())

    def bind(self, params: Params) -> None:
        """From now on the weights are these."""
        self._params = params

    def pack(self, saved: Tensor) -> Tensor | _Place:
        storage = saved.untyped_storage()
        name = self._names.get(storage.data_ptr())
        if name is None:
            self._others[storage.data_ptr()] = storage.nbytes()
            return saved.detach()  # a node that holds its own output holds itself, and a dropped graph would stay
        shift = int(saved.storage_offset() - self._params[name].storage_offset())
        return _Place(name, shift, saved.size(), saved.stride())

    def unpack(self, packed: Tensor | _Place) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        base = self._params[packed.name]
        return base.as_strided(packed.size, packed.stride, base.storage_offset() + packed.shift)


@dataclass(slots=True)
class _Graph:
    end: GradientEdge  # of the output, whose values the graph need not hold
    leaves: dict[str, Tensor]
    hidden: Tensor | None
    weights: _SavedWeights


class Passes:
    """Runs embedding and layers forward and backward; what it keeps, it keeps until the backward has used it.

    Args:
        first: the lowest block with something to train, where backward ends.
    """

    def __init__(self, model: BlockModel, randomness: Randomness, first: int):
        self._model, self._randomness, self._first = model, randomness, first
        self._trainable = [{name for name, _, _ in lay.grad_ranges()} for lay in model.layouts]
        self._graphs: dict[Key, _Graph] = {}
        self._outputs: dict[Key, list[Tensor | None]] = {}

    def reset(self) -> None:
        """Drop what is kept."""
        self._graphs.clear()
        self._outputs.clear()

    @torch.no_grad()
    def embed(
        self, micro_batch: int, params: Params, batch: MicroBatch, sums: GradientSums | None
    ) -> tuple[Tensor, list[Call]]:
        """Hidden states and the layers' calls; with `sums`, for a backward."""
        with self._randomness.of(0, micro_batch):
            if sums is None or self._first > 0:
                return self._model.embed(params, batch.inputs, batch.documents)
            leaves, weights = self._leaves(0, params), _SavedWeights(params)
            with torch.enable_grad(), saved_tensors_hooks(weights.pack, weights.unpack):
                states, calls = self._model.embed(leaves, batch.inputs, batch.documents, sums)
        self._graphs[0, micro_batch] = _Graph(get_gradient_edge(states), leaves, None, weights)
        return states.detach(), calls

    @torch.no_grad()
    def forward(
        self, key: Key, params: Params, hidden: Tensor, call: Call, sums: GradientSums | None, recompute: Recompute
    ) -> Tensor:
        """A layer's output; keeps what `recompute` says."""
        block, micro_batch = key
        with self._randomness.of(block, micro_batch):
            if recompute is Recompute.full:
                return self._model.layer(block, params, hidden, call)
            if recompute is Recompute.selective:
                self._outputs[key] = []
                return self._model.layer(block, params, hidden, call, self._outputs[key])
            assert sums is not None
            leaves, weights = self._leaves(block, params), _SavedWeights(params)
            hidden = hidden.detach().requires_grad_(block > self._first)
            with torch.enable_grad(), saved_tensors_hooks(weights.pack, weights.unpack):
                output = self._model.differentiable_layer(block, leaves, hidden, call, sums)
        self._graphs[key] = _Graph(get_gradient_edge(output), leaves, hidden, weights)
        return output.detach()

    def backward(
        self, key: Key, params: Params, hidden: Tensor, call: Call, grad: Tensor, sums: GradientSlots
    ) -> Tensor | None:
        """Run a layer again from `hidden` and differentiate it.

        Returns:
            the gradient of `hidden`, where a block below needs it.
        """
        block, micro_batch = key
        leaves, hidden = self._leaves(block, params), hidden.detach().requires_grad_(block > self._first)
        with torch.enable_grad(), self._randomness.of(block, micro_batch):
            output = self._model.recompute(block, leaves, hidden, call, sums, self._outputs.pop(key, ()))
        return _differentiate(output, grad, leaves, hidden, sums)

    def kept_bytes(self, key: Key) -> int:
        """Device bytes held from a forward for its backward."""
        if key in self._graphs:
            return self._graphs[key].weights.num_bytes
        return sum(output.nbytes for output in self._outputs.get(key, ()) if output is not None)

    def keeps_graph(self, key: Key) -> bool:
        """Whether `backward_kept` is the one to call."""
        return key in self._graphs

    def backward_kept(self, key: Key, params: Params, grad: Tensor, sums: GradientSlots) -> Tensor | None:
        """Differentiate the block's kept graph; returns as `backward`."""
        graph = self._graphs.pop(key)
        graph.weights.bind(params)
        return _differentiate(graph.end, grad, graph.leaves, graph.hidden, sums)

    def _leaves(self, block: int, params: Params) -> dict[str, Tensor]:
        """The block's parameters as autograd leaves over the slot's memory."""
        trainable = self._trainable[block]
        return {name: p.detach().requires_grad_(name in trainable) for name, p in params.items()}


def _differentiate(
    output: Tensor | GradientEdge,
    grad: Tensor,
    leaves: Mapping[str, Tensor],
    hidden: Tensor | None,
    sums: GradientSlots,
) -> Tensor | None:
    """Hand the parameter gradients over; return the gradient of `hidden` where it is needed."""
    names = [name for name, leaf in leaves.items() if leaf.requires_grad]
    inputs = [leaves[n] for n in names]
    wants_hidden = hidden is not None and hidden.requires_grad
    if wants_hidden:
        inputs.append(hidden)  # type: ignore[arg-type]
    # Linear weights find theirs in `sums` already, and come back as None.
    grads = torch.autograd.grad(output, inputs, grad, allow_unused=True)
    sums.add(dict(zip(names, grads, strict=False)))
    return grads[-1] if wants_hidden else None
