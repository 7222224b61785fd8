"""Sources -> tokens: read, rendered where they are conversations, encoded, and kept for the next run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from horizon.config.schema import DataConfig, DataFormat
from horizon.data.cache import TokenCache, Tokenized, cache_folder, tokenizer_hash
from horizon.data.chat import INSTRUCTIONS, ChatRenderer
from horizon.data.documents import Document
from horizon.data.encoding import encode, frame
from horizon.data.samples import CONVERSATIONS, Sample
from horizon.data.skipping import BadRecords
from horizon.data.sources import OpenSource
from horizon.data.tokenizer import train_tokenizer
from horizon.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Reader:
    """Reads sources into tokens, by way of the cache."""

    def __init__(self, data: DataConfig, seed: int) -> None:
        self._data, self._seed = data, seed
        self._cache = TokenCache(cache_folder(data.cache))
        self._read: dict[str, tuple[list[Sample], BadRecords]] = {}  # what a tokenizer was trained on, by source

    def trained_tokenizer(self, sources: Sequence[OpenSource]) -> PreTrainedTokenizerBase:
        """One trained on the texts, but for those that are held out."""
        texts = []
        for source in sources:
            if source.kind is DataFormat.tokens or source.kind in CONVERSATIONS:
                what = "a chat template" if source.kind in CONVERSATIONS else "the entries that its ids mean"
                raise DataError(
                    f"data.format={source.kind} needs a tokenizer with {what}, and the model's folder has no "
                    "tokenizer; set data.tokenizer to a tokenizer's folder"
                )
            samples, _ = self._read[source.name] = self._samples(source)
            texts += _seen_texts([s for s in samples if isinstance(s, Document)], self._data, self._seed)
        return train_tokenizer(texts, self._data.vocab_size, self._seed)

    def tokenized(self, source: OpenSource, tokenizer: PreTrainedTokenizerBase) -> Tokenized:
        """The tokens of a source."""
        data = self._data
        if source.kind is DataFormat.tokens:
            return Tokenized(source.tokens())
        facts = {
            "content": source.content,
            "kind": source.kind,
            "fields": asdict(source.fields),
            "tokenizer": tokenizer_hash(tokenizer),
            "train_on": data.train_on,
            "on_error": data.on_error,
            "max_bytes": 0 if data.max_bytes is None else [data.max_bytes, source.is_streamed or self._seed],
        }
        return self._cache.get(facts, lambda: self._encoded(source, tokenizer))

    def _encoded(self, source: OpenSource, tokenizer: PreTrainedTokenizerBase) -> Tokenized:
        samples, bad = self._read.pop(source.name) if source.name in self._read else self._samples(source)
        if source.kind in CONVERSATIONS:
            tokens = encode(tokenizer, _rendered(samples, _renderer(source, tokenizer, self._data), bad))
        else:
            texts = [sample for sample in samples if isinstance(sample, Document)]
            tokens = encode(tokenizer, texts, sum(len(document.text) for document in texts))
        if not len(tokens.lengths):
            raise DataError(f"{source.description}: all {bad.count} records were left out, the first: {bad.first}")
        return Tokenized(tokens, bad.count, bad.first)

    def _samples(self, source: OpenSource) -> tuple[list[Sample], BadRecords]:
        bad = BadRecords(self._data.on_error)
        return source.samples(bad, self._data.max_bytes, self._seed), bad


def _seen_texts(found: Sequence[Document], data: DataConfig, seed: int) -> list[str]:
    """What is not held out; of a lone text, the beginning."""
    fraction = 0.0 if data.validation_path is not None else data.validation_fraction
    if len(found) == 1:
        text = found[0].text
        return [text[: len(text) - int(len(text) * fraction)]]
    hidden = choose_held_out(len(found), fraction, seed)
    return [document.text for document, hide in zip(found, hidden, strict=True) if not hide]


def _renderer(source: OpenSource, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> ChatRenderer:
    if source.kind is DataFormat.instruction and not tokenizer.chat_template:
        begin = "{{ bos_token }}" if frame(tokenizer)[0] and tokenizer.bos_token else ""
        return ChatRenderer(tokenizer, data.train_on, template=begin + INSTRUCTIONS)
    return ChatRenderer(tokenizer, data.train_on)


def _rendered(samples: Sequence[Sample], renderer: ChatRenderer, bad: BadRecords) -> Iterator[Document]:
    for sample in samples:
        assert not isinstance(sample, Document)
        try:
            document = renderer.render(sample)
        except DataError as error:
            bad.note(error)
            continue
        yield document


def choose_held_out(num_documents: int, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which documents are kept for validation, by seed; at least one on each side when there are two to divide."""
    hidden = np.zeros(num_documents, np.bool_)
    if fraction > 0 and num_documents > 1:
        num_hidden = min(max(1, round(num_documents * fraction)), num_documents - 1)
        hidden[np.random.default_rng(seed).permutation(num_documents)[:num_hidden]] = True
    return hidden
