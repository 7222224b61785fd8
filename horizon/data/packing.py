"""Which pieces share a row: best fit, longest first. Pure arithmetic over lengths.

Each piece goes into the row with the least room that still holds it, or begins a new one. Rows are found by their
room, in one integer whose bit `n` says whether a row has room for exactly `n` tokens more.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray


def best_fit(lengths: NDArray[np.int64], seq_len: int) -> list[list[int]]:
    """Piece numbers of each row. Pieces within a row, and rows by their first piece, are in the order given.

    Every length is between 1 and `seq_len`.
    """
    rows: list[list[int]] = []
    rows_by_room: list[list[int]] = [[] for _ in range(seq_len + 1)]
    rooms = 0
    order = np.argsort(-lengths, kind="stable")
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(piece)
        if room > length:
            rows_by_room[room - length].append(row)
            rooms |= 1 << (room - length)
    return sorted(sorted(row) for row in rows)


def balanced(work: Sequence[int] | NDArray[np.int64], size: int) -> list[list[int]]:
    """Rows divided into groups of `size` (the last may have fewer) whose sums of `work` are about equal.

    The heaviest row goes first, each to the group with the least work per place that has a place left. Rows of equal
    work stay in order, and so do rows within a group.
    """
    num_groups = -(-len(work) // size)
    places = [size] * (num_groups - 1) + [len(work) - size * (num_groups - 1)]
    values = [int(value) for value in work]
    if len(set(values)) == 1 or num_groups == 1:
        return [list(range(group * size, group * size + count)) for group, count in enumerate(places)]
    groups: list[list[int]] = [[] for _ in places]
    lightest = [(0.0, group) for group in range(num_groups)]  # a heap of work per place
    sums = [0] * num_groups
    for row in sorted(range(len(values)), key=lambda row: -values[row]):
        _, group = heappop(lightest)
        groups[group].append(row)
        sums[group] += values[row]
        if len(groups[group]) < places[group]:
            heappush(lightest, (sums[group] / places[group], group))
    return [sorted(group) for group in groups]
