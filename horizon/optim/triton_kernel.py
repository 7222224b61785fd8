"""The AdamW update of `horizon.optim.adamw` as one Triton kernel over a block's flat states.

Bit-equality with the host's kernel needs what that one needs: fused multiply-adds in two places and nowhere else
(`enable_fp_fusion=False`), and a division and a square root that are correctly rounded, subnormal numbers included
(Triton's own flush those to zero, hence the instructions by name).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from horizon.optim.adamw import StepScalars

TILE = 1024  # elements at a time: with 4 warps, 8 a thread, loads of 16 bytes


@triton.jit
def _divide(a, b):  # type: ignore[no-untyped-def]
    return tl.inline_asm_elementwise("div.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _root(a):  # type: ignore[no-untyped-def]
    return tl.inline_asm_elementwise("sqrt.rn.f32 $0, $1;", "=f,f", [a], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit  # type: ignore[untyped-decorator]
def _adamw(  # type: ignore[no-untyped-def]
    hi, lo, m, v, g, chunks, b2, omb1, omb2, eps, decay, nstep, rbc2, grad_scale, TILE: tl.constexpr
):
    """One program a row of `chunks`: start and stop, multiples of 64, and whether the weights decay."""
    row = chunks + 3 * tl.program_id(0)
    start, stop = tl.multiple_of(tl.load(row), 64), tl.multiple_of(tl.load(row + 1), 64)
    factor = tl.where(tl.load(row + 2) != 0, decay, 1.0)
    for first in range(start, stop, TILE):
        at = first + tl.arange(0, TILE)
        inside = at < stop
        high, low = tl.load(hi + at, inside, 0).to(tl.int32), tl.load(lo + at, inside, 0).to(tl.int32)
        p = ((high << 16) + low).to(tl.float32, bitcast=True) * factor
        grad = tl.load(g + at, inside, 0.0).to(tl.float32) * grad_scale
        before = tl.load(m + at, inside, 0.0)
        mi = tl.fma(grad - before, omb1, before)
        vi = tl.fma(grad * omb2, grad, tl.load(v + at, inside, 0.0) * b2)
        bits = (p + _divide(mi * nstep, _divide(_root(vi), rbc2) + eps)).to(tl.int32, bitcast=True)
        tl.store(m + at, mi, inside)
        tl.store(v + at, vi, inside)
        tl.store(hi + at, ((bits + 0x8000) >> 16).to(tl.int16), inside)
        tl.store(lo + at, bits.to(tl.int16), inside)


class TritonUpdate:
    """Updates blocks by number; `tables`: per block the chunks of `horizon.optim.device.chunk_table`, on the device."""

    def __init__(self, tables: Mapping[int, Tensor]):
        self._tables = tables

    def __call__(self, block: int, states: Any, decayed: StepScalars, undecayed: StepScalars) -> None:
        """Launch on the current stream; `undecayed` differs in its decay of 1 only."""
        weights, residual, exp_avg, exp_avg_sq, grads = states
        chunks = self._tables[block]
        _adamw[chunks.shape[0],](
            weights.view(torch.int16), residual, exp_avg, exp_avg_sq, grads, chunks, *map(float, decayed),
            TILE=TILE, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
