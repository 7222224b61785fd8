"""Folders of checkpoints: how one comes into being at once, which there are, and who may write.

    checkpoints/
        .lock                       held by the run that writes here
        step-00000100/              whole: it was renamed when everything in it was on disk
        .step-00000200.partial/     being written, and locked meanwhile; unlocked: a run was killed
        .step-00000100.removed/     being removed

So whatever happens, and whenever: a folder without a dot is a checkpoint with all that belongs to it.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from horizon.checkpoint.format import MANIFEST
from horizon.errors import CheckpointError
from horizon.units import MIB, format_bytes

_STEP = re.compile(r"step-(\d{8,})")
_LEFT_OVER = re.compile(r"\..+\.(partial|removed)")
_SMALL_FILES = 16 * MIB  # room for what surrounds the numbers: manifest, zarr.json, tokenizer


def step_folder(parent: Path, step: int) -> Path:
    """The checkpoint of a run's `step`."""
    return parent / f"step-{step:08d}"


def list_checkpoints(parent: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint in a run's folder of them, by step."""
    if not parent.is_dir():
        return []
    found = [(_STEP.fullmatch(path.name), path) for path in parent.iterdir() if (path / MANIFEST).is_file()]
    return sorted((int(match[1]), path) for match, path in found if match)


class PartialFolder:
    """A checkpoint on its way to `target`; `commit` gives it its name, `discard` removes it.

    Raises:
        CheckpointError: the target exists, another process is writing it, or there is not enough room.
    """

    def __init__(self, target: Path, num_bytes: int) -> None:
        self.target = Path(os.path.abspath(target))
        self.path = self.target.with_name(f".{self.target.name}.partial")
        if self.target.exists():
            raise CheckpointError(f"{self.target} exists already and is not replaced; choose another folder")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.mkdir(exist_ok=True)
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        if not _lock(self._descriptor):
            os.close(self._descriptor)
            raise CheckpointError(f"another process is writing {self.target}; stop it, or choose another folder")
        try:
            for entry in self.path.iterdir():  # of a run that was killed
                remove_tree(entry) if entry.is_dir() else entry.unlink()
            check_room(self.path, num_bytes)
        except BaseException:
            self.discard()
            raise

    def commit(self) -> None:
        """Have all names on disk, then the folder's own: from there on it is a checkpoint. The files are on disk."""
        flush_folders(self.path)
        os.rename(self.path, self.target)
        flush(self.target.parent)
        os.close(self._descriptor)

    def discard(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._descriptor)


def check_room(folder: Path, num_bytes: int) -> None:
    """Raise a CheckpointError unless the disk has room for so many bytes and the small files around them."""
    free, need = shutil.disk_usage(folder).free, num_bytes + _SMALL_FILES
    if free < need:
        raise CheckpointError(
            f"a checkpoint needs {format_bytes(need)} in {folder.parent} but {format_bytes(free)} is free; make room, "
            "keep fewer (checkpoint.keep), or choose another folder (hydra.run.dir)"
        )


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint; one that is removed half-way is none any more."""
    removed = folder.with_name(f".{folder.name}.removed")
    folder.rename(removed)
    remove_tree(removed)


def remove_tree(folder: Path) -> None:
    """Remove a folder with all that is in it."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be removed: {error.strerror}") from error


def remove_left_overs(parent: Path) -> list[Path]:
    """Remove what killed runs have left behind in a folder of checkpoints; what is being written stays.

    Returns:
        what was removed.
    """
    removed = []
    for path in sorted(parent.iterdir()) if parent.is_dir() else ():
        if _LEFT_OVER.fullmatch(path.name) and path.is_dir():
            with _locked(path) as mine:
                if mine:
                    remove_tree(path)
                    removed.append(path)
    return removed


class FolderLock:
    """Keeps other runs from writing into a folder, as long as the process lives; a context manager.

    Raises:
        CheckpointError: another run holds it.
    """

    def __init__(self, parent: Path) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        path = parent / ".lock"
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not _lock(self._descriptor):
            holder = os.read(self._descriptor, 32).decode(errors="replace").strip()
            os.close(self._descriptor)
            raise CheckpointError(
                f"another run (process {holder or 'unknown'}) writes to {parent}; stop it, or choose another "
                "hydra.run.dir"
            )
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"{os.getpid()}\n".encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._descriptor)


def flush(path: Path) -> None:
    """Have what a file holds, or the names in a folder, on disk."""
    with _opened(path) as descriptor:
        os.fsync(descriptor)


def write_flushed(path: Path, text: str) -> None:
    """Write a small file and have it on disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def flush_folders(folder: Path) -> None:
    """Have the names in a folder, and in every folder inside, on disk."""
    for inside, _, _ in os.walk(folder):
        flush(Path(inside))


def flush_files(folder: Path) -> None:
    """Have what every file in a folder holds on disk."""
    for path in folder.rglob("*"):
        flush(path)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    with _opened(path) as descriptor:
        yield _lock(descriptor)


def _lock(descriptor: int) -> bool:
    """Whether the file is ours now; it is until the descriptor is closed, or the process ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
