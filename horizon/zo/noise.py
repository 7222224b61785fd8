"""The noise of zeroth-order steps: normals as a function of (seed, step, query, block, element), nothing stored.

A key of 64 bits stands for (seed, step, query, block). Under a key every pair of elements has two words of 32 bits,
mixed from its number, and Box-Muller makes two normals of them. A block's elements come in groups of 2,048; element j
of a group's first half and of its second half are a pair, so that both are read in whole vectors:

    group g   | a a a ... a  b b b ... b |      pair g * 1024 + j = elements (g * 2048 + j, g * 2048 + 1024 + j)

Every kernel computes the same bits: integers wrap at 32 bits; floats are fp32 with fused multiply-adds exactly where
this file has them, and logarithm, root, sine and cosine are the polynomials and steps below (absolute error of a normal
below 1e-5, and none beyond 5.65, where one in 62 million would be). This file says what is
computed, in numpy; `horizon.zo.host_kernel` and `horizon.zo.triton_kernel` compute it.

Method: counter-based generation after Salmon et al. 2011 (https://doi.org/10.1145/2063384.2063405), with a mixer that
costs a GPU less than Philox: 6.9e9 elements have to be passed in the time in which their weights cross its memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from horizon.layout import BLOCK_ALIGN

Array: TypeAlias = NDArray[Any]

VERSION = "mix32-boxmuller-1"  # written into replay logs; another one where a bit of what is below changes
GROUP = BLOCK_ALIGN  # elements; blocks and their trainable prefixes are whole groups
HALF = GROUP // 2  # pairs of a group
ROUNDING = (1 << 32) - 1  # in the place of a query: the random bits that an update is rounded with

# Multipliers of https://github.com/skeeto/hash-prospector, and the golden ratio.
MIX_1, MIX_2, MIX_3 = 0x7FEB352D, 0x846CA68B, 0x9E3779B1
LOG = (-2.000001907348633, 1.0000228881835938, -0.6662935018539429, 0.4981657862663269, -0.40983518958091736,
       0.373615026473999, -0.2386210858821869)  # fmt: skip
LOG_2 = -1.3862943649291992  # -2 ln 2
# 1/sqrt(x) from the bits of x by a guess and two Newton steps, the first one with Kadlec's constants: to 7e-7 of itself
# (http://rrrola.wz.cz/inv_sqrt.html). A root that is correctly rounded takes a GPU a branch and twice the time.
ROOT_GUESS, ROOT_1, ROOT_2, ROOT_3, ROOT_4 = 0x5F1FFFF9, -0.7039522528648376, 1.6819140911102295, -0.5, 1.5
SIN = 1.5707963705062866, -0.6459634900093079, 0.07968021929264069, -0.004602163098752499
COS = 1.0, -1.2336970567703247, 0.2535986006259918, -0.020408255979418755
ONE_BITS, SIGN_BIT, SWAP_BIT, MANTISSA = 0x3F800000, 0x80000000, 0x40000000, 0x7FFFFF
ODD_ONE_BITS = ONE_BITS | 1
ROOT_HALF_BITS = 0x3F3504F3  # sqrt(1/2): the logarithm's argument is brought to [sqrt(1/2), sqrt(2))


DROPPED = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}  # low bits of fp32 that a format does not have
SMALLEST_NORMAL = 2.0**-14  # of fp16
FIXED_POINT = 0.75  # added and taken off again in fp32, it rounds to a multiple of 2^-24, fp16's smallest number

_U32, _F32 = np.uint32, np.float32


class Key(NamedTuple):
    """What the noise of one (seed, step, query, block) is drawn with: two uint32."""

    first: int
    second: int


def noise_key(seed: int, step: int, query: int, block: int) -> Key:
    """The key of one query of one step (from 1) in one block: a 64-bit hash of the four."""
    state = 0x9E3779B97F4A7C15
    for value in (seed, step, query, block):
        state = (state ^ (value & _MASK_64)) * 0xBF58476D1CE4E5B9 & _MASK_64
        state = (state ^ state >> 30) * 0x94D049BB133111EB & _MASK_64
        state ^= state >> 31
    return Key(state >> 32, state & 0xFFFFFFFF)


_MASK_64 = (1 << 64) - 1


def words(key: Key, pairs: Array) -> tuple[Array, Array]:
    """Two words, uint32, of each pair number (uint32)."""
    k0, k1 = _U32(key.first), _U32(key.second)
    a = pairs + k0
    a = a ^ (a >> _U32(16))
    a = a * _U32(MIX_1)
    a = a ^ (a >> _U32(15)) ^ k1
    a = a * _U32(MIX_2)
    a = a ^ (a >> _U32(16))
    b = a * _U32(MIX_3)
    b = b ^ (b >> _U32(15)) ^ k0
    b = b * _U32(MIX_1)
    return a, b ^ (b >> _U32(16))


def normals(key: Key, pairs: Array) -> tuple[Array, Array]:
    """Two standard normals, fp32, of each pair number: radius sqrt(-2 ln u), angle uniform."""
    a, b = words(key, pairs)
    u = _F32(2) - ((a >> _U32(9)) | _U32(ODD_ONE_BITS)).view(_F32)  # odd multiples of 2^-23 in (0, 1)
    shifted = u.view(np.int32) - np.int32(ROOT_HALF_BITS)
    exponent = (shifted >> np.int32(23)).astype(_F32)
    f = ((shifted & np.int32(MANTISSA)) + np.int32(ROOT_HALF_BITS)).view(_F32) - _F32(1)
    radius = _root(fma(exponent, _F32(LOG_2), f * _polynomial(LOG, f)))
    # An eighth of the circle either side of an axis; two more bits choose the axis and its direction.
    w = ((b & _U32(MANTISSA)) | _U32(ONE_BITS)).view(_F32) - _F32(1.5)
    square = w * w
    across = w * _polynomial(SIN, square)
    along = (_polynomial(COS, square).view(_U32) ^ (b & _U32(SIGN_BIT))).view(_F32)
    swapped = (b & _U32(SWAP_BIT)) != 0
    return radius * np.where(swapped, across, along), radius * np.where(swapped, along, across)


def _root(x: Array) -> Array:
    """The square root of x > 0."""
    y = (_U32(ROOT_GUESS) - (x.view(_U32) >> _U32(1))).view(_F32)
    y = y * fma(x * _F32(ROOT_1), y * y, _F32(ROOT_2))
    y = y * fma(x * _F32(ROOT_3), y * y, _F32(ROOT_4))
    return x * y


def _polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
    """Horner's scheme with fused multiply-adds; the lowest coefficient comes first."""
    value = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = fma(value, x, _F32(coefficient))
    return value


