"""The settings of zeroth-order fine-tuning, checked where they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from horizon.config.schema import ComputeDtype, Master
from horizon.config.values import choice
from horizon.errors import ConfigError
from horizon.plan.machine import resolve_dtype
from horizon.zo.noise import DROPPED
from horizon.zo.table import MAX_QUERIES

SMALLEST_EPS = {
    Master.fp32: torch.finfo(torch.float32).tiny,
    Master.bf16: torch.finfo(torch.float32).tiny,
    Master.fp16: 2.0**-24,
}


@dataclass(frozen=True, slots=True)
class ZerothOrder:
    """Settings of MeZO (https://arxiv.org/abs/2305.17333): gradients estimated from losses at w + eps z and w - eps z.

    Attributes:
        lr: learning rate of the first step; full fine-tuning takes about 1e-6.
        eps: how far the weights are perturbed, absolutely.
        queries: noise vectors z a step, whose estimates are averaged; each costs two forward passes.
        seed: of the noise.
        weight_decay: w shrinks by lr * weight_decay a step; not applied to norms, biases and other vectors.
        momentum: an update is the sum of momentum^j times the estimate of j steps before,
        momentum_steps: over so many steps, this one included, whose noise is drawn again. 1: no momentum.
        master: "fp32" (4 bytes a parameter), "bf16" or "fp16" (2 bytes; updates are rounded stochastically).
        writeback_every: weights go back to the host every so many steps; the updates between are applied again at
            each upload. Changes no bit.

    Raises:
        ConfigError: a value cannot work; names the setting.
    """

    lr: float = 1e-6
    eps: float = 1e-3
    queries: int = 1
    seed: int = 0
    weight_decay: float = 0.0
    momentum: float = 0.0
    momentum_steps: int = 1
    master: str = Master.fp32
    writeback_every: int = 1

    def __post_init__(self) -> None:
        for key, value in (("lr", self.lr), ("weight_decay", self.weight_decay)):
            if not 0 <= value < math.inf:
                raise ConfigError(f"ZerothOrder {key}={value}: expected a finite number >= 0; set optim.{key}")
        master = choice(Master, self.master, "zo.master")
        if not SMALLEST_EPS[master] <= self.eps < math.inf:
            raise ConfigError(
                f"zo.eps={self.eps}: expected a finite number > 0 that {master} weights can be moved by, such as 1e-3"
            )
        if not 1 <= self.queries <= MAX_QUERIES:
            raise ConfigError(f"zo.queries={self.queries}: expected 1 to {MAX_QUERIES}")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"zo.momentum={self.momentum}: expected a number in [0, 1)")
        if self.momentum_steps < 1:
            raise ConfigError(f"zo.momentum_steps={self.momentum_steps}: expected at least 1, the step itself")
        if (self.momentum > 0) is not (self.momentum_steps > 1):
            raise ConfigError(
                f"zo.momentum={self.momentum} with zo.momentum_steps={self.momentum_steps}: set both, or neither"
            )
        if self.writeback_every < 1:
            raise ConfigError(f"zo.writeback_every={self.writeback_every}: expected at least 1")

    @property
    def master_dtype(self) -> torch.dtype:
        """Of the weights as the host keeps them; a split master's other half is `residual`."""
        return torch.float16 if self.master == Master.fp16 else torch.bfloat16

    @property
    def dropped_bits(self) -> int:
        """Low bits of fp32 that updates round away."""
        return 0 if self.master == Master.fp32 else DROPPED[self.master_dtype]

    def compute_dtype(self, wanted: ComputeDtype, device: torch.device) -> torch.dtype:
        """What blocks compute in: on a GPU by default what the host's 16-bit weights are."""
        if wanted is ComputeDtype.auto and device.type == "cuda":
            return self.master_dtype
        return resolve_dtype(wanted, device)
