"""The AdamW update of what is kept in 16 or 8 bits as numba kernels; see `horizon.optim.kernel` for why they look so.

Each format of moments has a kernel for split masters and one for bf16 weights alone, made from the same body: `split`
is a constant in either, and what it leaves out the compiler drops. The latter are called with `lo` the same as `hi`.

With int8 moments a group's scales are known after its last element: its new moments wait on the stack, in the first
cache, where the compiler knows that they share no memory with the arrays. Every inner loop is over one whole group,
so its length is a constant and no loop has a rest; a group that is cut short is filled up with zeros outside.
"""
# mypy: disable-error-code="call-arg, no-untyped-call, no-untyped-def, type-var, var-annotated"

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from horizon.config.schema import MasterFormat, Moments
from horizon.optim.adamw import StepScalars, Update
from horizon.optim.kernel import _as_f32, _as_u32, _fma, _grad_f32
from horizon.optim.moments import M_SHIFT, M_TOP, MASTER_NOISE, MIX_1, MIX_2, STRIDE, TINY, V_SHIFT, V_TOP
from horizon.optim.states import update_order
from horizon.plan.states import GROUP, State

_WORDS = ir.ArrayType(ir.IntType(32), GROUP)


@intrinsic
def _stack(_context: Any) -> Any:
    """Room for a group of uint32 on the stack."""
    pointer = ir.IntType(32).as_pointer()
    return types.CPointer(types.uint32)(), lambda _, b, __, ___: b.bitcast(cgutils.alloca_once(b, _WORDS), pointer)


@intrinsic
def _get(_context: Any, words: Any, i: Any) -> Any:
    """words[i]."""
    return types.uint32(words, i), lambda _, builder, __, args: builder.load(builder.gep(args[0], [args[1]]))


