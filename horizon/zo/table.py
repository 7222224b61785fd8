"""What a kernel is told of a walk through the blocks: one row of 32-bit words a block, made on the host.

    | number of updates | key of each query's noise ... | update | update | ... |
    update: number of terms, decay (fp32 bits), key that it is rounded with, terms
    term:   key of its noise, coefficient (fp32 bits)

A row is padded to whole vectors. The keys hold seed, step, query and block, so a kernel needs nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from horizon.layout import BLOCK_ALIGN, PARAM_ALIGN, BlockLayout
from horizon.units import align_up
from horizon.zo.noise import ROUNDING, Array, noise_key

MAX_QUERIES = 64
FIRST_UPDATE = 1 + 2 * MAX_QUERIES
UPDATE, TERM = 4, 3  # words of an update without its terms, and of a term
ROW_ALIGN = 16  # words


class Term(NamedTuple):
    """coefficient * z(step, query) of an update."""

    step: int
    query: int
    coefficient: float  # an fp32 number


@dataclass(frozen=True, slots=True)
class Update:
    """What one step does to the weights: w * decay, then each term added, then rounding to the master's format."""

    step: int  # from 1
    decay: float  # an fp32 number, of parameters that decay
    terms: tuple[Term, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """What a walk does to the weights of one block, in this order."""

    block: int
    updates: Sequence[Update]  # that the block has not seen
    step: int  # whose noise its copies have
    num_queries: int


def noise_at(query: int) -> int:
    """Where in a row the key of a query's noise is."""
    return 1 + 2 * query


def make_table(seed: int, works: Sequence[Work]) -> Array:
    """One row for each of `works`, uint32 [works, width]."""
    rows = [_row(seed, work) for work in works]
    width = align_up(max(len(row) for row in rows), ROW_ALIGN)
    table = np.zeros((len(rows), width), np.uint32)
    for target, row in zip(table, rows, strict=True):
        target[: len(row)] = row
    return table


def _row(seed: int, work: Work) -> list[int]:
    row = [0] * FIRST_UPDATE
    row[0] = len(work.updates)
    for query in range(work.num_queries):
        row[noise_at(query) : noise_at(query) + 2] = noise_key(seed, work.step, query, work.block)
    for update in work.updates:
        row += [len(update.terms), _bits(update.decay), *noise_key(seed, update.step, ROUNDING, work.block)]
        for term in update.terms:
            row += [*noise_key(seed, term.step, term.query, work.block), _bits(term.coefficient)]
    return row


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


def decay_masks(layout: BlockLayout) -> Array:
    """Of each group of the block's elements, which of its 32 chunks decay: bits of uint32 [groups]."""
    decays = np.zeros(layout.num_elements // PARAM_ALIGN, bool)
    for param in layout.trainable:
        decays[param.offset // PARAM_ALIGN : align_up(param.end, PARAM_ALIGN) // PARAM_ALIGN] = param.spec.decay
    chunks = BLOCK_ALIGN // PARAM_ALIGN
    bits: Array = decays.reshape(-1, chunks).astype(np.uint32) << np.arange(chunks, dtype=np.uint32)
    return np.asarray(bits.sum(axis=1), np.uint32)
