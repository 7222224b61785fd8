"""A checkpoint on disk, opened for reading: its manifest, and arrays chunk by chunk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from horizon.checkpoint.arrays import as_array
from horizon.checkpoint.format import BUFFER_KIND, DTYPES, MASTER_KIND, ArraySpec
from horizon.checkpoint.manifest import Manifest, read_manifest
from horizon.checkpoint.reading import Use, check_files, read_arrays, read_chunks
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

    def chunks(self, name: str, kind: str) -> Iterator[tuple[int, Tensor]]:
        """An array's numbers, chunk by chunk; see `read_chunks`."""
        return read_chunks(self.folder, self.spec(name, kind))

    def read_each(self, reads: Iterable[tuple[ArraySpec, Use]]) -> None:
        """Hand the numbers of several arrays to whom they are for, on several threads; see `read_arrays`."""
        read_arrays(self.folder, reads)

    def read(self, name: str, kind: str = MASTER_KIND) -> Tensor:
        """A whole array, a new CPU tensor of its shape."""
        spec = self.spec(name, kind)
        whole = torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
        self.read_each([(spec, partial(_put, whole.view(-1)))])
        return whole

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, fp32 values) of every parameter, as a live model gives them."""
        return ((name, self.read(name)) for name in self.shapes)

    def fill_buffers(self, buffers: dict[str, Tensor]) -> None:
        """Give a skeleton's buffers, by name, the values that they had when the checkpoint was written."""
        for name, kind in self._specs:
            if kind == BUFFER_KIND and name in buffers:
                buffers[name].copy_(self.read(name, kind))

    def verify(self, progress: Callable[[int], object] = lambda num_bytes: None) -> None:
        """Read every array and compare its checksums.

        Args:
            progress: told of bytes that are as they were written, by the threads that read.

        Raises:
            CheckpointError: naming the first array that is damaged.
        """

        def compared(start: int, numbers: Tensor) -> None:
            progress(numbers.nbytes)

        self.read_each((spec, compared) for spec in self.manifest.arrays)


def _put(flat: Tensor, start: int, numbers: Tensor) -> None:
    """Not by torch, which would start threads for each of those that read."""
    np.copyto(as_array(flat[start : start + numbers.numel()]), as_array(numbers))
