"""From settings to rows: the one entry point of the package."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from horizon.config.schema import DataConfig, DataFormat, HorizonConfig
from horizon.data.cache import TokenCache, Tokenized, cache_folder, tokenizer_hash
from horizon.data.chat import INSTRUCTIONS, ChatRenderer
from horizon.data.checks import check_data_settings, check_train_on
from horizon.data.documents import Document, decode_text, read_bytes
from horizon.data.encoding import Tokens, encode, frame
from horizon.data.pieces import LengthCounts, Pieces, cut
from horizon.data.rows import Rows, Source, join, pack, pad
from horizon.data.samples import CONVERSATIONS, Sample
from horizon.data.skipping import BadRecords
from horizon.data.sources import OpenSource, open_sources, open_validation
from horizon.data.tokenizer import given_tokenizer, train_tokenizer
from horizon.errors import DataError
from horizon.models.hf_config import load_config
from horizon.models.skeleton import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class SourceReport:
    """What was found in a source, and what became of it."""

    source: OpenSource
    tokenized: Tokenized
    train: Pieces
    validation: Pieces  # of the documents that are held out


@dataclass(frozen=True, slots=True)
class TextData:
    """What a run trains on."""

    tokenizer: PreTrainedTokenizerBase
    train: Rows
    validation: Rows | None  # None: nothing was held out; the summary says why
    summary: str  # a few lines for people: source, tokenizer, documents, tokens, rows
    reports: tuple[SourceReport, ...] = ()  # of the sources that are trained on


def load_run_data(config: HorizonConfig, source: ModelSource | None) -> TextData:
    """The data of a run whose model is `source`, or (None) made from `config.model.config`.

    Raises:
        ConfigError, DataError: see `load_data`.
    """
    trust = config.model.trust_remote_code
    vocab_limit = config.model.config.get("vocab_size")
    if source is not None:
        vocab_limit = load_config(source.folder, trust).get_text_config().vocab_size
    return load_data(
        config.data,
        seq_len=config.train.seq_len,
        seed=config.seed,
        model_folder=None if source is None else source.folder,
        vocab_limit=vocab_limit,
        trust_remote_code=trust,
    )


def load_data(
    data: DataConfig,
    *,
    seq_len: int,
    seed: int,
    model_folder: Path | None = None,
    vocab_limit: int | None = None,
    trust_remote_code: bool = False,
) -> TextData:
    """Read, tokenize and cut what `data` names into rows of `seq_len` tokens.

    `model_folder` may hold a tokenizer; `vocab_limit` is the model's vocabulary (None: the model is made to fit).

    Raises:
        ConfigError: a setting has a value that cannot work.
        DataError: text or tokenizer is missing, empty, malformed, or does not suit the model.
    """
    check_data_settings(data, seq_len)
    tokenizer = given_tokenizer(data.tokenizer, model_folder, trust_remote_code=trust_remote_code)
    if tokenizer is None and vocab_limit is not None and data.vocab_size > vocab_limit:
        raise DataError(
            f"data.vocab_size={data.vocab_size} exceeds the model's vocabulary of {vocab_limit}; "
            f"set data.vocab_size={vocab_limit} or less"
        )
    sources = open_sources(data)
    validation = None if data.validation_path is None else open_validation(data)
    check_train_on(data, [source.kind for source in sources])
    reader = _Reader(data, seed)
    if tokenizer is None:
        tokenizer = reader.trained_tokenizer(sources)
    if data.chat_template is not None:
        path = Path(data.chat_template).expanduser()
        tokenizer.chat_template = decode_text(read_bytes(path), f"data.chat_template={path}")
    maker = _RowMaker(data, seq_len, seed, tokenizer, vocab_limit)
    reports = [maker.report(source, reader.tokenized(source, tokenizer)) for source in sources]
    train = maker.rows([(report, report.train) for report in reports])
    if not len(train):
        raise DataError(
            f"{'; '.join(source.description for source in sources)}: nothing to train on, no token of "
            f"train.seq_len={seq_len} rows has a label"
        )
    if validation is None:
        scored, line = reports, f"none (data.validation_fraction={data.validation_fraction} of the text holds nothing)"
    else:
        found = maker.report(validation, reader.tokenized(validation, tokenizer), all_held_out=True)
        scored, line = [found], ""
    held_out = maker.rows([(report, report.validation) for report in scored])
    if len(held_out):
        line = _count_line(sum((report.validation.counts for report in scored), LengthCounts()), held_out)
    elif validation is not None:
        raise DataError(f"data.validation_path={data.validation_path}: no token has a label, nothing to score")
    elif any(report.validation.counts.documents for report in reports):
        line = "none (no token of the held-out text has a label)"
    lines = [*(_source_line(report, len(sources) > 1) for report in reports), f"tokenizer of {len(tokenizer)} entries"]
    counts = sum((report.train.counts for report in reports), LengthCounts())
    summary = f"{'; '.join(lines)}\ntrain: {_count_line(counts, train)}\nvalidation: {line}"
    return TextData(tokenizer, train, held_out if len(held_out) else None, summary, tuple(reports))


class _Reader:
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
            "max_bytes": 0 if data.max_bytes is None else [data.max_bytes, data.streaming or self._seed],
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
        return source.samples(bad, self._data.max_bytes, self._seed, head=self._data.streaming), bad


def _seen_texts(found: Sequence[Document], data: DataConfig, seed: int) -> list[str]:
    """What is not held out; of a lone text, the beginning."""
    fraction = 0.0 if data.validation_path is not None else data.validation_fraction
    if len(found) == 1:
        text = found[0].text
        return [text[: len(text) - int(len(text) * fraction)]]
    hidden = held_out(len(found), fraction, seed)
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


def held_out(num_documents: int, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which documents are kept for validation, by seed; at least one on each side when there are two to divide."""
    hidden = np.zeros(num_documents, np.bool_)
    if fraction > 0 and num_documents > 1:
        num_hidden = min(max(1, round(num_documents * fraction)), num_documents - 1)
        hidden[np.random.default_rng(seed).permutation(num_documents)[:num_hidden]] = True
    return hidden


