"""Chunks: the ranges of a block that the optimizer updates one call at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from horizon.layout import BlockLayout


class Chunk(NamedTuple):
    """A range of a block's elements that is updated by one call."""

    start: int
    stop: int
    decay: bool


def cut_chunks(layout: BlockLayout, chunk_elements: int) -> Iterator[Chunk]:
    """The chunks of a block's trainable parameters, in order: no padding, no mix of decayed and undecayed.

    A chunk starts at a multiple of PARAM_ALIGN and has at most `chunk_elements` (a multiple of it) elements.
    """
    runs: list[Chunk] = []
    for param in layout.trainable:
        if runs and runs[-1].stop == param.offset and runs[-1].decay is param.spec.decay:
            runs[-1] = runs[-1]._replace(stop=param.end)
        else:
            runs.append(Chunk(param.offset, param.end, param.spec.decay))
    for run in runs:
        for start in range(run.start, run.stop, chunk_elements):
            yield Chunk(start, min(start + chunk_elements, run.stop), run.decay)