@intrinsic
def _set(_context: Any, words: Any, i: Any, value: Any) -> Any:
    """words[i] = value."""

    def store(context: Any, builder: Any, _: Any, args: Any) -> Any:
        builder.store(args[2], builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(words, i, types.uint32), store


@intrinsic
def _wide(_context: Any) -> Any:
    """Have the function use the widest vectors there are: this much arithmetic gains more than a lower clock loses."""

    def mark(context: Any, builder: Any, _: Any, __: Any) -> Any:
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')  # llvmlite's own `add` knows no such pairs
        return context.get_dummy_value()

    return types.void(), mark


@numba.njit(inline="always")
def _random(first, i):
    u = np.uint32
    x = u(first + u(u(i) * u(STRIDE)))
    x = u(u(x ^ u(x >> u(16))) * u(MIX_1))
    x = u(u(x ^ u(x >> u(15))) * u(MIX_2))
    return u(x ^ u(x >> u(15)))


@numba.njit(inline="always")
def _join(hi, lo):
    u = np.uint32
    rest = u(lo)
    return _as_f32(u(u(u(hi) << u(16)) - u(u(rest & u(0x8000)) << u(1))) | rest)


@numba.njit(inline="always")
def _read(hi, lo, split):
    return _join(hi, lo) if split else _as_f32(np.uint32(np.uint32(hi) << np.uint32(16)))


@numba.njit(inline="always")
def _rounded(bits, first, i):
    """The bf16 pattern above or below a float32 pattern, at random."""
    u = np.uint32
    return np.uint16(u(bits + u(_random(u(first ^ u(MASTER_NOISE)), i) & u(0xFFFF))) >> u(16))


def _float32_bf16(hi, lo, m, v, g, b2, omb1, omb2, eps, decay, nstep, rbc2, grad_scale, first):
    for i in range(hi.size):
        p = _read(hi[i], lo[i], False) * decay
        grad = _grad_f32(g[i]) * grad_scale
        mi = _fma(omb1, grad - m[i], m[i])
        vi = _fma(omb2 * grad, grad, v[i] * b2)
        m[i] = mi
        v[i] = vi
        hi[i] = _rounded(_as_u32(p + (nstep * mi) / (np.sqrt(vi) / rbc2 + eps)), first, i)


def _bfloat16(hi, lo, m, v, g, b2, omb1, omb2, eps, decay, nstep, rbc2, grad_scale, first):
    _bfloat16_body(hi, lo, m, v, g, (b2, omb1, omb2, eps, decay, nstep, rbc2, grad_scale), first, True)


def _bfloat16_bf16(hi, lo, m, v, g, b2, omb1, omb2, eps, decay, nstep, rbc2, grad_scale, first):
    _bfloat16_body(hi, lo, m, v, g, (b2, omb1, omb2, eps, decay, nstep, rbc2, grad_scale), first, False)


@numba.njit(inline="always")
def _bfloat16_body(hi, lo, m, v, g, scalars, first, split):
    b2, omb1, omb2, eps, decay, nstep, rbc2, grad_scale = scalars
    u = np.uint32
    sign, low, sixteen = u(0x8000), u(0xFFFF), u(16)
    for i in range(hi.size):
        p = _read(hi[i], lo[i], split) * decay
        grad = _grad_f32(g[i]) * grad_scale
        m0, v0 = _grad_f32(m[i]), _grad_f32(v[i])
        mi = _fma(omb1, grad - m0, m0)
        vi = _fma(omb2 * grad, grad, v0 * b2)
        bits = _as_u32(p + (nstep * mi) / (np.sqrt(vi) / rbc2 + eps))
        random = _random(first, i)
        m[i] = np.uint16(u(_as_u32(mi) + u(random & low)) >> sixteen)
        v[i] = np.uint16(u(_as_u32(vi) + u(random >> sixteen)) >> sixteen)
        if split:
            hi[i] = np.uint16(u(bits + sign) >> sixteen)
            lo[i] = np.uint16(bits & low)
        else:
            hi[i] = _rounded(bits, first, i)


def _int8(hi, lo, m, v, g, ms, vs, b2, omb1, omb2, eps, decay, nstep, rbc2, grad_scale, first):
    _wide()
    arrays, scalars = (hi, lo, m, v, g, ms, vs), (b2, omb1, omb2, eps, decay, nstep, rbc2, grad_scale)
    waiting = _stack(), _stack(), _stack()
    for start in range(0, hi.size, GROUP):
        _group(start, arrays, scalars, first, waiting, True)


def _int8_bf16(hi, lo, m, v, g, ms, vs, b2, omb1, omb2, eps, decay, nstep, rbc2, grad_scale, first):
    _wide()
    arrays, scalars = (hi, lo, m, v, g, ms, vs), (b2, omb1, omb2, eps, decay, nstep, rbc2, grad_scale)
    waiting = _stack(), _stack(), _stack()
    for start in range(0, hi.size, GROUP):
        _group(start, arrays, scalars, first, waiting, False)


@numba.njit(inline="always")
def _group(start, arrays, scalars, first, waiting, split):
    """The group that begins at element `start`; `waiting`: three places on the stack."""
    hi, lo, m, v, g, ms, vs = arrays
    b2, omb1, omb2, eps, decay, nstep, rbc2, grad_scale = scalars
    new_p, new_m, new_root = waiting
    u, f, at = np.uint32, np.float32, np.uintp
    one, low, magnitude = u(0x3F800000), u(0xFFFF), u(0x7FFFFFFF)
    group = at(start // GROUP)
    m_unit, v_unit = ms[group] * f(1 / M_TOP), vs[group] * f(1 / V_TOP)
    m_most, v_most = u(0), u(0)  # patterns of floats >= 0 are in the order of the floats
    for j in range(GROUP):
        i = at(start + j)
        p = _read(hi[i], lo[i], split) * decay
        grad = _grad_f32(g[i]) * grad_scale
        code = u(m[i])
        size = (_as_f32(u(u(u(code & u(127)) << u(M_SHIFT)) + one)) - f(1)) * m_unit
        m0 = _as_f32(u(_as_u32(size) | u(u(code & u(128)) << u(24))))
        root = (_as_f32(u(u(u(v[i]) << u(V_SHIFT)) + one)) - f(1)) * v_unit
        mi = _fma(omb1, grad - m0, m0)
        root = np.sqrt(_fma(omb2 * grad, grad, root * root * b2))
        _set(new_p, j, _as_u32(p + (nstep * mi) / (root / rbc2 + eps)))
        _set(new_m, j, _as_u32(mi))
        _set(new_root, j, _as_u32(root))
        m_most = u(max(m_most, u(_as_u32(mi) & magnitude)))
        v_most = u(max(v_most, _as_u32(root)))
    m_top, v_top = _as_f32(m_most), _as_f32(v_most)
    ms[group], vs[group] = m_top, v_top
    m_factor = f(M_TOP) / m_top if m_top >= f(TINY) else f(0)
    v_factor = f(V_TOP) / v_top if v_top >= f(TINY) else f(0)
    # Loops with few stores: a store into an array may be into another one for all the compiler knows.
    for j in range(GROUP):
        bits = _get(new_p, j)
        if split:
            hi[at(start + j)] = np.uint16(u(bits + u(0x8000)) >> u(16))
            lo[at(start + j)] = np.uint16(bits & low)
        else:
            hi[at(start + j)] = _rounded(bits, first, start + j)
    for j in range(GROUP):
        random, bits = _random(first, start + j), _get(new_m, j)
        _set(new_p, j, random)
        x = _as_u32(_as_f32(u(bits & magnitude)) * m_factor + f(1))
        code = u(min(u(u(u(x - one) + u(random >> u(13))) >> u(M_SHIFT)), u(127)))
        m[at(start + j)] = np.uint8(code | u(u(bits >> u(24)) & u(128)))
    for j in range(GROUP):
        bits = _get(new_root, j)
        x = _as_u32(_as_f32(bits) * v_factor + f(1))
        code = u(u(u(x - one) + u(_get(new_p, j) & u((1 << V_SHIFT) - 1))) >> u(V_SHIFT))
        v[at(start + j)] = np.uint8(min(max(code, min(bits, u(1))), u(255)))


GRADS = (types.uint16, types.float32)
KINDS: dict[Moments, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    # of the arrays after the master: exp_avg, exp_avg_sq, and the scales behind the gradient
    Moments.float32: ((types.float32, types.float32), ()),
    Moments.bfloat16: ((types.uint16, types.uint16), ()),
    Moments.int8: ((types.uint8, types.uint8), (types.float32, types.float32)),
}
BODIES = {
    (Moments.bfloat16, MasterFormat.split): _bfloat16,
    (Moments.int8, MasterFormat.split): _int8,
    (Moments.float32, MasterFormat.bf16_stochastic): _float32_bf16,
    (Moments.bfloat16, MasterFormat.bf16_stochastic): _bfloat16_bf16,
    (Moments.int8, MasterFormat.bf16_stochastic): _int8_bf16,
}


def compile_kernel(
    moments: Moments, cache: bool, grads: Sequence[Any] = GRADS, master: MasterFormat = MasterFormat.split
) -> Callable[..., None]:
    """The kernel of these formats for these kinds of gradient, compiled now or taken from numba's cache."""
    function, (kept, scales) = BODIES[moments, master], KINDS[moments]
    scalars = [*[types.float32] * len(StepScalars._fields), types.uint32]
    signatures = []
    for grad in grads:
        arrays = (types.uint16, types.uint16, *kept, grad, *scales)
        signatures.append(types.void(*(types.Array(kind, 1, "C") for kind in arrays), *scalars))
    compiled: Callable[..., None] = numba.njit(
        signatures, nogil=True, fastmath=False, error_model="numpy", cache=cache
    )(function)
    return compiled


@functools.cache
def narrow_update(moments: Moments, master: MasterFormat = MasterFormat.split) -> Update:
    """The update of these formats, not all in fp32, as `horizon.optim.moments` has it; lengths are not checked."""
    try:
        kernel = compile_kernel(moments, cache=True, master=master)
    except RuntimeError:  # numba finds no folder that it may write to
        kernel = compile_kernel(moments, cache=False, master=master)

    def update(*arguments: Any) -> None:
        *arrays, scalars, first = arguments
        kernel(*arrays[: 1 if master is MasterFormat.bf16_stochastic else 0], *arrays, *scalars, first)

    return _by_groups(update, update_order(moments, master)) if moments is Moments.int8 else update


def _by_groups(update: Update, order: Sequence[State]) -> Update:
    """`update` for chunks whose last group is cut short."""

    def by_groups(*arguments: Any) -> None:
        *arrays, scalars, first = arguments
        size = arrays[0].size
        whole = size // GROUP * GROUP
        update(*(a[state.span(0, whole)] for a, state in zip(arrays, order, strict=True)), scalars, first)
        if whole < size:
            rest = [a[state.span(whole, size)] for a, state in zip(arrays, order, strict=True)]
            filled = [np.zeros(state.span(0, GROUP).stop, a.dtype) for a, state in zip(rest, order, strict=True)]
            for full, part in zip(filled, rest, strict=True):
                full[: part.size] = part
            update(*filled, scalars, np.uint32((int(first) + whole * STRIDE) & 0xFFFFFFFF))
            for full, part in zip(filled, rest, strict=True):
                part[:] = full[: part.size]

    return by_groups
