"""Settings of data that cannot work, refused before anything is read."""

from __future__ import annotations

from collections.abc import Sequence

from horizon.config.schema import DataConfig, DataFormat, FieldNames, TrainOn
from horizon.data.samples import CONVERSATIONS
from horizon.errors import ConfigError


def check_data_settings(data: DataConfig, seq_len: int) -> None:
    """Refuse settings that cannot work, or that nothing would look at.

    Raises:
        ConfigError: naming the setting.
    """
    if seq_len < 2:
        raise ConfigError(f"train.seq_len={seq_len} must be at least 2: the first token of a row predicts the second")
    if not 0 <= data.validation_fraction < 1:
        raise ConfigError(f"data.validation_fraction={data.validation_fraction} must be at least 0 and below 1")
    if data.max_bytes is not None and data.max_bytes < 1:
        raise ConfigError(f"data.max_bytes={data.max_bytes} must be positive, or null for no limit")
    _check_path(data)
    _check_mixture(data)
    if data.streaming and data.max_bytes is None:
        raise ConfigError("data.streaming=true reads the beginning of a dataset: set data.max_bytes to how much")
    if data.max_bytes is not None and data.format is DataFormat.tokens:
        raise ConfigError("data.max_bytes is not for data.format=tokens, whose files are not read but mapped")


def _check_path(data: DataConfig) -> None:
    if data.format is DataFormat.python_stdlib:
        if data.path is not None:
            raise ConfigError(f"data.path={data.path} is not read by data.format=python_stdlib; set data.format=auto")
    elif data.format is DataFormat.mixture:
        if data.path is not None:
            raise ConfigError(f"data.path={data.path} is not read by data.format=mixture; add it to data.sources")
    elif data.path is None:
        raise ConfigError(f"data.format={data.format} needs data.path, a file or a folder")


def _check_mixture(data: DataConfig) -> None:
    if data.format is not DataFormat.mixture:
        if data.sources:
            raise ConfigError(f"data.sources are not read by data.format={data.format}; set data.format=mixture")
        return
    if (data.subset, data.revision, data.split, data.fields) != (None, None, "train", FieldNames()):
        raise ConfigError(
            "data.subset, data.revision, data.split and data.fields are not read by data.format=mixture; "
            "give them to a source"
        )
    if not data.sources:
        raise ConfigError("data.format=mixture needs data.sources, a list of {path: ..., weight: ...}")
    weights = [source.weight for source in data.sources]
    if any(weight is not None and weight <= 0 for weight in weights):
        raise ConfigError(f"data.sources have the weights {weights}: each must be above 0")
    if None in weights and any(weight is not None for weight in weights):
        raise ConfigError(f"data.sources have the weights {weights}: give each source one, or none")
    if any(source.format is DataFormat.mixture for source in data.sources):
        raise ConfigError("data.sources: a source cannot be a mixture itself")


def check_train_on(data: DataConfig, kinds: Sequence[DataFormat]) -> None:
    """Refuse to choose turns where no source has any.

    Raises:
        ConfigError: naming the setting.
    """
    if data.train_on is not TrainOn.assistant and not CONVERSATIONS & set(kinds):
        raise ConfigError(f"data.train_on={data.train_on} is for conversations, and the data are {', '.join(kinds)}")
