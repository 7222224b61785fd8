"""The split master: an fp32 value kept as its rounded bfloat16 (`hi`) and 16 more bits (`lo`), exactly.

    hi = (u + 0x8000) >> 16      u = (hi << 16) + sign_extend(lo)      u: the fp32 bit pattern, mod 2^32
    lo = u & 0xFFFF

`hi` is a nearest bfloat16, ties away from zero, and is what the device computes with. The pair gives back every
pattern, NaN payloads included. (`Tensor.bfloat16()` rounds ties to even: an even `hi` then has 65,537 preimages,
which 16 bits cannot tell apart.)

Both directions work on the two 16-bit halves of each fp32 element in place of 32-bit arithmetic, so they
allocate nothing but their result. The halves lie low one first: little-endian, as on every supported host and GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split_master(master: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The pair (hi bfloat16, lo int16) of `master` (float32, any shape and device), each shaped like it.

    `out`, when given, is a pair of contiguous tensors with as many elements; they are filled and returned.
    """
    master = master.contiguous()
    hi, lo = out or (torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16))
    low, high = _halves(master)
    hi_bits, lo_bits = hi.view(-1).view(torch.int16), lo.view(-1).view(torch.int16)
    lo_bits.copy_(low)
    torch.bitwise_right_shift(lo_bits, 15, out=hi_bits)  # -1 where the low half rounds up
    torch.sub(high, hi_bits, out=hi_bits)
    return hi, lo


def join_master(hi: Tensor, lo: Tensor, out: Tensor | None = None) -> Tensor:
    """The float32 master of a pair made by `split_master`, shaped like `hi`.

    `out`, when given, is a contiguous float32 tensor with as many elements; it is filled and returned.
    """
    hi, lo = hi.contiguous(), lo.contiguous()
    master = torch.empty_like(hi, dtype=torch.float32) if out is None else out
    low, high = _halves(master)
    hi_bits, lo_bits = hi.view(-1).view(torch.int16), lo.view(-1).view(torch.int16)
    low.copy_(lo_bits)
    high.copy_(lo_bits).bitwise_right_shift_(15).add_(hi_bits)
    return master


def _halves(master: Tensor) -> tuple[Tensor, Tensor]:
    """Strided int16 views [elements] of the low and the high halves of a contiguous float32 tensor."""
    low, high = master.view(-1).view(torch.int16).view(-1, 2).unbind(1)
    return low, high
