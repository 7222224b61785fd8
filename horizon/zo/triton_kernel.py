"""The noise of `horizon.zo.noise` and the update of `horizon.zo.perturb` as one Triton kernel over a block's states.

It reads each weight once and writes it at most three times. Bits are those of the host's kernel: fused multiply-adds
only where they are spelled out (`enable_fp_fusion=False`), and no function of a library's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from horizon.zo import noise
from horizon.zo import table as words_of

HALF = tl.constexpr(noise.HALF)
M1, M2, M3 = tl.constexpr(noise.MIX_1), tl.constexpr(noise.MIX_2), tl.constexpr(noise.MIX_3)
ONE_BITS, ODD_ONE_BITS = tl.constexpr(noise.ONE_BITS), tl.constexpr(noise.ODD_ONE_BITS)
SIGN, SWAP, GUESS = tl.constexpr(noise.SIGN_BIT), tl.constexpr(noise.SWAP_BIT), tl.constexpr(noise.ROOT_GUESS)
R1, R2, R3, R4 = (tl.constexpr(c) for c in (noise.ROOT_1, noise.ROOT_2, noise.ROOT_3, noise.ROOT_4))
MANTISSA, ROOT_HALF = tl.constexpr(noise.MANTISSA), tl.constexpr(noise.ROOT_HALF_BITS)
L0, L1, L2, L3, L4, L5, L6 = (tl.constexpr(c) for c in noise.LOG)
LOG_2 = tl.constexpr(noise.LOG_2)
S0, S1, S2, S3 = (tl.constexpr(c) for c in noise.SIN)
C0, C1, C2, C3 = (tl.constexpr(c) for c in noise.COS)
FP16_DROPPED, SMALLEST_NORMAL = tl.constexpr(noise.DROPPED[torch.float16]), tl.constexpr(noise.SMALLEST_NORMAL)
FIXED_POINT = tl.constexpr(noise.FIXED_POINT)
FIRST_UPDATE = tl.constexpr(words_of.FIRST_UPDATE)
UPDATE, TERM = tl.constexpr(words_of.UPDATE), tl.constexpr(words_of.TERM)


@triton.jit
def _first_word(pair, k0, k1):  # type: ignore[no-untyped-def]
    a = pair + k0
    a = a ^ (a >> 16)
    a = a * M1
    a = a ^ (a >> 15) ^ k1
    a = a * M2
    return a ^ (a >> 16)


@triton.jit
def _normals(pair, k0, k1):  # type: ignore[no-untyped-def]
    a = _first_word(pair, k0, k1)
    b = a * M3
    b = b ^ (b >> 15) ^ k0
    b = b * M1
    b = b ^ (b >> 16)
    u = 2.0 - ((a >> 9) | ODD_ONE_BITS).to(tl.float32, bitcast=True)
    shifted = u.to(tl.int32, bitcast=True) - ROOT_HALF
    exponent = (shifted >> 23).to(tl.float32)
    f = ((shifted & MANTISSA) + ROOT_HALF).to(tl.float32, bitcast=True) - 1.0
    log = tl.fma(f, L6, L5)
    log = tl.fma(log, f, L4)
    log = tl.fma(log, f, L3)
    log = tl.fma(log, f, L2)
    log = tl.fma(log, f, L1)
    log = tl.fma(log, f, L0)
    x = tl.fma(exponent, LOG_2, f * log)
    y = (-(x.to(tl.int32, bitcast=True) >> 1) + GUESS).to(tl.float32, bitcast=True)
    y = y * tl.fma(x * R1, y * y, R2)
    radius = x * (y * tl.fma(x * R3, y * y, R4))
    w = ((b & MANTISSA) | ONE_BITS).to(tl.float32, bitcast=True) - 1.5
    square = w * w
    across = tl.fma(square, S3, S2)
    across = tl.fma(across, square, S1)
    across = w * tl.fma(across, square, S0)
    along = tl.fma(square, C3, C2)
    along = tl.fma(along, square, C1)
    along = tl.fma(along, square, C0)
    along = (along.to(tl.uint32, bitcast=True) ^ (b & SIGN)).to(tl.float32, bitcast=True)
    swapped = (b & SWAP) != 0
    return radius * tl.where(swapped, across, along), radius * tl.where(swapped, along, across)


@triton.jit  # type: ignore[untyped-decorator]
def _load(high, low, at, SPLIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Master values in fp32."""
    if SPLIT:
        return ((tl.load(high + at).to(tl.int32) << 16) + tl.load(low + at).to(tl.int32)).to(tl.float32, bitcast=True)
    else:
        return tl.load(high + at).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _store(high, low, at, w, SPLIT: tl.constexpr):  # type: ignore[no-untyped-def]
    if SPLIT:
        bits = w.to(tl.int32, bitcast=True)
        tl.store(high + at, ((bits + 0x8000) >> 16).to(tl.int16))
        tl.store(low + at, bits.to(tl.int16))
    else:
        tl.store(high + at, w.to(high.dtype.element_ty))


