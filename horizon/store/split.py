"""The split master: an fp32 value kept as its rounded bfloat16 (`hi`) and 16 more bits (`lo`), exactly.

    hi = (u + 0x8000) >> 16      u = (hi << 16) + sign_extend(lo)      u: the fp32 bit pattern, mod 2^32
    lo = u & 0xFFFF

`hi` is a nearest bfloat16, ties away from zero, and is what the device computes with. The pair gives back every
pattern, NaN payloads included. (`Tensor.bfloat16()` rounds ties to even: an even `hi` then has 65,537 preimages,
which 16 bits cannot tell apart.)
"""

from __future__ import annotations

import torch
from torch import Tensor

HOST_PIECE = 1 << 17  # elements: on the host, temporaries of 512 KiB that stay in cache


def split_master(master: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The pair (hi bfloat16, lo int16) of `master` (float32, any shape and device), each shaped like it.

    `out`, when given, is a pair of contiguous tensors with as many elements; they are filled and returned.
    """
    master = master.contiguous()
    hi, lo = out or (torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16))
    for bits, hi_bits, lo_bits in _pieces(master, hi, lo):
        lo_bits.copy_(bits)  # keeps the low half
        hi_bits.copy_((bits >> 15).add_(1).bitwise_right_shift_(1))  # (bits + 0x8000) >> 16 without overflow
    return hi, lo


def join_master(hi: Tensor, lo: Tensor, out: Tensor | None = None) -> Tensor:
    """The float32 master of a pair made by `split_master`, shaped like `hi`.

    `out`, when given, is a contiguous float32 tensor with as many elements; it is filled and returned.
    """
    hi, lo = hi.contiguous(), lo.contiguous()
    master = torch.empty_like(hi, dtype=torch.float32) if out is None else out
    for bits, hi_bits, lo_bits in _pieces(master, hi, lo):
        bits.copy_(hi_bits).bitwise_left_shift_(16).add_(lo_bits)
    return master


def _pieces(master: Tensor, hi: Tensor, lo: Tensor) -> zip[tuple[Tensor, Tensor, Tensor]]:
    """Flat (int32, int16, int16) views of matching pieces; on a device everything is one piece."""
    size = HOST_PIECE if master.device.type == "cpu" else max(master.numel(), 1)
    flat = (master.view(-1).view(torch.int32), hi.view(-1).view(torch.int16), lo.view(-1).view(torch.int16))
    return zip(*(torch.split(tensor, size) for tensor in flat), strict=True)
