"""The buffers that blocks compute from: w + eps z and w - eps z of what is trained, and w of what is frozen, once.

    plus, minus | trained of the block ... | trained of each block that it borrows from ... |
    frozen      | frozen of the block .... | frozen of each block that it borrows from .... |

Noise and copy go by these parts, whole. Every visit fills the same three buffers; kernels on the compute stream keep
them in order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from horizon.layout import BlockLayout, Param
from horizon.stream.streams import Streams

if TYPE_CHECKING:
    from horizon.models.blocks import Params


@dataclass(frozen=True, slots=True)
class Piece:
    """A block whose weights a visit computes with, and where in the buffers these begin."""

    layout: BlockLayout
    trained: int
    frozen: int

    @property
    def trained_span(self) -> slice:
        """In the buffers of perturbed copies."""
        return slice(self.trained, self.trained + self.layout.num_trainable)

    @property
    def frozen_span(self) -> slice:
        """In the buffer of what is not perturbed."""
        return slice(self.frozen, self.frozen + self.layout.num_elements - self.layout.num_trainable)


def pieces_of(layout: BlockLayout, layouts: Sequence[BlockLayout]) -> list[Piece]:
    """The block itself, then those that it borrows from."""
    pieces, trained, frozen = [], 0, 0
    for piece in (layout, *(layouts[owner] for owner in sorted({b.owner for b in layout.borrowed}))):
        pieces.append(Piece(piece, trained, frozen))
        trained, frozen = pieces[-1].trained_span.stop, pieces[-1].frozen_span.stop
    return pieces


def copy_elements(layouts: Sequence[BlockLayout]) -> tuple[int, int]:
    """Elements of a buffer of perturbed copies, and of that of frozen ones."""
    ends = [pieces_of(layout, layouts)[-1] for layout in layouts]
    return max(end.trained_span.stop for end in ends), max(end.frozen_span.stop for end in ends)


class Copies:
    """The three buffers, and the parameters of every block as views of them."""

    def __init__(self, streams: Streams, layouts: Sequence[BlockLayout], dtype: torch.dtype):
        trained, frozen = copy_elements(layouts)
        self._perturbed = [streams.empty(trained, dtype=dtype) for _ in range(2)]
        self._frozen = streams.empty(frozen, dtype=dtype)
        self._params = [[_parameters(lay, layouts, flat, self._frozen) for flat in self._perturbed] for lay in layouts]

    def targets(self, piece: Piece, count: int) -> list[Tensor]:
        """Where the first `count` copies of what is trained go."""
        return [flat[piece.trained_span] for flat in self._perturbed[:count]]

    def frozen(self, piece: Piece) -> Tensor:
        """Where the copy of what is frozen goes."""
        return self._frozen[piece.frozen_span]

    def params(self, block: int) -> list[Params]:
        """The parameters that a visit of `block` computes with, perturbed by +eps and by -eps."""
        return self._params[block]


def _parameters(layout: BlockLayout, layouts: Sequence[BlockLayout], perturbed: Tensor, frozen: Tensor) -> Params:
    pieces = {piece.layout.index: piece for piece in pieces_of(layout, layouts)}
    named = [(p.spec.local_name, layout.index, p) for p in layout.params]
    named += [(b.local_name, b.owner, b.param) for b in layout.borrowed]
    return {name: _view(pieces[owner], param, perturbed, frozen) for name, owner, param in named}


def _view(piece: Piece, param: Param, perturbed: Tensor, frozen: Tensor) -> Tensor:
    flat, start = perturbed[piece.trained_span], param.offset
    if not param.spec.trainable:
        flat, start = frozen[piece.frozen_span], param.offset - piece.layout.num_trainable
    return flat[start : start + math.prod(param.spec.shape)].view(param.spec.shape)
