"""Rows: tokens cut into fixed lengths, ready to be batched.

Packed, documents follow one another and a long one goes on in the next row, as a document of its own:

    row 0        | a a a a a b b b |     position_ids  0 1 2 3 4 0 1 2
    row 1        | b b c c c c . . |                   0 1 0 1 2 3 0 1     . is padding

Nothing is predicted across documents: the first token of each has no label, and neither has padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from horizon.data.encoding import Tokens

IGNORED = -100  # label of a token that is not trained


@dataclass(frozen=True, slots=True)
class Rows:
    """input_ids, labels (not shifted): int32 [rows, seq_len]; position_ids: the same when packed, else None.

    num_tokens: int64 [rows], real tokens in each row. They come first; padding follows.
    sources: str [rows], the name of what each row comes from; None: all of one source.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    position_ids: NDArray[np.int32] | None
    num_tokens: NDArray[np.int64]
    sources: NDArray[np.str_] | None = None

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.input_ids)

    @property
    def num_trained(self) -> NDArray[np.int64]:
        """Tokens with a label in each row. int64 [rows]"""
        counts: NDArray[np.int64] = np.sum(self.labels != IGNORED, axis=1, dtype=np.int64)
        return counts

    def fingerprint(self) -> str:
        """A hash of all rows, in hexadecimal digits: the same for the same tokens, labels and positions only."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.input_ids, self.labels, self.position_ids, self.num_tokens):
            if array is not None:
                digest.update(f"{array.dtype.str}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def select(self, chosen: NDArray[np.bool_]) -> Rows:
        """Only the rows where `chosen` (bool [rows]) is true."""
        positions = None if self.position_ids is None else self.position_ids[chosen]
        sources = None if self.sources is None else self.sources[chosen]
        return Rows(self.input_ids[chosen], self.labels[chosen], positions, self.num_tokens[chosen], sources)

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """The rows at `indices` as int64 tensors [rows, seq_len], named as transformers names them.

        Packed rows carry `position_ids`; others carry an `attention_mask` unless every token is real.
        """
        chosen = np.asarray(indices, np.int64)
        arrays = {"input_ids": self.input_ids[chosen], "labels": self.labels[chosen]}
        if self.position_ids is not None:
            arrays["position_ids"] = self.position_ids[chosen]
        else:
            seq_len = self.input_ids.shape[1]
            is_real = np.arange(seq_len) < self.num_tokens[chosen, None]
            if not is_real.all():
                arrays["attention_mask"] = is_real.astype(np.int32)
        return {name: torch.from_numpy(array).long() for name, array in arrays.items()}


def pack(tokens: Tokens, seq_len: int, pad_id: int) -> Rows:
    """Documents one after another in rows of `seq_len`; what is left of the last row is filled with `pad_id`."""
    num_tokens = len(tokens.ids)
    num_rows = -(-num_tokens // seq_len)
    size = num_rows * seq_len
    starts = np.zeros(size, np.bool_)
    starts[tokens.starts[tokens.starts < num_tokens]] = True
    starts[::seq_len] = True
    starts[num_tokens : num_tokens + 1] = True
    index = np.arange(size, dtype=np.int64)
    positions = index - np.maximum.accumulate(np.where(starts, index, 0))
    input_ids = np.full(size, pad_id, np.int32)
    input_ids[:num_tokens] = tokens.ids
    trained = ~starts
    trained[:num_tokens] &= tokens.trained
    trained[num_tokens:] = False
    shape = (num_rows, seq_len)
    return Rows(
        input_ids=input_ids.reshape(shape),
        labels=np.where(trained, input_ids, np.int32(IGNORED)).reshape(shape),
        position_ids=positions.astype(np.int32).reshape(shape),
        num_tokens=np.clip(num_tokens - np.arange(num_rows, dtype=np.int64) * seq_len, 0, seq_len),
    )


def pad(tokens: Tokens, seq_len: int, pad_id: int) -> Rows:
    """One document to a row, cut at `seq_len` or filled up with `pad_id`."""
    num_tokens = np.minimum(tokens.lengths, seq_len)
    is_real = np.arange(seq_len) < num_tokens[:, None]
    source = (tokens.starts[:, None] + np.arange(seq_len))[is_real]
    input_ids = np.full(is_real.shape, pad_id, np.int32)
    input_ids[is_real] = tokens.ids[source]
    trained = np.zeros(is_real.shape, np.bool_)
    trained[is_real] = tokens.trained[source]
    trained[:, 0] = False
    return Rows(input_ids, np.where(trained, input_ids, np.int32(IGNORED)), None, num_tokens)
