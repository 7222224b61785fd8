"""Saves: checkpoints of an engine that are written behind training, one at a time.

A save begins between two steps and takes no time there: it notes what is to be written, and a thread does the rest.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from horizon.checkpoint.arrays import ArrayWriter, load_library, writing_bytes
from horizon.checkpoint.folder import PartialFolder, flush_files, write_flushed
from horizon.checkpoint.format import BUFFER_KIND, DTYPE_NAMES, MANIFEST, ArraySpec, StateArray, list_arrays
from horizon.checkpoint.manifest import Manifest
from horizon.checkpoint.model_folder import Tokenizer
from horizon.checkpoint.snapshot import BOUNCE_BYTES, Snapshot, StateReader
from horizon.checkpoint.staging import ALIGN, Staging
from horizon.config.schema import MasterFormat, Moments
from horizon.errors import CheckpointError, ConfigError, HorizonError, one_line
from horizon.optim.threads import available_cores
from horizon.records import CheckpointRow
from horizon.store.host import HostStore
from horizon.store.nvme import BOUNCE
from horizon.stream.streams import Streams
from horizon.units import align_up, format_bytes, parse_bytes

if TYPE_CHECKING:
    from horizon.checkpoint.model_folder import Tokenizer

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer"  # the folder of its files in a checkpoint
LEAST_CHUNKS = 2  # that staging holds: one is filled while another is written
# That set states aside, while the updates' threads mostly wait for the next gradients: of 16 cores one moves 6 GB/s, 8
# move 31, 12 move 33, and the next update should find the model set aside.
COPY_THREADS = max(1, available_cores() * 3 // 4)
STAGING_KEY = "checkpoint.staging"


class Save:
    """One checkpoint on its way to disk; `Engine.save_checkpoint` gives it.

    Attributes:
        folder: where the checkpoint will be.
        step: optimizer steps that its weights have seen.
    """

    def __init__(
        self, partial: PartialFolder, step: int, snapshot: Snapshot, writer: ArrayWriter, work: Callable[[], None]
    ) -> None:
        self.folder, self.step, self.snapshot = partial.target, step, snapshot
        self._partial, self._writer, self._work = partial, writer, work
        self._row: CheckpointRow | None = None
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="horizon-checkpoint", daemon=True)

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._ended.is_set()

    @property
    def error(self) -> BaseException | None:
        """What went wrong, if it has ended badly."""
        return self._error

    def wait(self) -> CheckpointRow:
        """Return when the checkpoint is on disk, with what it took.

        Raises:
            CheckpointError: it could not be written; nothing is left of it.
        """
        self._ended.wait()
        if self._error is not None:
            raise self._error
        assert self._row is not None
        return self._row

    def start(self, num_bytes: int, began: float) -> None:
        """Let the thread do the rest; `began`: when the save was asked for, by `time.perf_counter`."""
        self._num_bytes, self._began = num_bytes, began
        self.snapshot.stall_s = time.perf_counter() - began
        self._thread.start()

    def abandon(self) -> None:
        """Give it up; nothing is left of it."""
        error = CheckpointError(f"the save of {self.folder} was given up")
        self.snapshot.give_up(error)
        self._writer.give_up(error)

    def end(self) -> None:
        """Return when its thread has."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._work()
            seconds = time.perf_counter() - self._began
            self._row = CheckpointRow(
                step=self.step,
                folder=str(self.folder),
                num_bytes=self._num_bytes,
                seconds=seconds,
                bytes_per_s=self._num_bytes / seconds,
                stall_s=self.snapshot.stall_s,
                room_s=self.snapshot.room_s,
                time=time.time(),
            )
        except BaseException as error:  # it is raised where the save is waited for, or at the engine's next call
            self._error = _as_checkpoint_error(error, self.folder)
            self.abandon()
            self.snapshot.settle()
            with suppress(CheckpointError):  # nothing is being written when the folder is removed
                self._writer.finish()
            self._partial.discard()
        finally:
            self._ended.set()


