"""A checkpoint on disk, opened for reading: its manifest, and arrays chunk by chunk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from horizon.checkpoint.arrays import check_files, damaged, read_chunks
from horizon.checkpoint.format import BUFFER_KIND, DTYPES, MASTER_KIND, ArraySpec, Chunk
from horizon.checkpoint.manifest import Manifest, read_manifest
from horizon.errors import CheckpointError


class Checkpoint:
    """One checkpoint.

    Raises:
        CheckpointError: the folder is none, its manifest is damaged, or a file is missing or was cut short.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(os.path.abspath(Path(folder).expanduser()))
        self.manifest: Manifest = read_manifest(self.folder)
        self._specs = {(spec.name, spec.kind): spec for spec in self.manifest.arrays}
        for spec in self.manifest.arrays:
            check_files(self.folder, spec)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter, by its Hugging Face name."""
        return {name: spec.shape for (name, kind), spec in self._specs.items() if kind == MASTER_KIND}

    def spec(self, name: str, kind: str) -> ArraySpec:
        """An array by its parameter (or buffer) and kind."""
        try:
            return self._specs[name, kind]
        except KeyError:
            raise CheckpointError(f"{self.folder} holds no {kind} of {name}") from None

    def chunks(self, name: str, kind: str) -> Iterator[tuple[Chunk, Tensor]]:
        """An array's chunks and their numbers; errors as `read_chunks`."""
        return read_chunks(self.folder, self.spec(name, kind))

    def read(self, name: str, kind: str = MASTER_KIND) -> Tensor:
        """A whole array, a new CPU tensor of its shape."""
        spec = self.spec(name, kind)
        whole = torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
        for chunk, values in self.chunks(name, kind):
            whole[chunk.index] = values
        return whole

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, fp32 values) of every parameter, as a live model gives them."""
        return ((name, self.read(name)) for name in self.shapes)

    def fill_buffers(self, buffers: dict[str, Tensor]) -> None:
        """Give a skeleton's buffers, by name, the values that they had when the checkpoint was written."""
        for name, kind in self._specs:
            if kind == BUFFER_KIND and name in buffers:
                buffers[name].copy_(self.read(name, kind))

    def verify(self, progress: Callable[[ArraySpec], None] = lambda spec: None) -> None:
        """Read every array and compare its checksums.

        Raises:
            CheckpointError: naming the first array that is damaged.
        """
        for spec in self.manifest.arrays:
            progress(spec)
            num_read = sum(chunk.stop - chunk.start for chunk, _ in read_chunks(self.folder, spec))
            if num_read * DTYPES[spec.dtype].itemsize != spec.num_bytes:
                raise damaged(self.folder, spec, f"{num_read} numbers")
