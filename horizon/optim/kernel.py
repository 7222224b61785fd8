"""The AdamW update of `horizon.optim.adamw` as a numba kernel: one pass over memory, no temporaries, no GIL.

Below it, what `horizon.optim.speculation` needs: the same update before the norm is known, and its inverse.

One call runs on one thread; the updater's own threads call it on different chunks, so no second pool of
threads competes with them. Importing this module imports numba and compiles (or loads from numba's cache).

Why it looks as it does. Bit-equality with torch needs fused multiply-adds in exactly two places, so they are
spelled out and contraction (`fastmath`) stays off. Vector code needs every integer to stay 32 bits wide (numba
widens `uint32 op int` to 64) and a division that cannot raise (`error_model="numpy"`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from horizon.optim.adamw import Array, StepScalars

PIECE = 1024  # elements that speculation updates, or leaves, together: 14 KiB, which the first cache holds

_F32, _I32 = ir.FloatType(), ir.IntType(32)


@intrinsic
def _as_f32(_context: Any, _bits: Any) -> Any:
    """The float32 with the bit pattern of a uint32."""
    return types.float32(types.uint32), lambda _, builder, __, args: builder.bitcast(args[0], _F32)


@intrinsic
def _as_u32(_context: Any, _value: Any) -> Any:
    """The bit pattern of a float32."""
    return types.uint32(types.float32), lambda _, builder, __, args: builder.bitcast(args[0], _I32)


@intrinsic
def _fma(_context: Any, _a: Any, _b: Any, _c: Any) -> Any:
    """a * b + c, rounded once."""
    signature = types.float32(types.float32, types.float32, types.float32)
    return signature, lambda _, builder, __, args: builder.fma(*args)


@intrinsic
def _grad_f32(_context: Any, grad: Any) -> Any:
    """A gradient element as float32: bf16 bits widened, float32 as it is."""
    if grad == types.float32:
        return types.float32(grad), lambda _, __, ___, args: args[0]

    def widen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.bitcast(builder.shl(builder.zext(args[0], _I32), ir.Constant(_I32, 16)), _F32)

    return types.float32(types.uint16), widen


def _adamw(hi, lo, m, v, g, b2, omb1, omb2, eps, decay, nstep, rbc2, grad_scale):  # type: ignore[no-untyped-def]
    one, sixteen = np.uint32(1), np.uint32(16)
    sign, low = np.uint32(0x8000), np.uint32(0xFFFF)
    for i in range(hi.size):
        rest = np.uint32(lo[i])
        p = _as_f32(((np.uint32(hi[i]) << sixteen) - ((rest & sign) << one)) | rest) * decay  # type: ignore[call-arg]
        grad = _grad_f32(g[i]) * grad_scale
        mi = _fma(omb1, grad - m[i], m[i])
        vi = _fma(omb2 * grad, grad, v[i] * b2)
        bits = _as_u32(p + (nstep * mi) / (np.sqrt(vi) / rbc2 + eps))
        m[i] = mi
        v[i] = vi
        hi[i] = np.uint16((bits + sign) >> sixteen)
        lo[i] = np.uint16(bits & low)


def _signature(grad: Any, num_more: int = 0, *others: Any) -> Any:
    arrays = (types.uint16, types.uint16, types.float32, types.float32, grad, *others)
    scalars = [types.float32] * (len(StepScalars._fields) + num_more)
    return types.void(*(types.Array(kind, 1, "C") for kind in arrays), *scalars)


def compile_kernel(cache: bool) -> Callable[..., None]:
    """The kernel for both kinds of gradient, compiled now or taken from numba's cache."""
    return _compile(_adamw, [_signature(types.uint16), _signature(types.float32)], cache)


def _compile(function: Callable[..., None], signatures: list[Any], cache: bool) -> Callable[..., None]:
    compiled: Callable[..., None] = numba.njit(
        signatures, nogil=True, fastmath=False, error_model="numpy", cache=cache
    )(function)
    return compiled


try:
    adamw_kernel = compile_kernel(cache=True)
    CACHE = True
except RuntimeError:  # numba finds no folder that it may write to
    adamw_kernel = compile_kernel(cache=False)
    CACHE = False


def update_numba(
    weights: Array, residual: Array, exp_avg: Array, exp_avg_sq: Array, grads: Array, scalars: StepScalars
) -> None:
    """The update of one chunk: contiguous arrays of the kinds named in `horizon.optim.adamw`, of equal length.

    The length is not checked here: it is the caller's to see that every array has as many elements as `weights`.
    """
    adamw_kernel(weights, residual, exp_avg, exp_avg_sq, grads, *scalars)


@numba.njit(
    [types.void(*[types.Array(t, 1, "C") for t in (types.int16, types.int16, types.int32)])], nogil=True, cache=CACHE
)
def join_numba(high, low, bits):  # type: ignore[no-untyped-def]
    """Fill `bits` with masters of which these are the halves: `horizon.store.split.join_master` on one thread."""
    for i in range(bits.size):
        bits[i] = (np.int32(high[i]) << np.int32(16)) + np.int32(low[i])


@numba.njit(
    [types.void(*[types.Array(t, 1, "C") for t in (types.int32, types.int16, types.int16)])], nogil=True, cache=CACHE
)
def split_numba(bits, high, low):  # type: ignore[no-untyped-def]
    """Fill the halves of masters, which `bits` are: `horizon.store.split.split_master` on one thread."""
    half, sixteen = np.uint32(0x8000), np.uint32(16)
    for i in range(bits.size):
        u = np.uint32(bits[i])
        high[i] = np.int16((u + half) >> sixteen)
        low[i] = np.int16(u)


