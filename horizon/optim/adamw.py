"""AdamW on the split master: its settings, one step's scalars, and the update as plain torch operations.

An update takes flat arrays of equal length n, all on the host:

    weights     uint16 [n]            bf16 bits, the rounded high half of the fp32 master
    residual    uint16 [n]            its 16 other bits (see `horizon.store.split`)
    exp_avg     float32 [n]           m
    exp_avg_sq  float32 [n]           v
    grads       uint16 | float32 [n]  bf16 bits, or fp32

and writes all but `grads` in place, in this order, every intermediate fp32 and rounded after each operation:

    g = grads * grad_scale
    p = join(weights, residual) * decay
    m = fma(1-b1, g - m, m)
    v = fma((1-b2) * g, g, v * b2)
    p = p + (nstep * m) / (sqrt(v) / rbc2 + eps)

which is what `torch.optim.AdamW(fused=True)` does in fp32. A length of zero gradients and zero states stays zero.

Moments in fewer bits are read back as fp32, go through these five lines, and are rounded when they are written (here
`u` is a number's fp32 bit pattern, U the pattern of 1.0, and r the element's 32 random bits of this step, below):

    bfloat16    exp_avg           uint16 [n]          (u(m) + (r & 0xFFFF)) >> 16
                exp_avg_sq        uint16 [n]          (u(v) + (r >> 16)) >> 16

    int8        exp_avg           uint8 [n]           sign of m << 7 | min(127, (u(|m| * M + 1) - U + (r >> 13)) >> 19)
                exp_avg_sq        uint8 [n]           min(255, (u(sqrt(v) * V + 1) - U + (r & 0x3FFFF)) >> 18),
                                                      and at least 1 unless v = 0
                exp_avg_scale     float32 [n / 64]    the largest |m| of 64 elements
                exp_avg_sq_scale  float32 [n / 64]    the largest sqrt(v) of 64 elements
                M = 247 / exp_avg_scale, V = 251 / exp_avg_sq_scale, 0 where the scale is below 2^-100

                a code c of m is read as +-(x - 1) * (exp_avg_scale * (1/247)) where u(x) = U + ((c & 127) << 19),
                one of v as ((x - 1) * (exp_avg_sq_scale * (1/251)))^2 where u(x) = U + (c << 18)

An fp32 pattern is a piecewise linear logarithm. So the int8 codes are logarithms of 1 + x, x up to 247 or 251: linear
near zero, with steps of 3 to 6 % of m and 1.6 to 3.1 % of sqrt(v) at the top, and of 1/4000 and 1/8000 of the group's
largest at the bottom. Random bits below the cut make the expected value of what is written the exact one (of sqrt(v)
for int8): an average that moves by less than a step in each step would otherwise stand still. No v > 0 is read as zero.

A bf16_stochastic master is `weights` alone, the upper half of p's pattern, and there is no `residual`: p is read as
weights << 16, and written as (u(p) + (s & 0xFFFF)) >> 16 with the element's other random bits s, the r of element
i + 2^31, which no block has. The expected value of what is written is p.

    r of element i of a block:    x = K + i * 0x9E3779B9    K from seed, step and block: see `noise`
                                  x = (x ^ x >> 16) * 0x21F0AAAD;  x = (x ^ x >> 15) * 0x735A2D97;  r = x ^ x >> 15

all modulo 2^32. It depends on nothing else, so threads, chunks and an interruption change no bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from horizon.config.schema import MasterFormat, Moments
from horizon.config.values import choice
from horizon.errors import ConfigError, NonFiniteError
from horizon.store.split import join_master, split_master

TORCH_PIECE = 1 << 15  # elements: temporaries of 128 KiB, and torch's own threads stay out of tensors this small

Array: TypeAlias = NDArray[Any]
# weights, residual (but for bf16_stochastic), exp_avg, exp_avg_sq, grads, and the scales of int8
UpdateArrays: TypeAlias = tuple[Array, ...]


@dataclass(frozen=True, slots=True)
class AdamW:
    """Settings of AdamW, with the meanings and defaults of `torch.optim.AdamW` but for lr.

    `moments` is the format that exp_avg and exp_avg_sq are kept in: "float32" (8 bytes a parameter), "bfloat16" (4)
    or "int8" (2.1). `master` is that of the parameters' own values: "split" (fp32 in 4 bytes) or "bf16_stochastic" (2).
    The update computes in fp32 whatever they are kept in.

    Raises:
        ConfigError: a value is outside its range.
    """

    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    moments: str = Moments.float32  # one of `horizon.config.schema.Moments`
    master: str = MasterFormat.split  # one of `horizon.config.schema.MasterFormat`

    def __post_init__(self) -> None:
        if not 0 <= self.lr < math.inf:
            raise ConfigError(f"AdamW lr must be finite and >= 0, got {self.lr}; set optim.lr")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(
                f"AdamW betas must be two numbers in [0, 1), got {self.betas}; set optim.beta1, optim.beta2"
            )
        # zero, also after rounding, would make 0/0 of every element that never saw a gradient
        if not (np.float32(self.eps) > 0 and self.eps < math.inf):
            raise ConfigError(f"AdamW eps must be finite and > 0 in float32, got {self.eps}; set optim.eps")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(
                f"AdamW weight_decay must be finite and >= 0, got {self.weight_decay}; set optim.weight_decay"
            )
        choice(Moments, self.moments, "optim.moments")
        choice(MasterFormat, self.master, "optim.master")


class StepScalars(NamedTuple):
    """What one step's update needs besides the arrays, each computed in double and rounded once to fp32."""

    b2: np.float32
    omb1: np.float32  # 1 - b1
    omb2: np.float32  # 1 - b2
    eps: np.float32
    decay: np.float32  # 1 - lr * weight_decay, or 1 for parameters that do not decay
    nstep: np.float32  # -lr / (1 - b1^step)
    rbc2: np.float32  # sqrt(1 - b2^step)
    grad_scale: np.float32  # 1 when the gradient is not clipped


