"""From settings to rows: the one entry point of the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from horizon.config.schema import DataConfig, HorizonConfig
from horizon.data.cache import Tokenized
from horizon.data.checks import check_data_settings, check_train_on
from horizon.data.documents import decode_text, read_bytes
from horizon.data.encoding import Tokens
from horizon.data.pieces import LengthCounts, Pieces, cut
from horizon.data.reading import Reader, choose_held_out
from horizon.data.rows import Rows, Source, join, pack, pad
from horizon.data.sources import OpenSource, open_sources, open_validation
from horizon.data.tokenizer import given_tokenizer
from horizon.errors import DataError
from horizon.models.source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class SourceReport:
    """What was found in a source, and what became of it."""

    source: OpenSource
    tokenized: Tokenized
    train: Pieces
    validation: Pieces  # of the documents that are held out
    num_read: int  # documents; a lone one is divided into two afterwards


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
        from horizon.models.hf_config import load_config  # here: this package is of use without transformers

        vocab_limit = load_config(source.folder, trust).get_text_config().vocab_size
    return load_data(
        config.data,
        seq_len=config.train.seq_len,
        seed=config.seed,
        model_folder=None if source is None else source.tokenizer_folder,
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
    reader = Reader(data, seed)
    if tokenizer is None:
        tokenizer = reader.trained_tokenizer(sources)
    if data.chat_template is not None:
        path = Path(data.chat_template).expanduser()
        tokenizer.chat_template = decode_text(read_bytes(path), f"data.chat_template={path}")
    maker = _RowMaker(data, seq_len, seed, tokenizer, vocab_limit)
    reports = [maker.report(source, reader.tokenized(source, tokenizer)) for source in sources]
    train = maker.rows([(report, report.train) for report in reports])
    _check_trained(reports, seq_len)
    scored = reports
    if validation is not None:
        scored = [maker.report(validation, reader.tokenized(validation, tokenizer), all_held_out=True)]
    held_out = maker.rows([(report, report.validation) for report in scored]).spread()  # a run may score only some
    if validation is not None and not len(held_out):
        raise DataError(f"data.validation_path={data.validation_path}: no token has a label, nothing to score")
    named, limit = len(sources) > 1, data.max_bytes
    lines = [*(_source_line(report, named, limit) for report in reports), f"tokenizer of {len(tokenizer)} entries"]
    summary = (
        f"{'; '.join(lines)}\ntrain: {_count_line([report.train for report in reports], train)}\n"
        f"validation: {_count_line([report.validation for report in scored], held_out)}"
    )
    return TextData(tokenizer, train, held_out if len(held_out) else None, summary, tuple(reports))


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
            hidden = choose_held_out(len(tokens.lengths), fraction, self._seed)
        train, validation = (cut(tokens, side, self._seq_len, self._data.too_long) for side in (~hidden, hidden))
        return SourceReport(source, replace(made, tokens=tokens), train, validation, len(made.tokens.lengths))

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


def _check_trained(reports: Sequence[SourceReport], seq_len: int) -> None:
    """Refuse sources of which no token would be trained, all of them or one that has a weight."""
    without = [report.source for report in reports if not len(report.train.starts)]
    if len(without) == len(reports) or any(source.weight is not None for source in without):
        raise DataError(
            f"{'; '.join(source.description for source in without)}: nothing to train on, no token of "
            f"train.seq_len={seq_len} rows has a label"
        )


def _source_line(report: SourceReport, named: bool, max_bytes: int | None) -> str:
    made, source = report.tokenized, report.source
    name = f"{source.name}: " if named else ""
    reused = " (tokenized before)" if made.reused else ""
    skipped = f", {made.num_skipped:,} records left out, the first: {made.first_skipped}" if made.num_skipped else ""
    what = f", the first {report.num_read:,} records, up to data.max_bytes={max_bytes}" if source.is_streamed else ""
    return f"{name}{source.description}{what}{reused}{skipped}"


def _count_line(sides: Sequence[Pieces], rows: Rows) -> str:
    """Documents, tokens and rows of some sources, and what was lost on the way."""
    counts = sum((pieces.counts for pieces in sides), LengthCounts())
    if not len(rows):
        return "none (no token of them has a label)" if counts.documents else "none (nothing is held out)"
    num_tokens = int(rows.num_tokens.sum())
    padding = 1 - num_tokens / (len(rows) * rows.seq_len)
    said = f"; {counts}" if str(counts) else ""
    return (
        f"{counts.documents:,} documents, {num_tokens:,} tokens ({rows.num_trained.sum():,} trained) "
        f"in {len(rows):,} rows of {rows.seq_len}, {padding:.1%} padding{said}"
    )