# ---- updates made before the norm is known, and taken back: see `horizon.optim.speculation`

_HALVES, _FLOATS = types.Array(types.uint16, 1, "C"), types.Array(types.float32, 1, "C")


# The count is vector code only if the signature says that it has 32 bits.
@numba.njit([types.uint32(_HALVES, _FLOATS, grad, *[types.float32] * 4) for grad in (_HALVES, _FLOATS)], cache=CACHE)
def _num_outweighed(hi, v, g, omb2, floor, ceiling, reach):  # type: ignore[no-untyped-def]
    """How many elements have a gradient beside which too little of the old `v` would be left in the new one."""
    sixteen, magnitude = np.uint32(16), np.uint32(0x7FFF)
    num = np.uint32(0)
    for i in range(hi.size):
        grad = _grad_f32(g[i])  # type: ignore[call-arg,var-annotated]
        size = _as_f32((np.uint32(hi[i]) & magnitude) << sixteen)
        size = size if size > floor else floor
        size = size if size < ceiling else ceiling
        light = omb2 * grad * grad <= v[i] * (size * reach)
        num += np.uint32(0) if light | (v[i] == np.float32(0)) else np.uint32(1)
    return num


@numba.njit(error_model="numpy", cache=CACHE)
def _undo(hi, lo, m, v, g, omb1, omb2, eps, decay, nstep, rbc2, over_b1, over_b2):  # type: ignore[no-untyped-def]
    one, sixteen = np.uint32(1), np.uint32(16)
    sign, low, zero = np.uint32(0x8000), np.uint32(0xFFFF), np.float32(0)
    for i in range(hi.size):
        rest = np.uint32(lo[i])
        p = _as_f32(((np.uint32(hi[i]) << sixteen) - ((rest & sign) << one)) | rest)  # type: ignore[call-arg,var-annotated]
        grad, mi, vi = _grad_f32(g[i]), m[i], v[i]
        bits = _as_u32((p - (nstep * mi) / (np.sqrt(vi) / rbc2 + eps)) / decay)
        old_m = _fma(-omb1, grad, mi) * over_b1
        old_v = _fma(-(omb2 * grad), grad, vi) * over_b2
        m[i] = zero if mi == omb1 * grad else old_m
        v[i] = zero if (vi == omb2 * grad * grad) | (old_v < zero) else old_v
        hi[i] = np.uint16((bits + sign) >> sixteen)
        lo[i] = np.uint16(bits & low)


def _speculate(hi, lo, m, v, g, waits, b2, omb1, omb2, eps, decay, nstep, rbc2, grad_scale, floor, ceiling, reach):  # type: ignore[no-untyped-def]
    for piece in range(waits.size):
        a, b = piece * PIECE, min((piece + 1) * PIECE, hi.size)
        if _num_outweighed(hi[a:b], v[a:b], g[a:b], omb2, floor, ceiling, reach) == 0:
            adamw_kernel(
                hi[a:b], lo[a:b], m[a:b], v[a:b], g[a:b], b2, omb1, omb2, eps, decay, nstep, rbc2, grad_scale
            )  # fmt: skip
            waits[piece] = np.uint8(0)


def _settle(hi, lo, m, v, g, waits, b2, omb1, omb2, eps, decay, nstep, rbc2, grad_scale, over_b1, over_b2):  # type: ignore[no-untyped-def]
    one = np.float32(1)
    for piece in range(waits.size):
        a, b = piece * PIECE, min((piece + 1) * PIECE, hi.size)
        piece_decay = decay
        if not waits[piece]:
            if grad_scale == one:
                continue
            _undo(hi[a:b], lo[a:b], m[a:b], v[a:b], g[a:b], omb1, omb2, eps, one, nstep, rbc2, over_b1, over_b2)
            piece_decay = one  # what comes back is decayed already
        adamw_kernel(
            hi[a:b], lo[a:b], m[a:b], v[a:b], g[a:b], b2, omb1, omb2, eps, piece_decay, nstep, rbc2, grad_scale
        )  # fmt: skip


def _restore(hi, lo, m, v, g, waits, b2, omb1, omb2, eps, decay, nstep, rbc2, grad_scale, over_b1, over_b2):  # type: ignore[no-untyped-def]
    for piece in range(waits.size):
        a, b = piece * PIECE, min((piece + 1) * PIECE, hi.size)
        if not waits[piece]:
            _undo(hi[a:b], lo[a:b], m[a:b], v[a:b], g[a:b], omb1, omb2, eps, decay, nstep, rbc2, over_b1, over_b2)


@functools.cache
def speculation_kernels() -> tuple[Callable[..., None], Callable[..., None], Callable[..., None]]:
    """`speculate`, `settle` and `restore` of `horizon.optim.speculation`, compiled now or taken from numba's cache.

    Arguments: the five arrays of a chunk, its marks (uint8 [pieces], 1: waits), the step's scalars, and those of
    `trust`, or of `inverses`.
    """

    def compiled(function: Callable[..., None], num_more: int) -> Callable[..., None]:
        kinds = [_signature(grad, num_more, types.uint8) for grad in (types.uint16, types.float32)]
        return _compile(function, kinds, CACHE)

    return compiled(_speculate, 3), compiled(_settle, 2), compiled(_restore, 2)
