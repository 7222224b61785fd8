"""What a run would see of its data, as text: samples with the trained tokens marked, lengths, losses and epochs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from horizon.config.schema import HorizonConfig
from horizon.data.load import SourceReport, TextData
from horizon.data.loader import row_quotas
from horizon.data.rows import Rows

BEGIN, END = "\N{LEFT-POINTING DOUBLE ANGLE QUOTATION MARK}", "\N{RIGHT-POINTING DOUBLE ANGLE QUOTATION MARK}"
_BAR = 40  # characters of the longest bar


def preview(data: TextData, config: HorizonConfig, num_samples: int, max_chars: int) -> str:
    """The whole preview; samples are cut to `max_chars` characters each."""
    parts = [data.summary]
    parts += [f"\n{title}" for title in _samples(data, num_samples, max_chars)]
    for report in data.reports:
        parts.append(f"\nlengths of {report.source.name} in tokens\n{histogram(report.tokenized.tokens.lengths)}")
    parts.append("\n" + "\n".join(_counts(report) for report in data.reports))
    parts.append("\n" + "\n".join(_epochs(data.train, config)))
    return "\n".join(parts)


def _samples(data: TextData, num_samples: int, max_chars: int) -> Iterator[str]:
    """The first pieces of each source that are trained on."""
    for report in data.reports:
        tokens, pieces = report.tokenized.tokens, report.train
        for piece in range(min(num_samples, len(pieces.starts))):
            first = int(pieces.starts[piece])
            end = first + int(pieces.lengths[piece])
            trained = np.array(tokens.trained[first:end])
            trained[0] = False
            where = tokens.where[int(np.searchsorted(tokens.starts, first, side="right")) - 1]
            text = marked(data, np.asarray(tokens.ids[first:end]), trained)
            cut = text if len(text) <= max_chars else f"{text[:max_chars]} [...]"
            yield f"{where}, {end - first:,} tokens, {int(trained.sum()):,} trained, between {BEGIN} and {END}\n{cut}"


def marked(data: TextData, ids: NDArray[np.int64], trained: NDArray[np.bool_]) -> str:
    """The text of some tokens, with every run of trained ones between marks."""
    edges = [0, *(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), len(ids)]
    parts = []
    for start, end in pairwise(edges):
        text = str(data.tokenizer.decode(ids[start:end].tolist()))
        parts.append(f"{BEGIN}{text}{END}" if trained[start] else text)
    return "".join(parts)


def histogram(lengths: NDArray[np.int64]) -> str:
    """A line for each power of two between the shortest and the longest, and the middle ones in words."""
    classes = np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    counts = np.bincount(classes)
    lines = [
        f"  up to {2**power:>9,} {count:>10,} {'#' * -(-_BAR * int(count) // int(counts.max()))}".rstrip()
        for power, count in enumerate(counts.tolist())
        if power >= classes.min()
    ]
    half, most = (int(np.quantile(lengths, share)) for share in (0.5, 0.95))
    return "\n".join([*lines, f"  half have at most {half:,}, 95 % at most {most:,}, the longest {lengths.max():,}"])


def _counts(report: SourceReport) -> str:
    made, counts = report.tokenized, report.train.counts
    left_out = f"{made.num_skipped:,} records that cannot be read"
    if made.num_skipped:
        left_out += f" (the first: {made.first_skipped})"
    return (
        f"{report.source.name}: {counts.documents:,} documents to train on, "
        f"{report.validation.counts.documents:,} held out; {counts.split:,} split, {counts.truncated:,} truncated, "
        f"{counts.dropped:,} dropped as too long ({counts.lost_tokens:,} tokens lost); "
        f"{counts.untrained:,} pieces without a trained token and {left_out} left out"
    )


def _epochs(rows: Rows, config: HorizonConfig) -> Iterator[str]:
    """Tokens of an epoch, what each source gives of it, and how many a run sees."""
    quotas = row_quotas(rows) or np.bincount(rows.source, minlength=len(rows.sources)).tolist()
    num_rows, tokens = sum(quotas), 0.0
    for index, (source, quota) in enumerate(zip(rows.sources, quotas, strict=True)):
        chosen = rows.source == index
        mean = float(rows.num_tokens[chosen].mean()) if chosen.any() else 0.0
        tokens += quota * mean
        if len(quotas) > 1:
            seen = quota / max(1, int(chosen.sum()))
            yield f"{source.name}: {quota * mean:,.0f} tokens of an epoch, {seen:.2f} times all that it has"
    train = config.train
    epochs = train.steps * train.batch_size / num_rows
    steps = num_rows / train.batch_size
    yield f"an epoch: {tokens:,.0f} tokens in {num_rows:,} rows of {rows.seq_len}, {steps:,.1f} steps"
    yield (
        f"the run: {train.steps:,} steps of {train.batch_size:,} rows, {epochs:,.2f} epochs, "
        f"{epochs * tokens:,.0f} tokens"
    )
