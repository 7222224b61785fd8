"""The noise of `horizon.zo.noise` and the update of `horizon.zo.perturb` as a numba kernel on fp32 values.

One call runs on one thread and allocates nothing. See `horizon.optim.kernel` for how such a kernel has to look:
32-bit integers stay 32 bits wide, and fused multiply-adds are spelled out and made nowhere else. numba keeps what it
compiled for as long as this file is the same: after a change of the numbers in `horizon.zo.noise`, touch it.
"""
# mypy: disable-error-code="call-arg, no-untyped-call, no-untyped-def, type-var, var-annotated"

from __future__ import annotations

import numba
import numpy as np
import torch
from numba import types

from horizon.optim.kernel import CACHE, _as_f32, _as_u32, _fma
from horizon.zo import noise
from horizon.zo.noise import GROUP, HALF, Array
from horizon.zo.table import FIRST_UPDATE, TERM, UPDATE

_U32, _F32 = np.uint32, np.float32
_M1, _M2, _M3 = _U32(noise.MIX_1), _U32(noise.MIX_2), _U32(noise.MIX_3)
_ONE_BITS, _ODD_ONE_BITS = _U32(noise.ONE_BITS), _U32(noise.ODD_ONE_BITS)
_SIGN, _SWAP, _GUESS = _U32(noise.SIGN_BIT), _U32(noise.SWAP_BIT), _U32(noise.ROOT_GUESS)
_R1, _R2, _R3, _R4 = _F32(noise.ROOT_1), _F32(noise.ROOT_2), _F32(noise.ROOT_3), _F32(noise.ROOT_4)
_MANTISSA, _ROOT_HALF = _U32(noise.MANTISSA), _U32(noise.ROOT_HALF_BITS)
_L0, _L1, _L2, _L3, _L4, _L5, _L6 = (_F32(c) for c in noise.LOG)
_LOG_2 = _F32(noise.LOG_2)
_S0, _S1, _S2, _S3 = (_F32(c) for c in noise.SIN)
_C0, _C1, _C2, _C3 = (_F32(c) for c in noise.COS)
_ONE, _TWO, _MIDDLE = _F32(1), _F32(2), _F32(1.5)
_1, _9, _15, _16, _23 = _U32(1), _U32(9), _U32(15), _U32(16), _U32(23)
_BELOW = _F32(64)  # added to an exponent's bits so that they are not negative, and taken off as a float
_SHIFT = _U32((64 << 23) - noise.ROOT_HALF_BITS & 0xFFFFFFFF)


@numba.njit(inline="always")
def _first_word(pair, k0, k1):
    a = _U32(pair + k0)
    a = _U32(a ^ (a >> _16))
    a = _U32(a * _M1)
    a = _U32(a ^ (a >> _15) ^ k1)
    a = _U32(a * _M2)
    return _U32(a ^ (a >> _16))


@numba.njit(inline="always")
def _normals(pair, k0, k1):
    a = _first_word(pair, k0, k1)
    b = _U32(a * _M3)
    b = _U32(b ^ (b >> _15) ^ k0)
    b = _U32(b * _M1)
    b = _U32(b ^ (b >> _16))
    u = _TWO - _as_f32(_U32((a >> _9) | _ODD_ONE_BITS))
    shifted = _U32(_as_u32(u) + _SHIFT)
    exponent = _F32(np.int32(shifted >> _23)) - _BELOW
    f = _as_f32(_U32((shifted & _MANTISSA) + _ROOT_HALF)) - _ONE
    log = _fma(_fma(_fma(_fma(_fma(_fma(_L6, f, _L5), f, _L4), f, _L3), f, _L2), f, _L1), f, _L0)
    x = _fma(exponent, _LOG_2, f * log)
    y = _as_f32(_U32(_GUESS - (_as_u32(x) >> _1)))
    y = y * _fma(x * _R1, y * y, _R2)
    radius = x * (y * _fma(x * _R3, y * y, _R4))
    w = _as_f32(_U32((b & _MANTISSA) | _ONE_BITS)) - _MIDDLE
    square = w * w
    across = w * _fma(_fma(_fma(_S3, square, _S2), square, _S1), square, _S0)
    along = _as_f32(_U32(_as_u32(_fma(_fma(_fma(_C3, square, _C2), square, _C1), square, _C0)) ^ (b & _SIGN)))
    swapped = (b & _SWAP) != _U32(0)
    return radius * (across if swapped else along), radius * (along if swapped else across)


