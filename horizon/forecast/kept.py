"""Files that are kept between commands: whole or not at all, and found again by a key of all that they follow from."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

KEY_LENGTH = 16


def kept_folder() -> Path:
    """Where they are."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "horizon"


def key_of(parts: Iterable[str]) -> str:
    """A short name for these, in this order."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:KEY_LENGTH]


def write_kept(path: Path, text: str) -> None:
    """Write the file beside its place and rename it, so that two writers leave the file of one of them.

    Raises:
        OSError: the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
