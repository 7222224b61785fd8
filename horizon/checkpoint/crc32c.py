"""CRC-32C, which stands behind every chunk of an array on disk: eight bytes at a time by tables, without the GIL.

The polynomial is Castagnoli's, reflected. Table k, byte b: what `b` followed by k zero bytes leaves of the remainder.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types
from numpy.typing import NDArray

from horizon.optim.kernel import CACHE

_POLYNOMIAL = 0x82F63B78
_BYTE, _ONES = np.uint64(0xFF), np.uint64(0xFFFFFFFF)


def _tables() -> NDArray[np.uint64]:
    tables = np.empty((8, 256), np.uint64)
    first = np.arange(256, dtype=np.uint64)
    for _ in range(8):
        first = np.where(first & np.uint64(1), first >> np.uint64(1) ^ np.uint64(_POLYNOMIAL), first >> np.uint64(1))
    tables[0] = first
    for k in range(1, 8):
        tables[k] = tables[k - 1] >> np.uint64(8) ^ first[tables[k - 1] & _BYTE]
    return tables


_T = _tables()


@numba.njit(
    [types.uint64(types.Array(types.uint64, 1, "C"), types.Array(types.uint8, 1, "C"))], nogil=True, cache=CACHE
)
def _crc32c(words, rest):  # type: ignore[no-untyped-def]
    """Of little-endian words and the bytes behind them."""
    crc = _ONES
    for i in range(words.size):
        x = words[i]
        # what does not depend on the word before stands apart: the processor is ahead with it
        last = _T[3, x >> 32 & _BYTE] ^ _T[2, x >> 40 & _BYTE] ^ _T[1, x >> 48 & _BYTE] ^ _T[0, x >> 56]
        x ^= crc
        crc = (_T[7, x & _BYTE] ^ _T[6, x >> 8 & _BYTE]) ^ (_T[5, x >> 16 & _BYTE] ^ _T[4, x >> 24 & _BYTE]) ^ last
    for i in range(rest.size):
        crc = _T[0, (crc ^ rest[i]) & _BYTE] ^ crc >> 8
    return crc ^ _ONES


def crc32c(data: NDArray[Any]) -> int:
    """The checksum of bytes: uint8, flat, contiguous and writable."""
    end = data.size // 8 * 8
    return int(_crc32c(data[:end].view(np.uint64), data[end:]))
