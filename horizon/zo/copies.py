"""The buffers that blocks compute from: one for w + eps z, one for w - eps z.

A buffer holds the elements of the visited block and, behind them, all of each block that it borrows from, so that noise
and copy go by whole blocks. Every visit fills the same two buffers; kernels on the compute stream keep them in order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from horizon.layout import BlockLayout
from horizon.stream.streams import Streams

if TYPE_CHECKING:
    from horizon.models.blocks import Params


def pieces_of(layout: BlockLayout, layouts: Sequence[BlockLayout]) -> list[tuple[int, int]]:
    """(block, where its elements begin in a buffer): the block itself, then those that it borrows from."""
    pieces, end = [(layout.index, 0)], layout.num_elements
    for owner in sorted({b.owner for b in layout.borrowed}):
        pieces.append((owner, end))
        end += layouts[owner].num_elements
    return pieces


def copy_elements(layouts: Sequence[BlockLayout]) -> int:
    """Elements of a buffer."""
    return max(sum(layouts[block].num_elements for block, _ in pieces_of(layout, layouts)) for layout in layouts)


class Copies:
    """Two buffers, and the parameters of every block as views of them."""

    def __init__(self, streams: Streams, layouts: Sequence[BlockLayout], dtype: torch.dtype):
        size = copy_elements(layouts)
        self._layouts = layouts
        self._flat = [streams.empty(size, dtype=dtype) for _ in range(2)]
        self._params = [[_parameters(layout, layouts, flat) for flat in self._flat] for layout in layouts]

    def targets(self, block: int, start: int, count: int) -> list[Tensor]:
        """Where the elements of `block` go that begin at `start`, in the first `count` buffers."""
        return [flat[start : start + self._layouts[block].num_elements] for flat in self._flat[:count]]

    def params(self, block: int) -> list[Params]:
        """The parameters that a visit of `block` computes with, in each buffer."""
        return self._params[block]


def _parameters(layout: BlockLayout, layouts: Sequence[BlockLayout], flat: Tensor) -> Params:
    starts = dict(pieces_of(layout, layouts))
    places = [(p.spec.local_name, p.offset, p.spec.shape) for p in layout.params]
    places += [(b.local_name, starts[b.owner] + b.param.offset, b.param.spec.shape) for b in layout.borrowed]
    return {name: flat[start : start + math.prod(shape)].view(shape) for name, start, shape in places}