# The arrays, then the scalars, then (unless nothing is rounded by it) the noise of the arrays' first element.
Update: TypeAlias = Callable[..., None]


def step_scalars(adamw: AdamW, lr: float, step: int, grad_scale: float, decay: bool) -> StepScalars:
    """The scalars of step number `step` (from 1) at learning rate `lr` for parameters that decay or do not.

    Raises:
        NonFiniteError: `lr` or `grad_scale` would make every weight NaN.
    """
    if not (math.isfinite(lr) and math.isfinite(grad_scale)):
        raise NonFiniteError(
            f"step {step} has learning rate {lr} and gradient scale {grad_scale}; expected finite numbers"
        )
    beta1, beta2 = adamw.betas
    exact = (
        beta2,
        1 - beta1,
        1 - beta2,
        adamw.eps,
        1 - lr * adamw.weight_decay if decay else 1.0,
        -(lr / (1 - beta1**step)),
        math.sqrt(1 - beta2**step),
        grad_scale,
    )
    return StepScalars(*(np.float32(value) for value in exact))


def update_torch(
    weights: Array, residual: Array, exp_avg: Array, exp_avg_sq: Array, grads: Array, scalars: StepScalars
) -> None:
    """The update of the module's head as torch operations; whether torch fuses the two fma is up to its build."""
    arrays = (weights, residual, exp_avg, exp_avg_sq, grads)
    tensors = (torch.from_numpy(a.view(np.int16) if a.dtype == np.uint16 else a) for a in arrays)
    for hi, lo, m, v, g in zip(*(torch.split(tensor, TORCH_PIECE) for tensor in tensors), strict=True):
        _update_piece(hi, lo, m, v, g, scalars)


def _update_piece(hi: Tensor, lo: Tensor, m: Tensor, v: Tensor, g: Tensor, scalars: StepScalars) -> None:
    b2, omb1, omb2, eps, decay, nstep, rbc2, grad_scale = map(float, scalars)
    bits = g.dtype == torch.int16
    grad = (g.view(torch.bfloat16) if bits else g).to(torch.float32, copy=True).mul_(grad_scale)
    master = join_master(hi, lo).mul_(decay)
    m.add_(grad - m, alpha=omb1)
    v.mul_(b2).addcmul_(grad, grad, value=omb2)
    root = torch.from_numpy(np.sqrt(v.numpy()))  # correctly rounded; Tensor.sqrt may go through a library that is not
    master.addcdiv_(m, root.div_(rbc2).add_(eps), value=nstep)
    split_master(master, out=(hi, lo))
