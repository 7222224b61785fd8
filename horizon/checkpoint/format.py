"""The format of a checkpoint: which arrays there are, what they are called on disk, and how they are cut into chunks.

    step-00000120/
        manifest.json                                     written last; see `horizon.checkpoint.manifest`
        arrays/model.embed_tokens.weight/master/          one zarr3 array for each parameter and state:
            zarr.json                                     shape, data type, chunks
            c.0.0  c.1.0  ...                             a chunk each: little-endian numbers, and their crc32c

`docs/checkpoint-format.md` documents it to the byte. Every place on disk follows from a name in the manifest by
`encode_name`, which no name can make leave the folder; what the folder holds beside these places is never opened.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from horizon.config.schema import MasterFormat, Moments
from horizon.layout import BlockLayout, Param
from horizon.plan.states import GROUP, MASTERS, MOMENTS, State
from horizon.units import MIB

MANIFEST = "manifest.json"
ARRAYS = "arrays"
MASTER_KIND = "master"  # fp32, joined from weights and residual, or bf16: the weights alone
BUFFER_KIND = "buffer"  # what the model's state dict holds beside parameters
CHUNK_BYTES = 64 * MIB
CRC_BYTES = 4  # of crc32c behind a chunk's numbers

# torch's and zarr3's names of the data types that arrays have
DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64,
    "uint8": torch.uint8, "int8": torch.int8, "int16": torch.int16, "int32": torch.int32, "int64": torch.int64,
    "bool": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_MAX_NAME_BYTES = 200  # of a folder's name; file systems allow 255
_SAFE = re.compile(rb"[A-Za-z0-9_\-.]")
_HASH_BYTES = 16


@dataclass(frozen=True)
class ArraySpec:
    """One array of a checkpoint: a state of a parameter (or a buffer of the model) in its shape.

    Moments of 8 bits have a scale for each 64 numbers of the flat parameter: their scales are arrays of one dimension.
    """

    name: str  # Hugging Face name of the parameter or buffer
    kind: str  # master, buffer, or one of the moments in `horizon.plan.states`
    shape: tuple[int, ...]
    dtype: str

    @cached_property
    def chunk(self) -> tuple[int, ...]:
        """The shape of a chunk: consecutive numbers, `CHUNK_BYTES` at most; chunks are of one size but for the last."""
        return chunk_shape(self.shape, DTYPES[self.dtype].itemsize)

    @property
    def num_bytes(self) -> int:
        """Bytes of the numbers, without checksums and what fills the last chunk up."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def chunk_file_bytes(self) -> int:
        """The size of each of its chunks' files."""
        return math.prod(self.chunk) * DTYPES[self.dtype].itemsize + CRC_BYTES

    @property
    def folder(self) -> str:
        """Where the array lies inside the checkpoint, with forward slashes."""
        return f"{ARRAYS}/{encode_name(self.name)}/{self.kind}"

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """All chunks, in the order of the flat numbers; kept, for every save begins with a look at them."""
        return tuple(cut_chunks(self.shape, self.chunk))

    def zarr_metadata(self) -> dict[str, Any]:
        """What its zarr.json says."""
        return {
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "fill_value": False if self.dtype == "bool" else 0,
        }


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of an array that is one file."""

    file: str
    index: tuple[slice, ...]  # in the array
    start: int  # of the flat array, first number
    stop: int


@dataclass(frozen=True)
class StateArray:
    """An array, and the numbers of a block's flat states that it is made from."""

    spec: ArraySpec
    block: int
    states: tuple[str, ...]  # weights and residual, which are joined, or one that is copied
    start: int  # of the first number in the flat state


def list_arrays(
    layouts: Sequence[BlockLayout], moments: Moments | None, master: MasterFormat = MasterFormat.split
) -> list[StateArray]:
    """The arrays of a model whose masters and moments (None: it has none) are kept in a format, block by block."""
    kinds = () if moments is None else MOMENTS[moments]
    return [
        array
        for layout in layouts
        for param in layout.params
        for array in (
            _master(layout, param, master),
            *(_moment(layout, param, s) for s in kinds if param.spec.trainable),
        )
    ]


def _master(layout: BlockLayout, param: Param, master: MasterFormat) -> StateArray:
    states = MASTERS[master]
    dtype = "float32" if len(states) == 2 else DTYPE_NAMES[states[0].dtype]
    spec = ArraySpec(param.name, MASTER_KIND, param.spec.shape, dtype)
    return StateArray(spec, layout.index, tuple(state.name for state in states), param.offset)


def _moment(layout: BlockLayout, param: Param, state: State) -> StateArray:
    span = state.span(param.offset, param.end)
    shape = param.spec.shape if state.group == 1 else (span.stop - span.start,)
    return StateArray(
        ArraySpec(param.name, state.name, shape, DTYPE_NAMES[state.dtype]), layout.index, (state.name,), span.start
    )


def encode_name(name: str) -> str:
    """`name` as the name of one folder: letters, digits, `_`, `-` and `.` stay, other bytes of its UTF-8 become %XX.

    A dot at the beginning becomes %2E, so that none is `.`, `..` or hidden. No two names give the same, and none is
    longer than a file system allows: a long one ends in % and a hash of the whole.
    """
    raw = name.encode("utf-8", "surrogatepass")
    encoded = "".join(
        chr(byte) if _SAFE.match(bytes([byte])) and not (position == 0 and byte == ord(".")) else f"%{byte:02X}"
        for position, byte in enumerate(raw)
    )
    if encoded and len(encoded) <= _MAX_NAME_BYTES:
        return encoded
    from hashlib import blake2b

    ending = f"%~{blake2b(raw, digest_size=_HASH_BYTES).hexdigest()}"
    return encoded[: _MAX_NAME_BYTES - len(ending)] + ending


def chunk_shape(shape: Sequence[int], itemsize: int, chunk_bytes: int = CHUNK_BYTES) -> tuple[int, ...]:
    """The shape of the chunks of an array: each a run of its flat numbers, of at most `chunk_bytes`.

    Chunks are about equal, so that little is written to fill up the last, and begin at multiples of `GROUP` numbers
    where the shape allows that.
    """
    limit = max(chunk_bytes // itemsize, 1)
    whole = tuple(max(size, 1) for size in shape)
    if math.prod(whole) <= limit:
        return whole
    axis = next(axis for axis in range(len(whole)) if math.prod(whole[axis + 1 :]) <= limit)
    rest = math.prod(whole[axis + 1 :])
    most = limit // rest
    size = -(-whole[axis] // -(-whole[axis] // most))
    unit = GROUP // math.gcd(GROUP, rest)
    aligned = -(-size // unit) * unit
    return (*(1,) * axis, min(aligned if aligned <= most else size, whole[axis]), *whole[axis + 1 :])


def cut_chunks(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[Chunk]:
    """The chunks of an array whose chunk shape is `chunk_shape`'s."""
    starts = [range(0, size, step) for size, step in zip(shape, chunk, strict=True)]
    flat = 0
    for corner in itertools.product(*starts):
        index = tuple(
            slice(first, min(first + step, size)) for first, step, size in zip(corner, chunk, shape, strict=True)
        )
        grid = [first // step for first, step in zip(corner, chunk, strict=True)]
        numel = math.prod(part.stop - part.start for part in index)
        yield Chunk(".".join(["c", *map(str, grid)]), index, flat, flat + numel)
        flat += numel
