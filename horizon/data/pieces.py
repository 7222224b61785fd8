"""Documents -> pieces: parts of documents that a row can hold. What is longer is split, truncated or dropped.

A document's first token in a row has nothing before it that predicts it, so it is never trained; pieces in which
nothing else is trained either are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from horizon.config.schema import TooLong
from horizon.data.encoding import Tokens

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LengthCounts:
    """What became of the documents of one source."""

    documents: int = 0
    tokens: int = 0  # of all of them
    split: int = 0  # documents that were
    truncated: int = 0
    dropped: int = 0
    lost_tokens: int = 0  # by truncating and dropping
    untrained: int = 0  # pieces left out because nothing in them is trained

    def __add__(self, other: LengthCounts) -> LengthCounts:
        return LengthCounts(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))

    def __str__(self) -> str:
        """The counts that are not 0, for people."""
        words = {"split": "split", "truncated": "truncated", "dropped": "dropped as too long"}
        said = [f"{getattr(self, name):,} {word}" for name, word in words.items() if getattr(self, name)]
        if self.lost_tokens:
            said[-1] += f" ({self.lost_tokens:,} tokens lost)"
        if self.untrained:
            said.append(f"{self.untrained:,} pieces without a trained token left out")
        return ", ".join(said)


@dataclass(frozen=True, slots=True)
class Pieces:
    """Runs of one source's tokens. starts, lengths, trained (tokens with a label): int64 [pieces], by place."""

    starts: Numbers
    lengths: Numbers
    trained: Numbers
    counts: LengthCounts


def cut(tokens: Tokens, chosen: NDArray[np.bool_], seq_len: int, too_long: TooLong) -> Pieces:
    """The documents that are `chosen` (bool [documents]) in pieces of at most `seq_len` tokens."""
    starts, lengths = tokens.starts[chosen], tokens.lengths[chosen]
    num_documents, num_tokens = len(lengths), int(lengths.sum())
    is_long = lengths > seq_len
    num_long, lost = int(is_long.sum()), int((lengths - seq_len)[is_long].sum())
    if too_long is TooLong.split:
        parts = -(-lengths // seq_len)
        offsets = (np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)) * seq_len
        starts, lengths = np.repeat(starts, parts) + offsets, np.repeat(lengths, parts) - offsets
        lost = 0
    elif too_long is TooLong.drop:
        lost = int(lengths[is_long].sum())
        starts, lengths = starts[~is_long], lengths[~is_long]
    lengths = np.minimum(lengths, seq_len)
    trained = _num_trained(tokens.trained, starts, lengths)
    kept = trained > 0
    told = {TooLong.split: "split", TooLong.truncate: "truncated", TooLong.drop: "dropped"}[too_long]
    counts = LengthCounts(num_documents, num_tokens, lost_tokens=lost, untrained=int((~kept).sum()), **{told: num_long})
    return Pieces(starts[kept], lengths[kept], trained[kept], counts)


def _num_trained(trained: NDArray[np.bool_], starts: Numbers, lengths: Numbers) -> Numbers:
    """Trained tokens in each run, without its first token. Runs do not overlap and are in order. int64 [runs]"""
    found = np.zeros(len(starts), np.int64)
    longer = lengths > 1
    if longer.any():
        edges = np.stack([starts[longer] + 1, (starts + lengths)[longer]], axis=1).ravel()
        if edges[-1] == len(trained):
            edges = edges[:-1]  # the last run then ends where the array does
        found[longer] = np.add.reduceat(trained, edges, dtype=np.int64)[::2]
    return found
