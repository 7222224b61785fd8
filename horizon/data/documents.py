"""Documents as text, read from disk and divided into training and validation.

Everything here is deterministic: files are taken in sorted order, and what is left out (by `max_bytes`)
or held out (for validation) depends on the seed alone.
"""

from __future__ import annotations

import codecs
import logging
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from horizon.errors import DataError

_LOG = logging.getLogger(__name__)

# Folders of the standard library that hold tests, installed packages, or tables rather than code.
_NOT_LIBRARY_CODE = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    | {"idlelib", "lib2to3", "turtledemo", "pydoc_data", "encodings"}
)


@dataclass(frozen=True, slots=True)
class Document:
    """One text, and which of its characters are trained on."""

    where: str  # file, or file:line
    text: str
    spans: tuple[tuple[int, int], ...] | None = None  # trained character ranges, in order; None: all of the text


def stdlib_folder() -> Path:
    """Folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def list_stdlib(root: Path) -> list[Path]:
    """Python sources under `root` that are library code, sorted.

    Raises:
        DataError: there are none (an interpreter shipped without sources).
    """
    files = [path for path in _walk(root, skip=_NOT_LIBRARY_CODE) if path.suffix == ".py"]
    if not files:
        raise DataError(f"data.format=python_stdlib: no .py files under {root}; set data.format=text and data.path")
    return files


def list_files(path: str, key: str, suffixes: tuple[str, ...] = ("",)) -> list[Path]:
    """The file at `path`, or those in that folder whose names end in one of `suffixes`, sorted; no hidden ones.

    `key` names the setting in the error.

    Raises:
        DataError: the path does not exist, or the folder holds no such file.
    """
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise DataError(f"{key}={path} does not exist; expected a file or a folder")
    files = [file for file in _walk(root) if file.name.lower().endswith(suffixes)]
    if not files:
        raise DataError(f"{key}={path} is a folder without {', '.join(filter(None, suffixes)) or 'text'} files")
    return files


def read_documents(files: Sequence[Path], max_bytes: int | None, seed: int) -> list[Document]:
    """Each readable, non-blank file as one document, in the order given.

    At most `max_bytes` are read, of files chosen by seed (the last of them only in part). Among several files
    those that are not UTF-8 text are skipped, and their number is logged.

    Raises:
        DataError: the only file, or every file, is not UTF-8 text; or there is no text in them.
    """
    documents: dict[int, Document] = {}
    unreadable: list[str] = []
    left = max_bytes
    for index in np.random.default_rng(seed).permutation(len(files)):
        if left is not None and left <= 0:
            break
        try:
            text, num_bytes = _read_text(files[index], left)
        except DataError as error:
            unreadable.append(str(error))
            continue
        if text.strip():
            documents[int(index)] = Document(str(files[index]), text)
            left = None if left is None else left - num_bytes
    if unreadable and not documents:
        others = f" (and {len(unreadable) - 1} more files)" if len(unreadable) > 1 else ""
        raise DataError(f"{unreadable[0]}{others}")
    if not documents:
        raise DataError(f"no text in {files[0] if len(files) == 1 else f'any of {len(files)} files'}: dataset is empty")
    if unreadable:
        _LOG.warning("skipped %d of %d files: not text, such as %s", len(unreadable), len(files), unreadable[0])
    return [documents[index] for index in sorted(documents)]


def decode_text(raw: bytes, where: str, *, cut: bool = False) -> str:
    """`raw` as UTF-8 text; with `cut`, an incomplete character at the very end is dropped.

    Raises:
        DataError: naming `where`, the line and the reason.
    """
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(raw, final=not cut)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{where}:{line}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{where}:{line}: not text (it holds a NUL byte)")
    return text


def read_bytes(path: Path, num_bytes: int = -1) -> bytes:
    """The first `num_bytes` of a file (all of it when negative).

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(num_bytes)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _read_text(path: Path, max_bytes: int | None) -> tuple[str, int]:
    """(text of the file's first `max_bytes`, bytes read)."""
    raw = read_bytes(path, -1 if max_bytes is None else max_bytes)
    return decode_text(raw, str(path), cut=len(raw) == max_bytes), len(raw)


def _walk(root: Path, skip: frozenset[str] = frozenset()) -> list[Path]:
    """Every file under `root` that is neither hidden nor in a folder named in `skip`, sorted by path."""
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skip and not name.startswith(".")]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted((file for file in files if file.is_file()), key=lambda file: file.relative_to(root).parts)
