"""Documents -> tokens: one flat array for all of them, with each document's length and which tokens are trained.

The tokenizers library encodes on all cores; what it found is made into arrays beside it, on this thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from horizon.data.documents import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_CHARS = 1 << 22  # encoded at once: some 100 bytes of scratch memory a token
_PIECE_CHARS = 1 << 16  # a longer text is encoded in pieces, on all cores
_UNCUT_CHARS = 1 << 22  # the same, where a tokenizer reads a piece otherwise than the same text inside another


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of documents one after another.

    ids: integers [tokens]; trained: bool [tokens]; lengths: int64 [documents], summing to the number of tokens;
    where: the place that each document comes from.
    """

    ids: NDArray[Any]
    trained: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    where: Sequence[str]

    @property
    def starts(self) -> NDArray[np.int64]:
        """Index of each document's first token. int64 [documents]"""
        return np.cumsum(self.lengths) - self.lengths

    def cut(self, fraction: float) -> Tokens:
        """A lone document as two, the second with `fraction` of the tokens; as it is where that leaves one without."""
        num_tail = int(len(self.ids) * fraction)
        if num_tail < 2:
            return self
        lengths = np.array([len(self.ids) - num_tail, num_tail])
        return replace(self, lengths=lengths, where=[self.where[0], f"{self.where[0]} (tail)"])


@dataclass(frozen=True, slots=True)
class _Piece:
    """What is encoded in one go: a document, or a part of a long text."""

    index: int  # of the document
    text: str
    spans: tuple[tuple[int, int], ...] | None
    is_first: bool
    is_last: bool


def encode(tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document], num_chars: int | None = None) -> Tokens:
    """Encode every document.

    A plain text begins as the tokenizer begins texts (some put a token in front) and ends with its end-of-text
    token, if it has one. A document with spans is encoded as it stands; tokens that begin in a span are trained.

    Args:
        num_chars: of all documents, for the progress bar.
    """
    head, tail = frame(tokenizer)
    ids: list[NDArray[np.int32]] = []
    trained: list[NDArray[np.bool_]] = []
    lengths: list[int] = []
    where: list[str] = []

    def noted() -> Iterator[Document]:
        for document in documents:
            lengths.append(0)
            where.append(document.where)
            yield document

    bar = tqdm(total=num_chars, desc="tokenizing", unit="char", unit_scale=True, delay=2, disable=None, leave=False)
    with bar:
        for batch, found in _encoded(tokenizer, _batches(_pieces(noted(), _piece_chars(tokenizer)))):
            for piece, (piece_ids, mask) in zip(batch, found, strict=True):
                before, after = (head, tail) if piece.spans is None else ((), ())
                framed = [*(before if piece.is_first else ()), *piece_ids, *(after if piece.is_last else ())]
                ids.append(np.array(framed, np.int32))
                trained.append(np.ones(len(framed), np.bool_) if mask is None else mask)
                lengths[piece.index] += len(framed)
            bar.update(sum(len(piece.text) for piece in batch))
    if not where:
        return Tokens(np.zeros(0, np.int32), np.zeros(0, np.bool_), np.zeros(0, np.int64), where)
    return Tokens(np.concatenate(ids), np.concatenate(trained), np.array(lengths, np.int64), where)


def frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokens to put before and after a text: what the tokenizer itself puts in front, and the end of text."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("a")["input_ids"]
    before = next((n for n in range(len(full)) if full[n : n + len(bare)] == bare), 0)
    return full[:before], [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


_Encoded = tuple[list[int], NDArray[np.bool_] | None]  # token ids, and which of them are trained (None: all)


def _encoded(
    tokenizer: PreTrainedTokenizerBase, batches: Iterator[list[_Piece]]
) -> Iterator[tuple[list[_Piece], Iterator[_Encoded]]]:
    """Every batch, encoded while the one before it is being looked at."""
    with ThreadPoolExecutor(1, thread_name_prefix="horizon-tokenize") as pool:
        waiting: list[tuple[list[_Piece], Future[list[Any]]]] = []
        for batch in batches:
            waiting.append((batch, pool.submit(_encode_batch, tokenizer, batch)))
            if len(waiting) > 1:
                done, future = waiting.pop(0)
                yield done, map(_read_encoding, done, future.result())
        for done, future in waiting:
            yield done, map(_read_encoding, done, future.result())


def _encode_batch(tokenizer: PreTrainedTokenizerBase, batch: list[_Piece]) -> list[Any]:
    """An encoding (with `ids` and `offsets`) of each piece; of a tokenizer in Python, its ids."""
    texts = [piece.text for piece in batch]
    if not tokenizer.is_fast:
        rows: list[Any] = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
        return rows
    backend: Any = tokenizer.backend_tokenizer
    has_spans = any(piece.spans is not None for piece in batch)
    run = backend.encode_batch if has_spans else backend.encode_batch_fast  # the latter counts no characters
    encodings: list[Any] = run(texts, add_special_tokens=False)
    return encodings


def _read_encoding(piece: _Piece, encoding: Any) -> _Encoded:
    if isinstance(encoding, list):
        return encoding, None
    return encoding.ids, None if piece.spans is None else _inside(encoding, piece)


def _inside(encoding: Any, piece: _Piece) -> NDArray[np.bool_]:
    """Whether each token begins inside one of the piece's spans. bool [tokens]"""
    mask = np.zeros(len(encoding.ids), np.bool_)
    for start, end in piece.spans or ():
        first, last = (_first_token(encoding, at, len(piece.text)) for at in (start, end))
        mask[first:last] = True
    return mask


def _first_token(encoding: Any, at: int, num_chars: int) -> int:
    """The first token that begins at character `at` or later. Asking is much cheaper than a list of all offsets."""
    while at < num_chars:
        token: int | None = encoding.char_to_token(at)
        if token is not None:
            return token if encoding.token_to_chars(token)[0] >= at else token + 1
        at += 1  # a character that no token holds
    return len(encoding.ids)


def _piece_chars(tokenizer: PreTrainedTokenizerBase) -> int:
    """Characters of a piece: few where a cut after a line's end changes no token."""

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    lines = ("Two lines.\n", "the  other\n", "(1)\n")
    return _PIECE_CHARS if ids("".join(lines)) == [token for line in lines for token in ids(line)] else _UNCUT_CHARS


def _pieces(documents: Iterable[Document], max_chars: int) -> Iterator[_Piece]:
    for index, document in enumerate(documents):
        text, start = document.text, 0
        while document.spans is None and len(text) - start > max_chars:
            end = _cut(text, start, start + max_chars)
            yield _Piece(index, text[start:end], None, start == 0, False)
            start = end
        yield _Piece(index, text[start:], document.spans, start == 0, True)


def _cut(text: str, start: int, limit: int) -> int:
    """Where to cut: after a line's end that no blank follows, for tokens may hold several blanks; else before one."""
    end = limit
    while (end := text.rfind("\n", start, end)) > start:
        if not text[end + 1].isspace():
            return end + 1
    blank = text.rfind(" ", start + 1, limit)
    return blank if blank > 0 else limit


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
