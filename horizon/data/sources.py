"""The sources that the settings name, opened: what kind each is, which files it has, and what is in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from horizon.config.schema import DataConfig, DataFormat, FieldNames, OnBadData, SourceConfig
from horizon.data import documents, hub
from horizon.data.cache import content_hash
from horizon.data.encoding import Tokens
from horizon.data.pretokenized import EXTENSIONS, read_tokens, token_files
from horizon.data.samples import CONVERSATIONS, Sample, detect, sample_reader
from horizon.data.skipping import BadRecords
from horizon.data.tables import TABLES, Record, read_records
from horizon.errors import ConfigError, DataError

_RECORDS = CONVERSATIONS | {DataFormat.text_field}


@dataclass(frozen=True)
class OpenSource:
    """One source. `kind` is never `auto`."""

    name: str
    description: str  # for people: what it is and where
    kind: DataFormat
    weight: float | None
    fields: FieldNames
    token_dtype: str
    files: tuple[Path, ...] = ()
    dataset: hub.HubDataset | None = None

    @cached_property
    def content(self) -> str | None:
        """A hash of what is in it; None: nobody knows."""
        return self.dataset.fingerprint if self.dataset is not None else content_hash(self.files)

    @property
    def is_streamed(self) -> bool:
        """Whether records come over the network, and reading more of them costs more."""
        return self.dataset is not None and self.dataset.is_streamed

    def tokens(self) -> Tokens:
        """Of kind `tokens`."""
        return read_tokens(self.files, self.token_dtype)

    def samples(self, bad: BadRecords, max_bytes: int | None, seed: int) -> list[Sample]:
        """Of every other kind: texts or conversations, in order; at most `max_bytes` of them, chosen by seed.

        Where it is streamed, these are the first, and no more is read.

        Raises:
            DataError: there are none, or one cannot be read and `bad` does not take it.
        """
        if self.kind not in _RECORDS:
            return list(documents.read_documents(self.files, max_bytes, seed))
        read, samples, sizes, num_bytes = sample_reader(self.kind, self.fields), [], [], 0
        limit = max_bytes if self.is_streamed else None  # of reading itself
        with _progress(limit) as bar:
            for record in self._records(bad):
                try:
                    sample = read(record)
                except DataError as error:
                    bad.note(error)
                    continue
                num_bytes += record.num_bytes
                if limit is not None and num_bytes > limit:
                    break
                samples.append(sample)
                sizes.append(record.num_bytes)
                bar.update(record.num_bytes)
        if max_bytes is not None and not self.is_streamed:
            order = np.random.default_rng(seed).permutation(len(samples))
            fitting = order[np.cumsum(np.array(sizes, np.int64)[order]) <= max_bytes]
            samples = [samples[index] for index in sorted(fitting)]
        if not samples:
            within = "" if max_bytes is None else f" within data.max_bytes={max_bytes}"
            skipped = f"; {bad.count} were left out, the first: {bad.first}" if bad.count else ""
            raise DataError(f"no record in {self.description}{within}: dataset is empty{skipped}")
        return samples

    def _records(self, bad: BadRecords) -> Iterator[Record]:
        if self.dataset is not None:
            yield from self.dataset.records()
        for file in self.files:
            yield from read_records(file, bad)


def _progress(max_bytes: int | None) -> tqdm[Any]:
    """A bar on what is streamed, for reading files takes no time."""
    return tqdm(
        total=max_bytes, desc="streaming", unit="B", unit_scale=True, delay=2, leave=False,
        disable=None if max_bytes else True,
    )  # fmt: skip


def open_sources(data: DataConfig) -> list[OpenSource]:
    """All sources that are trained on.

    Raises:
        ConfigError: settings that do not go together.
        DataError: there is no such file, or nothing tells what is in it.
    """
    if data.format is not DataFormat.mixture:
        opened = [_open(_only_source(data), "data.path", data.streaming)]
    else:
        opened = [
            _open(source, f"data.sources[{number}].path", data.streaming) for number, source in enumerate(data.sources)
        ]
    if data.streaming and not any(source.is_streamed for source in opened):
        raise ConfigError("data.streaming=true reads datasets of the hub, and here is none: leave it false")
    names = [source.name for source in opened]
    if len(set(names)) < len(names):
        raise ConfigError(f"data.sources have the names {', '.join(names)}: give each a name of its own")
    return opened


def open_validation(data: DataConfig) -> OpenSource:
    """What `data.validation_path` names, in the format of the rest (of a mixture: as it is found)."""
    assert data.validation_path is not None
    formats = {DataFormat.mixture: DataFormat.auto, DataFormat.python_stdlib: DataFormat.text}
    source = replace(
        _only_source(data), path=data.validation_path, format=formats.get(data.format, data.format), name="validation"
    )
    return _open(source, "data.validation_path", data.streaming)


def _only_source(data: DataConfig) -> SourceConfig:
    return SourceConfig(
        path=data.path or "", format=data.format, subset=data.subset, revision=data.revision, split=data.split,
        fields=data.fields, token_dtype=data.token_dtype,
    )  # fmt: skip


def _open(source: SourceConfig, key: str, streaming: bool) -> OpenSource:
    path = Path(source.path).expanduser()
    if source.format is DataFormat.python_stdlib:
        root = documents.stdlib_folder()
        opened = OpenSource(
            source.name or "python_stdlib", f"standard library sources in {root}", DataFormat.text, source.weight,
            source.fields, source.token_dtype, tuple(documents.list_stdlib(root)),
        )  # fmt: skip
        return opened
    opened = OpenSource(source.name or path.name, "", source.format, source.weight, source.fields, source.token_dtype)
    if hub.is_saved(path) or (not path.exists() and hub.is_hub_id(source.path)):
        opened = replace(opened, dataset=_dataset(source, streaming))
    else:
        opened = replace(opened, files=tuple(_files(source.path, source.format, key)))
        if (source.subset, source.revision, source.split) != (None, None, "train"):
            raise ConfigError(
                f"{key}={source.path} is read as files, which have no subset, revision and split: set none of them"
            )
    kind = _kind(opened, key)
    what = {DataFormat.text: "text", DataFormat.text_field: "texts"}.get(kind, str(kind))
    commit = f" at {opened.dataset.commit}" if opened.dataset is not None and opened.is_streamed else ""
    return replace(opened, kind=kind, description=f"{what} in {source.path}{commit}")


def _dataset(source: SourceConfig, streaming: bool) -> hub.HubDataset:
    return hub.HubDataset(source.path, source.subset, source.split, source.revision, streaming)


def _files(path: str, kind: DataFormat, key: str) -> list[Path]:
    if kind is DataFormat.text:
        return documents.list_files(path, key)
    if kind is DataFormat.auto:
        files = documents.list_files(path, key)
        return token_files(files) if _extension_kind(files, key) == "tokens" else files
    extensions = EXTENSIONS if kind is DataFormat.tokens else TABLES
    files = documents.list_files(path, key, extensions)
    if not files[0].name.lower().endswith(extensions):
        raise DataError(f"{key}={path}: data.format={kind} reads {', '.join(extensions)} files")
    return token_files(files) if kind is DataFormat.tokens else files


def _extension_kind(files: list[Path], key: str) -> str:
    """text, records or tokens; all files must be of one.

    Raises:
        DataError: they are not.
    """
    kinds: dict[str, Path] = {}
    for file in files:
        suffix = file.suffix.lower()
        kind = "tokens" if suffix in EXTENSIONS else "records" if suffix in TABLES else "text"
        kinds.setdefault(kind, file)
    if len(kinds) > 1:
        found = " and ".join(f"{kind} ({file.name})" for kind, file in sorted(kinds.items()))
        raise DataError(f"{key}: the folder holds {found}; set data.format to what is to be read")
    return next(iter(kinds))


def _kind(source: OpenSource, key: str) -> DataFormat:
    """The format named, or the one found."""
    if source.dataset is not None and source.kind not in _RECORDS | {DataFormat.auto}:
        raise ConfigError(f"data.format={source.kind} reads files; a dataset has records: set data.format=auto")
    if source.kind is not DataFormat.auto:
        return source.kind
    found = "records" if source.dataset is not None else _extension_kind(list(source.files), key)
    if found != "records":
        return DataFormat[found]
    for record in source._records(BadRecords(OnBadData.skip)):
        return detect(record, source.fields)
    raise DataError(f"{key}: no record in {source.name}: dataset is empty")
