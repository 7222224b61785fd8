"""The AdamW update of `horizon.optim.adamw` as a numba kernel: one pass over memory, no temporaries, no GIL.

One call runs on one thread; the updater's own threads call it on different chunks, so no second pool of
threads competes with them. Importing this module imports numba and compiles (or loads from numba's cache).

Why it looks as it does. Bit-equality with torch needs fused multiply-adds in exactly two places, so they are
spelled out and contraction (`fastmath`) stays off. Vector code needs every integer to stay 32 bits wide (numba
widens `uint32 op int` to 64) and a division that cannot raise (`error_model="numpy"`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from horizon.optim.adamw import Array, StepScalars

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


def _signature(grad: Any) -> Any:
    arrays = (types.uint16, types.uint16, types.float32, types.float32, grad)
    return types.void(*(types.Array(kind, 1, "C") for kind in arrays), *[types.float32] * len(StepScalars._fields))


def compile_kernel(cache: bool) -> Callable[..., None]:
    """The kernel for both kinds of gradient, compiled now or taken from numba's cache."""
    signatures = [_signature(types.uint16), _signature(types.float32)]
    compiled: Callable[..., None] = numba.njit(
        signatures, nogil=True, fastmath=False, error_model="numpy", cache=cache
    )(_adamw)
    return compiled


try:
    adamw_kernel = compile_kernel(cache=True)
except RuntimeError:  # numba finds no folder that it may write to
    adamw_kernel = compile_kernel(cache=False)


def update_numba(
    weights: Array, residual: Array, exp_avg: Array, exp_avg_sq: Array, grads: Array, scalars: StepScalars
) -> None:
    """The update of one chunk: contiguous arrays of the kinds named in `horizon.optim.adamw`, of equal length.

    The length is not checked here: it is the caller's to see that every array has as many elements as `weights`.
    """
    adamw_kernel(weights, residual, exp_avg, exp_avg_sq, grads, *scalars)
