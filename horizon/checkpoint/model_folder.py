"""A model's folder on disk, which appears at once: written and flushed in a hidden sibling that then takes its name."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from horizon.errors import CheckpointError, one_line
from horizon.units import MIB, format_bytes

_MODEL_FILES = re.compile(
    r".*\.(safetensors|json|jinja|model|py|tiktoken)|(vocab|merges)\.txt|additional_chat_templates"
)
_SMALL_FILES = 64 * MIB  # room for configs and the tokenizer


class Tokenizer(Protocol):
    """What can write its files beside the model's."""

    def save_pretrained(self, save_directory: str, /) -> object:
        """Write the tokenizer's files into an existing folder."""


@contextmanager
def written_folder(folder: str | Path, num_bytes: int, config: str) -> Iterator[Path]:
    """A folder to write in, which then takes the place of `folder` and of an earlier model there.

    On failure that is left as it was.

    Args:
        num_bytes: of the weights to be written.
        config: the file by which a folder of this kind is known.

    Raises:
        CheckpointError: the folder holds something else than a model, there is not enough room, or writing fails.
    """
    folder = Path(os.path.abspath(folder))
    _check_target(folder, config)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        _check_room(folder.parent, num_bytes)
        partial.mkdir()
        yield partial
        _replace(folder, partial)
    except OSError as error:
        raise CheckpointError(f"the model could not be written to {folder}: {one_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_target(folder: Path, config: str) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; choose another folder for the model")
    entries = sorted(entry.name for entry in folder.iterdir())
    strange = [name for name in entries if not _MODEL_FILES.fullmatch(name)]
    if entries and (strange or config not in entries):
        raise CheckpointError(
            f"{folder} holds {(strange or entries)[0]}, so it is not replaced; choose another folder for the model"
        )


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size + _SMALL_FILES:
        raise CheckpointError(
            f"the model needs {format_bytes(size + _SMALL_FILES)} in {folder} but {format_bytes(free)} is free; "
            "choose another folder or make room"
        )


def _replace(folder: Path, partial: Path) -> None:
    """Give `partial` the name of `folder`; the model that was there is kept until the new one is in place."""
    replaced = folder.with_name(f".{folder.name}.replaced")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    try:
        partial.rename(folder)
    except OSError:
        if replaced.exists():
            replaced.rename(folder)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    _flush_folder(folder.parent)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