def fma(a: Any, b: Any, c: Any) -> Array:
    """a * b + c in fp32, rounded once.

    The product is exact in double; the sum is rounded to odd there (Boldo and Melquiond 2008), so that rounding it once
    more, to fp32, gives what one rounding would.
    """
    product, c = np.asarray(a, np.float64) * np.asarray(b, np.float64), np.asarray(c, np.float64)
    total = product + c
    rest = total - product
    error = (product - (total - rest)) + (c - rest)
    inexact = (error != 0) & (total.view(np.int64) & 1 == 0)
    odd: Array = np.where(inexact, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
    return np.asarray(odd, _F32)


def rounded(w: Array, word: Array, dtype: torch.dtype) -> Array:
    """fp32 values rounded to what `dtype` holds, still as fp32; `word`: random uint32, whose low bits decide.

    Stochastic: up with the probability that the rest has in the last place, so that updates smaller than that are not
    lost on the average. Below fp16's normal numbers: to the nearest.
    """
    below = _U32((1 << DROPPED[dtype]) - 1)
    found = ((w.view(_U32) + (word & below)) & ~below).view(_F32)
    if dtype is torch.float16:
        found = np.where(np.abs(w) < _F32(SMALLEST_NORMAL), (w + _F32(FIXED_POINT)) - _F32(FIXED_POINT), found)
    return found
