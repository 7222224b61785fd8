"""Rows: pieces of documents in rows of a fixed length, made into batches when they are asked for.

Packed, several pieces share a row, and position ids tell them apart:

    row 0        | a a a a a b b b |     position_ids  0 1 2 3 4 0 1 2
    row 1        | c c c c d d . . |                   0 1 2 3 0 1 0 1     . is padding

Nothing is predicted across pieces: the first token of each has no label, and neither has padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from horizon.data.encoding import Tokens
from horizon.data.packing import best_fit
from horizon.data.pieces import Pieces

IGNORED = -100  # label of a token that is not trained
Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows come from."""

    name: str
    tokens: Tokens
    weight: float | None = None  # its share of the tokens trained on; None: as many as it has


@dataclass(frozen=True)
class Rows:
    """Pieces (runs of a source's tokens) in rows; all pieces of a row are of one source.

    source: int64 [rows], index into `sources`; ends: int64 [rows], row r has the pieces ends[r - 1] to ends[r] - 1;
    starts, lengths, trained (tokens with a label): int64 [pieces].
    """

    sources: tuple[Source, ...]
    source: Numbers
    ends: Numbers
    starts: Numbers
    lengths: Numbers
    trained: Numbers
    seq_len: int
    pad_id: int
    packed: bool

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.ends)

    @cached_property
    def num_tokens(self) -> Numbers:
        """Real tokens in each row; they come first, and padding follows. int64 [rows]"""
        return self._sums(self.lengths)

    @cached_property
    def num_trained(self) -> Numbers:
        """Tokens with a label in each row. int64 [rows]"""
        return self._sums(self.trained)

    @cached_property
    def attention_work(self) -> Numbers:
        """Of each row, up to a factor: attention looks from every token of a piece to those before it. int64 [rows]

        Padding is a piece of its own in a packed row, and else a part of the only one.
        """
        if not self.packed:
            return np.full(len(self), self.seq_len**2)
        return self._sums(self.lengths**2) + (self.seq_len - self.num_tokens) ** 2

    @cached_property
    def _num_pieces(self) -> Numbers:
        return np.diff(self.ends, prepend=0)

    def fingerprint(self) -> str:
        """A hash of all rows and of the weights of their sources, in hexadecimal digits."""
        digest = hashlib.blake2b(digest_size=16)
        for source in self.sources:
            digest.update(f"{source.name}\0{source.weight}\0".encode())
            for array in (source.tokens.ids, source.tokens.trained):
                _update(digest, array)
        for array in (self.source, self.ends, self.starts, self.lengths):
            _update(digest, array)
        digest.update(f"{self.seq_len} {self.pad_id} {self.packed}".encode())
        return digest.hexdigest()

    def select(self, chosen: NDArray[np.bool_]) -> Rows:
        """Only the rows where `chosen` (bool [rows]) is true."""
        return self.take(np.flatnonzero(chosen))

    def take(self, rows: Numbers) -> Rows:
        """These rows, in this order."""
        counts = self._num_pieces[rows]
        pieces = _ranges(self.ends[rows] - counts, counts)
        return replace(
            self, source=self.source[rows], ends=np.cumsum(counts), starts=self.starts[pieces],
            lengths=self.lengths[pieces], trained=self.trained[pieces],
        )  # fmt: skip

    def spread(self) -> Rows:
        """The same rows in an order of which every beginning has about as much of each source as the whole."""
        place = np.zeros(len(self))
        for index in range(len(self.sources)):
            here = self.source == index
            place[here] = (np.arange(here.sum()) + 0.5) / max(1, int(here.sum()))
        return self.take(np.argsort(place, kind="stable"))

    def ids(self, row: int) -> list[int]:
        """The real tokens of one row."""
        found: list[int] = self._arrays(np.array([row]))["input_ids"][0, : self.num_tokens[row]].tolist()
        return found

    def batch(self, indices: Sequence[int] | Numbers) -> dict[str, torch.Tensor]:
        """The rows at `indices` as int64 tensors [rows, seq_len], named as transformers names them.

        Packed rows carry `position_ids`; others carry an `attention_mask` unless every token is real.
        """
        chosen = np.asarray(indices, np.int64)
        arrays = self._arrays(chosen)
        if not self.packed:
            del arrays["position_ids"]
            is_real = np.arange(self.seq_len) < self.num_tokens[chosen, None]
            if not is_real.all():
                arrays["attention_mask"] = is_real.astype(np.int64)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _arrays(self, rows: Numbers) -> dict[str, NDArray[np.int64]]:
        """input_ids, labels and position_ids of some rows, each int64 [rows, seq_len]."""
        counts = self._num_pieces[rows]
        pieces = _ranges(self.ends[rows] - counts, counts)
        lengths = self.lengths[pieces]
        position = _ranges(np.zeros_like(lengths), lengths)  # of each token in its piece
        origin = np.repeat(self.starts[pieces], lengths) + position
        row_tokens = self.num_tokens[rows]
        place = _ranges(np.arange(len(rows)) * self.seq_len, row_tokens)
        source = np.repeat(self.source[rows], row_tokens)

        shape = (len(rows), self.seq_len)
        ids, labels = np.full(shape, self.pad_id, np.int64), np.full(shape, IGNORED, np.int64)
        positions = np.arange(self.seq_len) - row_tokens[:, None]  # of padding, which is a piece of its own
        for index in np.unique(source):
            tokens, here = self.sources[index].tokens, source == index
            found, at = tokens.ids[origin[here]], place[here]
            trained = tokens.trained[origin[here]] & (position[here] > 0)
            ids.flat[at] = found
            labels.flat[at[trained]] = found[trained]
        positions.flat[place] = position
        return {"input_ids": ids, "labels": labels, "position_ids": positions}

    def _sums(self, values: Numbers) -> Numbers:
        """Of every row's pieces. int64 [rows]"""
        return np.diff(np.concatenate([[0], np.cumsum(values)])[self.ends], prepend=0)


