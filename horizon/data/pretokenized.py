"""Token ids out of files, as other programs leave them.

    NAME.npy             token ids: a one-dimensional array of integers
    NAME.bin             the same without a header, little-endian, of type data.token_dtype
    NAME.offsets.npy     where documents begin, and where the last one ends: [0, ..., number of tokens];
                         without it the file is one document
    NAME.trained.npy     one bool or 0/1 a token, which of them are trained; without it all are

The ids stay where they are: files are mapped into memory, not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from horizon.data.encoding import Tokens
from horizon.errors import ConfigError, DataError

EXTENSIONS = (".npy", ".bin")
_BESIDE = (".offsets.npy", ".trained.npy")
_DTYPES = ("uint16", "uint32", "int32", "int64")


def token_files(files: Sequence[Path]) -> list[Path]:
    """Those that hold token ids."""
    return [file for file in files if file.suffix in EXTENSIONS and not file.name.endswith(_BESIDE)]


def read_tokens(files: Sequence[Path], token_dtype: str) -> Tokens:
    """The tokens of all files, one after another.

    Raises:
        ConfigError: `token_dtype` is no type of token ids.
        DataError: a file does not hold what its name says; names it.
    """
    if token_dtype not in _DTYPES:
        raise ConfigError(f"data.token_dtype={token_dtype}: expected one of {', '.join(_DTYPES)}")
    parts = [_read(file, token_dtype) for file in files]
    if len(parts) == 1:
        return parts[0]
    return Tokens(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.trained for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        [where for part in parts for where in part.where],
    )


def _read(file: Path, token_dtype: str) -> Tokens:
    ids = _map_bin(file, token_dtype) if file.suffix == ".bin" else _map(file)
    if ids.dtype.kind not in "iu":
        raise DataError(f"{file}: holds {ids.dtype}, expected integers")
    if not len(ids):
        raise DataError(f"{file}: holds no token")
    if ids.dtype.kind == "i" and int(ids.min()) < 0:
        at = int(np.argmax(ids < 0))
        raise DataError(f"{file}: token {at} is {int(ids[at])}; ids are not negative")
    lengths = _lengths(file.with_name(f"{file.stem}.offsets.npy"), len(ids))
    where = [f"{file}: document {number}" for number in range(1, len(lengths) + 1)]
    return Tokens(ids, _trained(file.with_name(f"{file.stem}.trained.npy"), len(ids)), lengths, where)


def _map_bin(file: Path, token_dtype: str) -> NDArray[Any]:
    size, width = file.stat().st_size, np.dtype(token_dtype).itemsize
    if not size or size % width:
        raise DataError(f"{file}: {size} bytes are no array of data.token_dtype={token_dtype} ({width} bytes a token)")
    return np.memmap(file, np.dtype(token_dtype).newbyteorder("<"), mode="r")


def _map(file: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file}: no array of numpy's ({' '.join(str(error).split())[:200]})") from None
    if array.ndim != 1:
        raise DataError(f"{file}: has shape {array.shape}, expected one dimension")
    return array


def _lengths(file: Path, num_tokens: int) -> NDArray[np.int64]:
    if not file.exists():
        return np.array([num_tokens])
    found = _map(file)
    if found.dtype.kind not in "iu":
        raise DataError(f"{file}: holds {found.dtype}, expected integers")
    offsets = found.astype(np.int64)
    lengths: NDArray[np.int64] = offsets[1:] - offsets[:-1]
    if not len(lengths) or offsets[0] != 0 or offsets[-1] != num_tokens or (lengths < 0).any():
        raise DataError(f"{file}: expected offsets that rise from 0 to the number of tokens, {num_tokens}")
    return lengths


def _trained(file: Path, num_tokens: int) -> NDArray[np.bool_]:
    if not file.exists():
        return np.broadcast_to(np.True_, num_tokens)
    trained = _map(file)
    if len(trained) != num_tokens or trained.dtype.kind not in "iub":
        raise DataError(
            f"{file}: holds {len(trained)} of {trained.dtype}, expected a bool for each of {num_tokens} tokens"
        )
    return trained.astype(np.bool_)