@triton.jit  # type: ignore[untyped-decorator]
def _round(w, word, DROPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """As `horizon.zo.noise.rounded`."""
    bits = (w.to(tl.uint32, bitcast=True) + (word & ((1 << DROPPED) - 1))) >> DROPPED
    found = (bits << DROPPED).to(tl.float32, bitcast=True)
    if DROPPED == FP16_DROPPED:
        found = tl.where(tl.abs(w) < SMALLEST_NORMAL, (w + FIXED_POINT) - FIXED_POINT, found)
    return found


@triton.jit(do_not_specialize=["trained", "noise_at"])  # type: ignore[untyped-decorator]
def _run(  # type: ignore[no-untyped-def]
    high, low, plus, minus, row, decays, trained, noise_at, eps,
    SPLIT: tl.constexpr, DROPPED: tl.constexpr, UPDATES: tl.constexpr, COPIES: tl.constexpr, HALF_: tl.constexpr
):  # fmt: skip
    """One program a group."""
    group = tl.program_id(0)
    lane = tl.arange(0, HALF_)
    at_a = group.to(tl.int64) * (2 * HALF_) + lane
    at_b = at_a + HALF_
    a, b = _load(high, low, at_a, SPLIT), _load(high, low, at_b, SPLIT)
    noisy = group < trained
    pair = (group.to(tl.uint32) * HALF_ + lane.to(tl.uint32)).to(tl.uint32)
    if UPDATES:  # noqa: SIM102 (known when the kernel is compiled)
        if noisy:
            mask = tl.load(decays + group)
            chunk = lane // 64
            decays_a, decays_b = ((mask >> chunk) & 1) != 0, ((mask >> (chunk + 16)) & 1) != 0
            at = FIRST_UPDATE
            for _ in range(tl.load(row)):
                num_terms = tl.load(row + at)
                decay = tl.load(row + at + 1).to(tl.float32, bitcast=True)
                r0 = tl.load(row + at + 2).to(tl.uint32, bitcast=True)
                r1 = tl.load(row + at + 3).to(tl.uint32, bitcast=True)
                at += UPDATE
                a, b = a * tl.where(decays_a, decay, 1.0), b * tl.where(decays_b, decay, 1.0)
                for _term in range(num_terms):
                    k0 = tl.load(row + at).to(tl.uint32, bitcast=True)
                    k1 = tl.load(row + at + 1).to(tl.uint32, bitcast=True)
                    coefficient = tl.load(row + at + 2).to(tl.float32, bitcast=True)
                    at += TERM
                    za, zb = _normals(pair, k0, k1)
                    a, b = tl.fma(za, coefficient, a), tl.fma(zb, coefficient, b)
                if DROPPED:
                    word = _first_word(pair, r0, r1)
                    a, b = _round(a, word, DROPPED), _round(b, word >> 16, DROPPED)
            _store(high, low, at_a, a, SPLIT)
            _store(high, low, at_b, b, SPLIT)
    if COPIES == 1:
        tl.store(plus + at_a, a.to(plus.dtype.element_ty))
        tl.store(plus + at_b, b.to(plus.dtype.element_ty))
    if COPIES == 2:
        if noisy:
            k0 = tl.load(row + noise_at).to(tl.uint32, bitcast=True)
            k1 = tl.load(row + noise_at + 1).to(tl.uint32, bitcast=True)
            za, zb = _normals(pair, k0, k1)
            tl.store(plus + at_a, tl.fma(za, eps, a).to(plus.dtype.element_ty))
            tl.store(plus + at_b, tl.fma(zb, eps, b).to(plus.dtype.element_ty))
            tl.store(minus + at_a, tl.fma(za, -eps, a).to(plus.dtype.element_ty))
            tl.store(minus + at_b, tl.fma(zb, -eps, b).to(plus.dtype.element_ty))
        else:
            tl.store(plus + at_a, a.to(plus.dtype.element_ty))
            tl.store(plus + at_b, b.to(plus.dtype.element_ty))
            tl.store(minus + at_a, a.to(plus.dtype.element_ty))
            tl.store(minus + at_b, b.to(plus.dtype.element_ty))


def launch(
    states: Sequence[Tensor], copies: Sequence[Tensor], row: Tensor, decays: Tensor, trained: int, noise_at: int,
    eps: float, dropped: int, updates: bool,
) -> None:  # fmt: skip
    """Launch on the current stream, for a whole block; see `horizon.zo.host_kernel.run_piece`.

    Args:
        states: flat tensors of the block: its weights, and the residual of a split master.
        copies: none, w alone, or w + eps z and w - eps z; each as long as the weights.
        row: int32 words on the device; decays: int32 [groups] there.
    """
    split = len(states) == 2
    high = states[0].view(torch.int16) if split else states[0]
    plus = copies[0] if copies else high
    _run[high.numel() // noise.GROUP,](
        high, states[-1], plus, copies[-1] if copies else high, row, decays, trained, noise_at, eps,
        SPLIT=split, DROPPED=dropped, UPDATES=updates, COPIES=len(copies), HALF_=noise.HALF, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
