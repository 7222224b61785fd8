"""What is kept in 16 or 8 bits: the random bits, and the update as plain numpy and torch operations.

The formats are defined at the head of `horizon.optim.adamw`; `horizon.optim.narrow` is the same as compiled kernels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from horizon.optim.adamw import TORCH_PIECE, Array, StepScalars, Update, update_torch
from horizon.plan.states import GROUP

STRIDE, MIX_1, MIX_2 = 0x9E3779B9, 0x21F0AAAD, 0x735A2D97
M_TOP, M_SHIFT = 247, 19  # x of the largest |m|: code 127 is 1 + x = 248; bits below a code's last
V_TOP, V_SHIFT = 251, 18  # x of the largest sqrt(v): code 255 is 1 + x = 252
MASTER_NOISE = np.uint32(1 << 31)  # added to the noise of a block: that of elements which no block has
TINY = 2.0**-100  # a group whose largest is below is stored as zeros: its reciprocal could be infinite

Bits = NDArray[np.uint32]
_U = np.uint32
_ONE = _U(0x3F800000)  # the pattern of 1.0


def noise(seed: int, step: int, block: int, element: int = 0) -> np.uint32:
    """What the random bits of a block's elements from number `element` on, at one step, are made from."""
    digest = hashlib.blake2b(f"{seed} {step} {block}".encode(), digest_size=4).digest()
    return _U((int.from_bytes(digest, "little") + element * STRIDE) & 0xFFFFFFFF)


def random_bits(first: np.uint32, num: int) -> Bits:
    """32 bits each of `num` elements; `first`: the noise of the first."""
    x = np.arange(num, dtype=_U) * _U(STRIDE) + first
    x = (x ^ x >> _U(16)) * _U(MIX_1)
    x = (x ^ x >> _U(15)) * _U(MIX_2)
    return x ^ x >> _U(15)


def update_torch_bfloat16(
    weights: Array, residual: Array, exp_avg: Array, exp_avg_sq: Array, grads: Array, scalars: StepScalars,
    first: np.uint32,
) -> None:  # fmt: skip
    """The update with bfloat16 moments; `first` is the noise of the chunk's first element."""
    for span, random in _pieces(weights.size, first):
        m, v = (_as_float(x[span].astype(_U) << _U(16)) for x in (exp_avg, exp_avg_sq))
        update_torch(weights[span], residual[span], m, v, grads[span], scalars)
        exp_avg[span] = (_as_bits(m) + (random & _U(0xFFFF))) >> _U(16)
        exp_avg_sq[span] = (_as_bits(v) + (random >> _U(16))) >> _U(16)


def update_torch_int8(
    weights: Array, residual: Array, exp_avg: Array, exp_avg_sq: Array, grads: Array, exp_avg_scale: Array,
    exp_avg_sq_scale: Array, scalars: StepScalars, first: np.uint32,
) -> None:  # fmt: skip
    """The update with int8 moments; the chunk begins with a group, and its last group may be cut short."""
    for span, random in _pieces(weights.size, first):
        groups = slice(span.start // GROUP, -(-span.stop // GROUP))
        m = read_m(exp_avg[span], exp_avg_scale[groups])
        v = read_v(exp_avg_sq[span], exp_avg_sq_scale[groups])
        update_torch(weights[span], residual[span], m, v, grads[span], scalars)
        exp_avg[span], exp_avg_scale[groups] = write_m(m, random)
        exp_avg_sq[span], exp_avg_sq_scale[groups] = write_v(v, random)


def stochastic_master(update: Update, takes_noise: bool) -> Update:
    """`update`, which takes a split master, for one that is bf16 weights alone."""

    def rounded(weights: Array, *arguments: Any) -> None:
        *others, scalars, first = arguments
        high, low = weights.copy(), np.zeros_like(weights)
        update(high, low, *others, scalars, *([first] if takes_noise else []))
        bits = (high.astype(_U) << _U(16)) - ((low.astype(_U) & _U(0x8000)) << _U(1)) + low
        weights[:] = (bits + (random_bits(first ^ MASTER_NOISE, weights.size) & _U(0xFFFF))) >> _U(16)

    return rounded


def read_m(codes: Array, scales: Array) -> Array:
    """m, float32, of codes (uint8) and the scales of their groups."""
    code = codes.astype(_U)
    size = _from_code(code & _U(127), scales, M_TOP, M_SHIFT)
    return np.where(code & _U(128), -size, size)


def read_v(codes: Array, scales: Array) -> Array:
    """v, float32, of codes (uint8) and the scales of their groups."""
    return np.square(_from_code(codes.astype(_U), scales, V_TOP, V_SHIFT))


def write_m(m: Array, random: Bits) -> tuple[Array, Array]:
    """(codes, scales) of m, given 32 random bits an element."""
    code, scales = _to_code(np.abs(m), random >> _U(13), M_TOP, M_SHIFT)
    return (np.minimum(code, _U(127)) | (_as_bits(m) >> _U(24) & _U(128))).astype(np.uint8), scales


def write_v(v: Array, random: Bits) -> tuple[Array, Array]:
    """(codes, scales) of v, given 32 random bits an element."""
    root = np.sqrt(v)
    code, scales = _to_code(root, random & _U((1 << V_SHIFT) - 1), V_TOP, V_SHIFT)
    return np.minimum(np.maximum(code, root > 0), _U(255)).astype(np.uint8), scales


def _from_code(code: Bits, scales: Array, top: int, shift: int) -> Array:
    unit = scales * np.float32(1 / top)
    return (_as_float((code << _U(shift)) + _ONE) - np.float32(1)) * np.repeat(unit, GROUP)[: code.size]


def _to_code(values: Array, below: Bits, top: int, shift: int) -> tuple[Bits, Array]:
    """Codes, not limited yet, of values >= 0, and the largest value of each group."""
    scales = np.maximum.reduceat(values, np.arange(0, values.size, GROUP))
    factors = np.where(scales >= np.float32(TINY), np.float32(top) / np.maximum(scales, np.float32(TINY)), 0)
    x = values * np.repeat(factors.astype(np.float32), GROUP)[: values.size]
    return (_as_bits(x + np.float32(1)) - _ONE + below) >> _U(shift), scales


def _pieces(size: int, first: np.uint32) -> Iterator[tuple[slice, Bits]]:
    """Spans of TORCH_PIECE elements, a whole number of groups but for the last one, and their random bits."""
    for start in range(0, size, TORCH_PIECE):
        stop = min(start + TORCH_PIECE, size)
        yield slice(start, stop), random_bits(_U((int(first) + start * STRIDE) & 0xFFFFFFFF), stop - start)


def _as_bits(values: Array) -> Bits:
    return values.view(_U)


def _as_float(bits: Bits) -> Array:
    return bits.view(np.float32)