def pack(source: Source, pieces: Pieces, seq_len: int, pad_id: int) -> Rows:
    """As few rows as best fit finds; what is left of them is filled with `pad_id`."""
    groups = best_fit(pieces.lengths, seq_len)
    order = np.array([piece for group in groups for piece in group], np.int64)
    ends = np.cumsum([len(group) for group in groups], dtype=np.int64)
    return _rows(source, pieces, order, ends, seq_len, pad_id, packed=True)


def pad(source: Source, pieces: Pieces, seq_len: int, pad_id: int) -> Rows:
    """One piece to a row, filled up with `pad_id`."""
    order = np.arange(len(pieces.lengths))
    return _rows(source, pieces, order, order + 1, seq_len, pad_id, packed=False)


def _rows(
    source: Source, pieces: Pieces, order: Numbers, ends: Numbers, seq_len: int, pad_id: int, *, packed: bool
) -> Rows:
    return Rows(
        (source,), np.zeros(len(ends), np.int64), ends, pieces.starts[order], pieces.lengths[order],
        pieces.trained[order], seq_len, pad_id, packed,
    )  # fmt: skip


def join(parts: Sequence[Rows]) -> Rows:
    """The rows of several sources, one after another; they are alike in all but their sources."""
    first, num_pieces = parts[0], np.cumsum([0, *(len(part.lengths) for part in parts)])
    return Rows(
        tuple(source for part in parts for source in part.sources),
        np.repeat(np.arange(len(parts)), [len(part) for part in parts]),
        np.concatenate([part.ends + offset for part, offset in zip(parts, num_pieces, strict=False)]),
        np.concatenate([part.starts for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([part.trained for part in parts]),
        first.seq_len, first.pad_id, first.packed,
    )  # fmt: skip


def _ranges(starts: Numbers, counts: Numbers) -> Numbers:
    """starts[0], starts[0] + 1, ... (counts[0] numbers), starts[1], ... int64 [sum of counts]"""
    offsets: Numbers = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(starts, counts) + offsets


def _update(digest: hashlib.blake2b, array: NDArray[np.generic]) -> None:
    digest.update(f"{array.dtype.str}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