def _as_checkpoint_error(error: BaseException, folder: Path) -> BaseException:
    if isinstance(error, HorizonError):
        return error
    failure = CheckpointError(f"the checkpoint {folder} could not be written: {one_line(error)}")
    failure.__cause__ = error
    return failure


class Saves:
    """The saves of one engine; `skeleton` gives the buffers that its model's state dict has beside parameters."""

    def __init__(
        self, store: HostStore, streams: Streams, moments: Moments, master: MasterFormat, skeleton: nn.Module
    ) -> None:
        self._store, self._buffers = store, saved_buffers(skeleton)
        self._reader = StateReader(store, streams, COPY_THREADS)
        self._arrays = list_arrays(store.layouts, moments, master)
        self._buffer_specs = [
            ArraySpec(name, BUFFER_KIND, tuple(value.shape), DTYPE_NAMES[value.dtype])
            for name, value in self._buffers.items()
        ]
        self._staging_bytes, self._staging = 0, None  # type: int, Staging | None
        self._save: Save | None = None
        self._reported = True  # whether the last save's failure, if any, was told

    @property
    def specs(self) -> list[ArraySpec]:
        """All arrays of a checkpoint."""
        return [*(array.spec for array in self._arrays), *self._buffer_specs]

    @property
    def num_bytes(self) -> int:
        """Bytes of a checkpoint on disk."""
        return sum(len(spec.chunks) * spec.chunk_file_bytes for spec in self.specs)

    def memory(self, staging: str, room: int) -> int:
        """Host bytes that saves will use; `staging` is `auto` or a size, `room` what the plan has left.

        Raises:
            ConfigError: the size is too small to work with.
        """
        self._staging_bytes = staging_bytes(self._arrays, staging, room)
        load_library()
        return saving_bytes(self._arrays, self._staging_bytes, self._reader.on_gpu, bool(self._store.on_nvme))

    @property
    def planned(self) -> bool:
        """Whether `memory` was asked."""
        return self._staging_bytes > 0

    def make_staging(self) -> None:
        """Have as much as `memory` said, its pages coming into being behind the steps before the first save.

        Where that is more than there was, it waits for the save under way, and raises as `finish`.
        """
        if self._staging is not None and self._staging.num_bytes < self._staging_bytes:
            self.finish()  # it is being written from what there was
            self._staging.close()
            self._staging = None
        self._reader.make_room()
        self._staging = self._staging or Staging(self._staging_bytes)

    def begin(self, folder: Path, manifest: Manifest, order: Sequence[int], tokenizer: Tokenizer | None) -> Save:
        """Save the states at `manifest.step`, which the updates under way lead to; waits for an earlier save first.

        Args:
            manifest: what it is to say, without the arrays.
            order: all blocks, those first that will be overwritten first.

        Raises:
            CheckpointError: the folder exists, is being written by another, or the disk has no room.
        """
        began = time.perf_counter()
        self.finish()
        assert self._staging is not None  # `make_staging` was called
        _check_run(manifest.run)
        place = {block: rank for rank, block in enumerate(order)}
        manifest.arrays.extend(self.specs)
        partial = PartialFolder(folder, self.num_bytes)
        try:
            writer, arrays = ArrayWriter(partial.path), sorted(self._arrays, key=lambda array: place[array.block])
            self._reader.begin()
            snapshot = Snapshot(manifest.step, arrays, self._store, self._staging, self._reader.read, writer.write)
        except BaseException:
            partial.discard()
            raise

        def work() -> None:
            self._write_buffers(writer)
            snapshot.copy_all(COPY_THREADS)
            for spec in manifest.arrays:
                writer.create(spec)  # those without a chunk
            writer.finish()
            commit(partial, manifest, tokenizer)

        save = Save(partial, manifest.step, snapshot, writer, work)
        self._save, self._reported = save, False
        save.start(manifest.num_bytes, began)
        return save

    def _write_buffers(self, writer: ArrayWriter) -> None:
        for spec in self._buffer_specs:
            for chunk in spec.chunks:
                writer.write(spec, chunk, self._buffers[spec.name][chunk.index].contiguous(), lambda: None)

    def before_update(self, block: int) -> None:
        """Called before a block's states are overwritten; see `Snapshot.before_update`."""
        if self._save is not None:
            self._save.snapshot.before_update(block)

    def settle(self) -> None:
        """Return when no save reads a block any more: they may move."""
        if self._save is not None:
            self._save.snapshot.settle()

    def finish(self) -> None:
        """Return when the save under way is on disk.

        Raises:
            CheckpointError: it, or one before it whose failure nobody has heard of, failed.
        """
        if self._save is not None:
            self._save.end()
        self.raise_if_failed()

    def raise_if_failed(self) -> None:
        """Raise the failure of the last save, once."""
        if self._save is not None and self._save.done and not self._reported:
            self._reported = True
            if self._save.error is not None:
                raise self._save.error

    def abandon(self) -> None:
        """Give the save under way up; nothing is left of it."""
        if self._save is not None:
            self._save.abandon()

    def close(self) -> None:
        """End when the save under way is on disk, and give all memory back. Idempotent."""
        if self._save is not None:
            self._save.end()
            if self._save.error is not None and not self._reported:
                log.error("%s", self._save.error)
            self._save = None
        if self._staging is not None:
            self._staging.close()
            self._staging = None
        self._reader.close()


