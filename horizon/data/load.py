"""From settings to rows: the one entry point of the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from horizon.config.schema import DataConfig, DataFormat
from horizon.data import chat, documents
from horizon.data.documents import Document
from horizon.data.encoding import Tokens, encode
from horizon.data.rows import Rows, pack, pad
from horizon.data.tokenizer import given_tokenizer, train_tokenizer
from horizon.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class TextData:
    """What a run trains on."""

    tokenizer: PreTrainedTokenizerBase
    train: Rows
    validation: Rows | None  # None: nothing was held out; the summary says why
    summary: str  # a few lines for people: source, tokenizer, documents, tokens, rows


@dataclass(frozen=True, slots=True)
class _Corpus:
    train: list[Document]
    validation: list[Document]
    source: str


def load_data(
    data: DataConfig,
    *,
    seq_len: int,
    seed: int,
    model_folder: Path | None = None,
    vocab_limit: int | None = None,
    trust_remote_code: bool = False,
) -> TextData:
    """Read, tokenize and cut the text that `data` names into rows of `seq_len` tokens.

    `model_folder` may hold a tokenizer; `vocab_limit` is the model's vocabulary (None: the model is made to fit).

    Raises:
        ConfigError: a setting has a value that cannot work.
        DataError: text or tokenizer is missing, empty, malformed, or does not suit the model.
    """
    _check_settings(data, seq_len)
    tokenizer = given_tokenizer(data.tokenizer, model_folder, trust_remote_code=trust_remote_code)
    if tokenizer is None and vocab_limit is not None and data.vocab_size > vocab_limit:
        raise DataError(
            f"data.vocab_size={data.vocab_size} exceeds the model's vocabulary of {vocab_limit}; "
            f"set data.vocab_size={vocab_limit} or less"
        )
    corpus = _read_corpus(data, seed, tokenizer)
    if tokenizer is None:
        tokenizer = train_tokenizer([document.text for document in corpus.train], data.vocab_size, seed)
    train, train_line = _make_rows(data, tokenizer, corpus.train, seq_len, vocab_limit)
    if not len(train):
        raise DataError(f"{corpus.source}: nothing to train on, no token of train.seq_len={seq_len} rows has a label")
    validation, line = _make_validation(data, tokenizer, corpus.validation, seq_len, vocab_limit)
    summary = f"{corpus.source}; tokenizer of {len(tokenizer)} entries\ntrain: {train_line}\nvalidation: {line}"
    return TextData(tokenizer, train, validation, summary)


def _check_settings(data: DataConfig, seq_len: int) -> None:
    if seq_len < 2:
        raise ConfigError(f"train.seq_len={seq_len} must be at least 2: the first token of a row predicts the second")
    if not 0 <= data.validation_fraction < 1:
        raise ConfigError(f"data.validation_fraction={data.validation_fraction} must be at least 0 and below 1")
    if data.max_bytes is not None and data.max_bytes < 1:
        raise ConfigError(f"data.max_bytes={data.max_bytes} must be positive, or null for no limit")
    if data.format is DataFormat.python_stdlib:
        if data.path is not None:
            raise ConfigError(f"data.path={data.path} is not read by data.format=python_stdlib; set data.format=text")
    elif data.path is None:
        raise ConfigError(f"data.format={data.format} needs data.path, a file or a folder")


def _read_corpus(data: DataConfig, seed: int, tokenizer: PreTrainedTokenizerBase | None) -> _Corpus:
    if data.format is DataFormat.messages:
        return _read_chats(data, seed, tokenizer)
    if data.format is DataFormat.python_stdlib:
        root = documents.stdlib_folder()
        files, source = documents.list_stdlib(root), f"standard library sources in {root}"
    else:
        assert data.path is not None
        files, source = documents.list_files(data.path, "data.path"), f"text in {data.path}"
    train = documents.read_documents(files, data.max_bytes, seed)
    if data.validation_path is None:
        return _Corpus(*documents.split_documents(train, data.validation_fraction, seed), source)
    held_out = documents.list_files(data.validation_path, "data.validation_path")
    return _Corpus(train, documents.read_documents(held_out, data.max_bytes, seed), source)


def _read_chats(data: DataConfig, seed: int, tokenizer: PreTrainedTokenizerBase | None) -> _Corpus:
    assert data.path is not None
    if tokenizer is None:
        raise DataError(
            "data.format=messages needs a tokenizer with a chat template, and the model's folder has no tokenizer; "
            "set data.tokenizer to a tokenizer's folder"
        )
    renderer = chat.ChatRenderer(tokenizer)
    train = chat.read_conversations(documents.list_files(data.path, "data.path", ".jsonl"), data.max_bytes, seed)
    if data.validation_path is None:
        train, held_out = documents.split_items(train, data.validation_fraction, seed)
    else:
        files = documents.list_files(data.validation_path, "data.validation_path", ".jsonl")
        held_out = chat.read_conversations(files, data.max_bytes, seed)
    rendered, rendered_held_out = ([renderer.render(item) for item in part] for part in (train, held_out))
    return _Corpus(rendered, rendered_held_out, f"messages in {data.path}")


def _make_validation(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Document],
    seq_len: int,
    vocab_limit: int | None,
) -> tuple[Rows | None, str]:
    """(rows or None, one line that counts them or says why there are none)."""
    if not items:
        return None, f"none (data.validation_fraction={data.validation_fraction} of the text holds nothing)"
    rows, line = _make_rows(data, tokenizer, items, seq_len, vocab_limit)
    if len(rows):
        return rows, line
    if data.validation_path is not None:
        raise DataError(f"data.validation_path={data.validation_path}: no token has a label, nothing to score")
    return None, "none (no token of the held-out text has a label)"


def _make_rows(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Document],
    seq_len: int,
    vocab_limit: int | None,
) -> tuple[Rows, str]:
    """(rows that have something to train on, one line that counts them)."""
    tokens = encode(tokenizer, items)
    if vocab_limit is not None:
        _check_vocabulary(tokenizer, tokens, items, vocab_limit)
    pad_ids = [n for n in (tokenizer.pad_token_id, tokenizer.eos_token_id) if n is not None]
    pad_id = next((n for n in pad_ids if vocab_limit is None or n < vocab_limit), 0)
    rows = (pack if data.packing else pad)(tokens, seq_len, pad_id)
    rows = rows.select(rows.num_trained > 0)
    line = (
        f"{len(items):,} documents, {rows.num_tokens.sum():,} tokens ({rows.num_trained.sum():,} trained) "
        f"in {len(rows):,} rows of {seq_len}"
    )
    return rows, line


def _check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, tokens: Tokens, items: Sequence[Document], vocab_limit: int
) -> None:
    beyond = np.flatnonzero(tokens.ids >= vocab_limit)
    if len(beyond):
        where = items[int(np.searchsorted(tokens.starts, beyond[0], side="right")) - 1].where
        token_id = int(tokens.ids[beyond[0]])
        raise DataError(
            f"{where}: token {token_id} ({tokenizer.convert_ids_to_tokens(token_id)!r}) is outside the model's "
            f"vocabulary of {vocab_limit}; set data.tokenizer to the model's own, or lower data.vocab_size"
        )
