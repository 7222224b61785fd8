"""Where each parameter of a block lies in the block's flat buffers: the single authority on offsets.

Every state of a block (weights, residual, moments, gradients) uses the same element offsets, so one
layout answers for all of them. Trainable parameters come first: moments and gradients exist only for
that prefix. A slot holds the block's own elements followed by those it borrows from another block
(a tied head borrows the embedding's weight), so one flat buffer serves a block that shares parameters.

    | trainable ............ | frozen ...... | borrowed ...... |
    0            num_trainable         num_elements     num_slot_elements
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from horizon.units import align_up

PARAM_ALIGN = 64  # elements: 128 B in bf16, so every view suits vector loads and a whole number of AdamW vectors
BLOCK_ALIGN = 2048  # elements: 4 KiB in bf16, the unit of direct I/O


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """What the model says of one parameter, before it has a place."""

    name: str  # Hugging Face name in the whole model
    local_name: str  # name inside the block's module
    shape: tuple[int, ...]
    trainable: bool = True
    decay: bool = True  # weight decay applies

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter and the offset of its first element in each of the block's flat buffers."""

    spec: ParamSpec
    offset: int

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def end(self) -> int:
        return self.offset + self.spec.numel


@dataclass(frozen=True, slots=True)
class Borrowed:
    """A parameter that another block owns and this block reads (and adds gradient to)."""

    local_name: str
    owner: int  # index of the owning block
    param: Param  # as placed in the owner
    offset: int  # in this block's slot

    @property
    def end(self) -> int:
        return self.offset + self.param.spec.numel


@dataclass(frozen=True)
class BlockLayout:
    """The flat layout of one block; see the module's picture. What it sums up is asked for often, and kept."""

    index: int
    name: str
    params: tuple[Param, ...]
    borrowed: tuple[Borrowed, ...]
    num_trainable: int  # elements of the trainable prefix, padding included
    num_elements: int  # elements the block owns, padding included
    num_slot_elements: int  # elements a slot needs to hold the block, borrowed parameters included

    @cached_property
    def num_parameters(self) -> int:
        return sum(p.spec.numel for p in self.params)

    @cached_property
    def trainable(self) -> tuple[Param, ...]:
        return tuple(p for p in self.params if p.spec.trainable)

    @cached_property
    def num_trained(self) -> int:
        """Parameters with a gradient: `num_trainable` without padding."""
        return sum(p.spec.numel for p in self.trainable)

    @cached_property
    def num_grad_elements(self) -> int:
        """Elements a slot needs to hold the gradients that the block produces, at the offsets of its parameters."""
        ends = (b.end for b in self.borrowed if b.param.spec.trainable)
        return align_up(max((self.num_trainable, *ends)), BLOCK_ALIGN)

    def slot_ranges(self) -> Iterator[tuple[str, int, tuple[int, ...]]]:
        """(local name, offset in the slot, shape) of every parameter the block computes with."""
        for p in self.params:
            yield p.spec.local_name, p.offset, p.spec.shape
        for b in self.borrowed:
            yield b.local_name, b.offset, b.param.spec.shape

    def grad_ranges(self) -> Iterator[tuple[str, int, tuple[int, ...]]]:
        """(local name, offset in the slot, shape) of every parameter the block produces a gradient for."""
        for p in self.params:
            if p.spec.trainable:
                yield p.spec.local_name, p.offset, p.spec.shape
        for b in self.borrowed:
            if b.param.spec.trainable:
                yield b.local_name, b.offset, b.param.spec.shape


def first_trained(layouts: Sequence[BlockLayout]) -> int:
    """The lowest block with something to train, where backward ends."""
    return min(lay.index for lay in layouts if lay.num_trainable)


def place_block(
    index: int,
    name: str,
    specs: Iterable[ParamSpec],
    borrowed: Iterable[tuple[str, int, Param]] = (),
) -> BlockLayout:
    """Lay out a block: trainable parameters in model order, then frozen ones, then borrowed ones.

    `borrowed` lists (local name, owner block index, the parameter as placed in its owner).
    """
    offset = 0
    placed: list[Param] = []
    specs = tuple(specs)
    ends = []
    for trainable in (True, False):
        for spec in specs:
            if spec.trainable is trainable:
                placed.append(Param(spec, offset))
                offset = align_up(offset + spec.numel, PARAM_ALIGN)
        offset = align_up(offset, BLOCK_ALIGN)
        ends.append(offset)
    num_trainable, num_elements = ends
    shared = []
    for local_name, owner, param in borrowed:
        shared.append(Borrowed(local_name, owner, param, offset))
        offset = align_up(offset + param.spec.numel, PARAM_ALIGN)
    return BlockLayout(
        index, name, tuple(placed), tuple(shared), num_trainable, num_elements, align_up(offset, BLOCK_ALIGN)
    )