class _RowMaker:
    """Makes rows of tokens."""

    def __init__(
        self, data: DataConfig, seq_len: int, seed: int, tokenizer: PreTrainedTokenizerBase, vocab_limit: int | None
    ) -> None:
        self._data, self._seq_len, self._seed = data, seq_len, seed
        self._tokenizer, self._vocab_limit = tokenizer, vocab_limit
        pad_ids = [n for n in (tokenizer.pad_token_id, tokenizer.eos_token_id) if n is not None]
        self._pad_id = next((n for n in pad_ids if vocab_limit is None or n < vocab_limit), 0)

    def report(self, source: OpenSource, made: Tokenized, *, all_held_out: bool = False) -> SourceReport:
        """Divide a source into what is trained on and what is held out, and count what its lengths lead to.

        Raises:
            DataError: a token is outside the model's vocabulary.
        """
        fraction = self._data.validation_fraction if self._data.validation_path is None else 0.0
        tokens = made.tokens
        self._check_vocabulary(tokens)
        if all_held_out:
            hidden = np.ones(len(tokens.lengths), np.bool_)
        elif len(tokens.lengths) == 1:
            tokens = tokens.cut(fraction)
            hidden = np.arange(len(tokens.lengths)) > 0
        else:
            hidden = held_out(len(tokens.lengths), fraction, self._seed)
        train, validation = (cut(tokens, side, self._seq_len, self._data.too_long) for side in (~hidden, hidden))
        return SourceReport(source, replace(made, tokens=tokens), train, validation)

    def rows(self, chosen: Sequence[tuple[SourceReport, Pieces]]) -> Rows:
        """The rows of these pieces of each source."""
        lay = pack if self._data.packing else pad
        parts = []
        for report, pieces in chosen:
            source = Source(report.source.name, report.tokenized.tokens, report.source.weight)
            parts.append(lay(source, pieces, self._seq_len, self._pad_id))
        return join(parts)

    def _check_vocabulary(self, tokens: Tokens) -> None:
        limit = self._vocab_limit
        if limit is None or not len(tokens.ids) or int(tokens.ids.max()) < limit:
            return
        beyond = int(np.argmax(tokens.ids >= limit))
        where = tokens.where[int(np.searchsorted(tokens.starts, beyond, side="right")) - 1]
        token_id = int(tokens.ids[beyond])
        name: Any = self._tokenizer.convert_ids_to_tokens(token_id) if token_id < len(self._tokenizer) else None
        raise DataError(
            f"{where}: token {token_id} ({name!r}) is outside the model's vocabulary of {limit}; "
            "set data.tokenizer to the model's own, or lower data.vocab_size"
        )


def _source_line(report: SourceReport, named: bool) -> str:
    made, source = report.tokenized, report.source
    name = f"{source.name}: " if named else ""
    reused = " (tokenized before)" if made.reused else ""
    skipped = f", {made.num_skipped:,} records left out, the first: {made.first_skipped}" if made.num_skipped else ""
    return f"{name}{source.description}{reused}{skipped}"


def _count_line(counts: LengthCounts, rows: Rows) -> str:
    """Documents, tokens and rows, and what was lost on the way."""
    num_tokens = int(rows.num_tokens.sum())
    padding = 1 - num_tokens / (len(rows) * rows.seq_len)
    said = f"; {counts}" if str(counts) else ""
    return (
        f"{counts.documents:,} documents, {num_tokens:,} tokens ({rows.num_trained.sum():,} trained) "
        f"in {len(rows):,} rows of {rows.seq_len}, {padding:.1%} padding{said}"
    )
