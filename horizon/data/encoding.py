"""Documents -> tokens: one flat array for all of them, with each document's length and which tokens are trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from horizon.data.documents import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_CHARS = 1 << 20  # encoded at once: some 100 bytes of scratch memory a token
_PIECE_CHARS = 1 << 22  # a longer text is encoded in pieces, or its scratch memory would outgrow the host


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of documents one after another.

    ids: int32 [tokens]; trained: bool [tokens]; lengths: int64 [documents], summing to the number of tokens.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    lengths: NDArray[np.int64]

    @property
    def starts(self) -> NDArray[np.int64]:
        """Index of each document's first token. int64 [documents]"""
        return np.cumsum(self.lengths) - self.lengths


@dataclass(frozen=True, slots=True)
class _Piece:
    """What is encoded in one go: a document, or a part of a very long text."""

    index: int  # of the document
    text: str
    spans: tuple[tuple[int, int], ...] | None
    is_first: bool
    is_last: bool


def encode(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]) -> Tokens:
    """Encode every document.

    A plain text begins as the tokenizer begins texts (some put a token in front) and ends with its end-of-text
    token, if it has one. A document with spans is encoded as it stands; tokens that begin in a span are trained.
    """
    head, tail = _frame(tokenizer)
    ids: list[NDArray[np.int32]] = []
    trained: list[NDArray[np.bool_]] = []
    lengths = np.zeros(len(documents), np.int64)
    num_chars = sum(len(document.text) for document in documents)
    bar = tqdm(total=num_chars, desc="tokenizing", unit="char", unit_scale=True, delay=2, disable=None, leave=False)
    with bar:
        for batch in _batches(_pieces(documents)):
            for piece, piece_ids, mask in _encode_batch(tokenizer, batch):
                before, after = (head, tail) if piece.spans is None else ((), ())
                framed = [*(before if piece.is_first else ()), *piece_ids, *(after if piece.is_last else ())]
                ids.append(np.array(framed, np.int32))
                trained.append(np.ones(len(framed), np.bool_) if mask is None else mask)
                lengths[piece.index] += len(framed)
                bar.update(len(piece.text))
    return Tokens(np.concatenate(ids), np.concatenate(trained), lengths)


def _encode_batch(
    tokenizer: PreTrainedTokenizerBase, batch: list[_Piece]
) -> Iterable[tuple[_Piece, list[int], NDArray[np.bool_] | None]]:
    """(piece, its token ids, which of them are trained; None: all) for every piece."""
    has_spans = any(piece.spans is not None for piece in batch)
    encoded = tokenizer(
        [piece.text for piece in batch],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
        **({"return_offsets_mapping": True} if has_spans else {}),
    )
    for row, piece in enumerate(batch):
        mask = None if piece.spans is None else _inside(encoded["offset_mapping"][row], piece.spans)
        yield piece, encoded["input_ids"][row], mask


def _inside(offsets: list[tuple[int, int]], spans: tuple[tuple[int, int], ...]) -> NDArray[np.bool_]:
    """Whether each token, given as its (first, last + 1) character, begins inside one of the spans. bool [tokens]"""
    begins = np.array(offsets, np.int64).reshape(-1, 2)[:, 0]
    edges = np.array(spans, np.int64).reshape(-1)  # begin, end, begin, end, ...
    mask: NDArray[np.bool_] = np.searchsorted(edges, begins, side="right") % 2 == 1
    return mask


def _pieces(documents: Sequence[Document]) -> Iterator[_Piece]:
    for index, document in enumerate(documents):
        text, start = document.text, 0
        while document.spans is None and len(text) - start > _PIECE_CHARS:
            end = text.rfind("\n", start, start + _PIECE_CHARS) + 1 or start + _PIECE_CHARS
            yield _Piece(index, text[start:end], None, start == 0, False)
            start = end
        yield _Piece(index, text[start:], document.spans, start == 0, True)


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    num_chars = 0
    for piece in pieces:
        batch.append(piece)
        num_chars += len(piece.text)
        if num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokens to put before and after a text: what the tokenizer itself puts in front, and the end of text."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("a")["input_ids"]
    before = next((n for n in range(len(full)) if full[n : n + len(bare)] == bare), 0)
    return full[:before], [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
