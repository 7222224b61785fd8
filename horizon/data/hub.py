"""Records of the `datasets` library: from the hub, or from a folder that its `save_to_disk` wrote.

What is streamed is pinned to the commit that the hub names first, so that its beginning is the same at every reading.
"""

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

    def __init__(self, path: str, subset: str | None, split: str, revision: str | None, streaming: bool) -> None:
        """Open it; the hub is asked unless `path` is a folder. `streaming` reads it over the network, in order.

        Raises:
            ConfigError: `datasets` is not installed, or a folder is asked for what only the hub has.
            DataError: there is no such dataset, subset, split or revision.
        """
        try:
            import datasets
            import huggingface_hub
        except ImportError:
            raise ConfigError(
                f"data.path={path} is no file or folder; to read it from the hub: pip install 'horizon[data]'"
            ) from None
        self.name, self._subset = f"{path}[{split}]", subset
        saved = Path(path).expanduser()
        self.is_streamed = streaming and not saved.is_dir()
        self.commit: str | None = None  # of what is streamed
        if saved.is_dir() and (subset, revision) != (None, None):
            raise ConfigError(f"data.path={path} is a saved dataset, which has no subset and no revision: set neither")
        try:
            if saved.is_dir():
                found: Any = datasets.load_from_disk(str(saved))
                self._rows = found[split] if isinstance(found, dict) else found
            else:
                if self.is_streamed:
                    self.commit = revision = huggingface_hub.dataset_info(path, revision=revision).sha
                self._rows = datasets.load_dataset(path, subset, split=split, revision=revision, streaming=streaming)
        except Exception as error:  # whatever the library and its connections raise
            raise DataError(f"dataset {self.name} cannot be opened ({_reason(error)})") from error

    @property
    def fingerprint(self) -> str | None:
        """Of its content; None: nobody knows."""
        if self.is_streamed:
            return self.commit and f"{self.name} {self._subset} {self.commit}"
        found = getattr(self._rows, "_fingerprint", None)
        return None if found is None else str(found)

    def records(self) -> Iterator[Record]:
        """All of them, in order.

        Raises:
            DataError: the connection is lost, or a file behind it is broken.
        """
        number = 0
        try:
            for number, fields in enumerate(self._rows, start=1):
                yield Record(f"{self.name}: record {number}", dict(fields))
        except Exception as error:
            raise DataError(f"dataset {self.name} ends after record {number} ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
