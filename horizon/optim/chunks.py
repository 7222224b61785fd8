"""Chunks: the ranges of a block that the optimizer updates one call at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from horizon.layout import BlockLayout
from horizon.plan.disk import PAGE_ELEMENTS


class Chunk(NamedTuple):
    """A range of a block's elements that is updated by one call."""

    start: int
    stop: int
    decay: bool


def cut_chunks(layout: BlockLayout, chunk_elements: int) -> Iterator[Chunk]:
    """The chunks of a block's trainable parameters, in order: no padding, no mix of decayed and undecayed.

    A chunk starts at a multiple of PARAM_ALIGN and has at most `chunk_elements` (a multiple of it) elements, all on one
    page, wherever the states are: the same chunks for every placement.
    """
    runs: list[Chunk] = []
    for param in layout.trainable:
        if runs and runs[-1].stop == param.offset and runs[-1].decay is param.spec.decay:
            runs[-1] = runs[-1]._replace(stop=param.end)
        else:
            runs.append(Chunk(param.offset, param.end, param.spec.decay))
    for run in runs:
        start = run.start
        while start < run.stop:
            end_of_page = (start // PAGE_ELEMENTS + 1) * PAGE_ELEMENTS
            stop = min(start + chunk_elements, run.stop, end_of_page)
            yield Chunk(start, stop, run.decay)
            start = stop