def staging_bytes(arrays: Sequence[StateArray], staging: str, room: int) -> int:
    """How large the staging is for a checkpoint of these arrays; see `Saves.memory`."""
    whole, least = _aligned_bytes(arrays), LEAST_CHUNKS * max(_chunk_bytes(array) for array in arrays)
    least = min(least, whole)
    if staging == "auto":
        return max(least, min(whole, room // 2))  # the rest: activations that go to the host
    size = min(parse_bytes(staging, STAGING_KEY), whole)
    if size < least:
        raise ConfigError(f"{STAGING_KEY}={staging} must be at least {format_bytes(least)} for this model")
    return size


def saving_bytes(arrays: Sequence[StateArray], staging_size: int, on_gpu: bool, on_nvme: bool) -> int:
    """Host memory that saving takes where states may be in the memory of a GPU, or on nvme."""
    copying = COPY_THREADS * BOUNCE_BYTES if on_gpu or on_nvme else 0
    reading = BOUNCE if on_nvme else 0
    return staging_size + writing_bytes(_aligned_bytes(arrays)) + copying + reading


def _aligned_bytes(arrays: Sequence[StateArray]) -> int:
    return sum(len(array.spec.chunks) * _chunk_bytes(array) for array in arrays)


def _chunk_bytes(array: StateArray) -> int:
    return align_up(array.spec.chunk_file_bytes, ALIGN)


def commit(partial: PartialFolder, manifest: Manifest, tokenizer: Tokenizer | None) -> None:
    """The arrays are on disk: add what is small, the manifest last, and give the folder its name."""
    if tokenizer is not None:
        (partial.path / TOKENIZER).mkdir()
        tokenizer.save_pretrained(str(partial.path / TOKENIZER))
        flush_files(partial.path / TOKENIZER)
    write_flushed(partial.path / MANIFEST, manifest.to_json())
    partial.commit()


def saved_buffers(skeleton: nn.Module) -> dict[str, Tensor]:
    """What a model's state dict holds beside its parameters, by name: on the CPU, real."""
    return {name: value.cpu() for name, value in skeleton.state_dict().items() if not value.is_meta}


def _check_run(run: dict[str, Any]) -> None:
    try:
        json.dumps(run, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"what is to be kept with a checkpoint must be plain JSON values: {error}") from error
