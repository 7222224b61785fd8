"""The safetensors files of a model folder: named tensors read one at a time, and files written one tensor at a time.

Reading goes through `pread`, not a mapping: mapped pages would count as a second copy of the model in resident memory.
A file is: 8 bytes little-endian length of the header; the header, JSON name -> dtype, shape, [begin, end) of
its bytes after the header; the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from horizon.checkpoint.conversion import as_meta
from horizon.errors import CheckpointError, one_line
from horizon.models.hf_config import read_json
from horizon.models.source import WEIGHTS, WEIGHTS_INDEX

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ROWS_AT_ONCE = 1024


@contextmanager
def open_shards(folder: Path) -> Iterator[ShardReader]:
    """All tensors of a model folder, while the context lasts.

    Raises:
        CheckpointError: no weights, or a file is missing, damaged or names a tensor twice.
    """
    files: dict[str, _File] = {}
    with ExitStack() as stack:
        for path, promised in _shard_paths(folder).items():
            file = _open(path, promised, stack)
            if twice := files.keys() & file.names:
                raise CheckpointError(f"{min(twice)} is both in {files[min(twice)].path} and in {path}")
            files |= dict.fromkeys(file.names, file)
        yield ShardReader(files)


@contextmanager
def open_file(path: Path) -> Iterator[ShardReader]:
    """The tensors of one file, while the context lasts; errors as `open_shards`."""
    with ExitStack() as stack:
        file = _open(path, set(), stack)
        yield ShardReader(dict.fromkeys(file.names, file))


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    handle: Any
    names: frozenset[str]


@dataclass(frozen=True, slots=True)
class ShardReader:
    """Tensors of a model folder, by their name on disk."""

    _files: dict[str, _File]

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._files)

    def meta(self, name: str) -> Tensor:
        """Shape and dtype of a tensor, from its file's header, as a meta tensor."""
        file = self._files[name]
        header = file.handle.get_slice(name)
        dtype = header.get_dtype()
        if dtype not in DTYPES:
            raise CheckpointError(
                f"{file.path} stores {name} as {dtype}, which is not read; expected fp32, fp16 or bf16"
            )
        return as_meta(header.get_shape(), DTYPES[dtype])

    def read(self, name: str) -> Tensor:
        """The tensor as stored, in memory of its own."""
        file = self._files[name]
        try:
            tensor: Tensor = file.handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file.path} cannot be read at {name}: {one_line(error)}") from error
        return tensor

    def equal(self, a: str, b: str) -> bool:
        """Whether two tensors hold the same values, compared some rows at a time."""
        first, second = (self._files[name].handle.get_slice(name) for name in (a, b))
        if first.get_shape() != second.get_shape():
            return False
        num_rows = first.get_shape()[0]
        spans = (slice(row, min(row + _ROWS_AT_ONCE, num_rows)) for row in range(0, num_rows, _ROWS_AT_ONCE))
        return all(torch.equal(first[span].float(), second[span].float()) for span in spans)


def _open(path: Path, promised: set[str], stack: ExitStack) -> _File:
    try:
        handle = stack.enter_context(safe_open(path, framework="pt", device="cpu", backend="pread"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing, though {WEIGHTS_INDEX} names it") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {one_line(error)}") from error
    names = frozenset(handle.keys())
    if lost := promised - names:
        raise CheckpointError(f"{path} lacks {min(lost)}, though {WEIGHTS_INDEX} says it is there")
    return _File(path, handle, names)


def _shard_paths(folder: Path) -> dict[Path, set[str]]:
    """Every weight file -> the tensors that the index says it holds."""
    if (folder / WEIGHTS).is_file():
        return {folder / WEIGHTS: set()}
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {WEIGHTS_INDEX}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    paths: dict[Path, set[str]] = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not _is_inside(file_name):
            raise CheckpointError(f"{index} places {name} in {file_name!r}, which is not a file of the folder")
        paths.setdefault(folder / file_name, set()).add(name)
    return paths


def _is_inside(file_name: str) -> bool:
    path = PurePosixPath(file_name)
    return bool(file_name) and not path.is_absolute() and ".." not in path.parts and not re.search(r"[\\\0]", file_name)


def write_shard(path: Path, content: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write one safetensors file, flushed to disk.

    `content` says what the file will hold, in order: name -> meta tensor. `tensors` gives the values in that order
    and is consumed one by one, so one of them is in memory at a time.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, meta in content.items():
        begin, end = end, end + num_bytes(meta)
        header[name] = {"dtype": _NAMES[meta.dtype], "shape": list(meta.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format wants the first tensor aligned
    with open(path, "xb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for (name, meta), (given, tensor) in zip(content.items(), tensors, strict=True):
            if (name, meta.shape, meta.dtype) != (given, tensor.shape, tensor.dtype):
                raise AssertionError(f"{path}: expected {name} {meta.shape}, got {given} {tensor.shape} {tensor.dtype}")
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def num_bytes(tensor: Tensor) -> int:
    """Bytes of the values of a tensor, meta or real."""
    return tensor.numel() * tensor.element_size()