_FP16_DROPPED, _SMALLEST_NORMAL = _U32(noise.DROPPED[torch.float16]), _F32(noise.SMALLEST_NORMAL)
_FIXED_POINT = _F32(noise.FIXED_POINT)

_FLOATS, _BITS = types.Array(types.float32, 1, "C"), types.Array(types.uint32, 1, "C")


@numba.njit(nogil=True, error_model="numpy")
def _add_noise(a, b, first, k0, k1, coefficient):
    for j in range(HALF):
        za, zb = _normals(_U32(first + _U32(j)), k0, k1)
        a[j] = _fma(coefficient, za, a[j])
        b[j] = _fma(coefficient, zb, b[j])


@numba.njit(inline="always")
def _rounded(w, word, dropped, below, kept):
    bits = _U32(_U32(_as_u32(w) + (word & below)) & kept)
    small = (dropped == _FP16_DROPPED) & (abs(w) < _SMALLEST_NORMAL)
    return (w + _FIXED_POINT) - _FIXED_POINT if small else _as_f32(bits)


@numba.njit(nogil=True, error_model="numpy")
def _round(a, b, first, k0, k1, dropped):
    below = _U32((_U32(1) << dropped) - _U32(1))
    kept = _U32(~below)
    for j in range(HALF):
        word = _first_word(_U32(first + _U32(j)), k0, k1)
        a[j] = _rounded(a[j], word, dropped, below, kept)
        b[j] = _rounded(b[j], _U32(word >> _16), dropped, below, kept)


@numba.njit(nogil=True, error_model="numpy")
def _apply_updates(a, b, first, row, decays, dropped):
    at = FIRST_UPDATE
    for _ in range(row[0]):
        num_terms, decay = row[at], _as_f32(row[at + 1])
        k0, k1 = row[at + 2], row[at + 3]
        at += UPDATE
        if decay != _ONE:
            for chunk in range(32):
                if (decays >> _U32(chunk)) & _U32(1):
                    half = a if chunk < 16 else b
                    start = (chunk % 16) * 64
                    for j in range(start, start + 64):
                        half[j] = half[j] * decay
        for _ in range(num_terms):
            _add_noise(a, b, first, row[at], row[at + 1], _as_f32(row[at + 2]))
            at += TERM
        if dropped:
            _round(a, b, first, k0, k1, dropped)


@numba.njit(
    [types.void(_FLOATS, _FLOATS, _FLOATS, _BITS, types.int64, types.uint32, types.int64, _BITS, types.float32,
                types.uint32, types.boolean)],
    nogil=True, error_model="numpy", cache=CACHE,
)  # fmt: skip
def _run(w, plus, minus, row, noise_at, first_pair, trained, decays, eps, dropped, updates):
    for g in range(w.size // GROUP):
        start, middle, end = g * GROUP, g * GROUP + HALF, (g + 1) * GROUP
        first, noisy = _U32(first_pair + _U32(g * HALF)), g < trained
        a, b = w[start:middle], w[middle:end]
        if noisy and updates:
            _apply_updates(a, b, first, row, decays[g], dropped)
        if plus.size:
            plus[start:end] = w[start:end]
        if minus.size:
            minus[start:end] = w[start:end]
            if noisy:
                k0, k1 = row[noise_at], row[noise_at + 1]
                _add_noise(plus[start:middle], plus[middle:end], first, k0, k1, eps)
                _add_noise(minus[start:middle], minus[middle:end], first, k0, k1, -eps)


def run_piece(
    w: Array, plus: Array, minus: Array, row: Array, noise_at: int, first_pair: int, trained: int, decays: Array,
    eps: float, dropped: int, updates: bool,
) -> None:  # fmt: skip
    """Update the values `w` of some groups of a block in place, and make their copies.

    Args:
        w: fp32 [groups * 2048]; plus, minus: as long, or empty where there is to be no such copy. Both: w + eps z and
            w - eps z. Only `plus`: w.
        row: the block's row of a `horizon.zo.table`.
        noise_at: where in it the key of the copies' noise is.
        first_pair: number of the first group's first pair in the block.
        trained: so many of the groups, the first ones, have noise and updates.
        decays: of each group, which of its 32 chunks decay, as bits.
        dropped: low bits of fp32 that the master does not keep: they are rounded away stochastically.
        updates: whether to apply the row's updates.
    """
    _run(
        w, plus, minus, row, noise_at, _U32(first_pair), trained, decays, _F32(eps), _U32(dropped), updates
    )  # fmt: skip
