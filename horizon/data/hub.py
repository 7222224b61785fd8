"""Records of the `datasets` library: from the hub, or from a folder that its `save_to_disk` wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from horizon.data.tables import Record
from horizon.errors import ConfigError, DataError

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves in a folder


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return any((path / name).is_file() for name in _SAVED)


def is_hub_id(path: str) -> bool:
    """Whether a path that does not exist may be the name of a dataset on the hub, `owner/name`."""
    return _HUB_ID.fullmatch(path) is not None


class HubDataset:
    """A dataset of which one split is read, record by record."""

    def __init__(self, path: str, subset: str | None, split: str, streaming: bool) -> None:
        """Open it; the hub is asked unless `path` is a folder.

        Raises:
            ConfigError: `datasets` is not installed.
            DataError: there is no such dataset, subset or split.
        """
        try:
            import datasets
        except ImportError:
            raise ConfigError(
                f"data.path={path} is no file or folder; to read it from the hub: pip install 'horizon[data]'"
            ) from None
        self.name = f"{path}[{split}]"
        try:
            if Path(path).is_dir():
                found: Any = datasets.load_from_disk(path)
                self._rows = found[split] if isinstance(found, dict) else found
            else:
                self._rows = datasets.load_dataset(path, subset, split=split, streaming=streaming)
        except Exception as error:  # whatever the library and its connections raise
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise DataError(f"dataset {self.name} cannot be opened ({reason})") from error

    @property
    def fingerprint(self) -> str | None:
        """Of its content; None: it is streamed, and nobody knows."""
        found = getattr(self._rows, "_fingerprint", None)
        return None if found is None else str(found)

    def records(self) -> Iterator[Record]:
        """All of them, in order."""
        for number, fields in enumerate(self._rows, start=1):
            yield Record(f"{self.name}: record {number}", dict(fields))
