"""What a run will use, decided before anything is allocated: bytes per tier and purpose, and what fits.

Pure arithmetic on layouts, budgets and measured facts that are passed in. Host = DRAM; device = GPU memory, or, on a
CPU-only run, the part of DRAM that stands in for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from horizon.config.schema import Moments
from horizon.errors import BudgetError
from horizon.layout import BlockLayout
from horizon.plan.states import MASTER, MOMENTS, num_bytes
from horizon.units import GIB, MIB, format_bytes

MOMENTS_LABEL = {Moments.float32: "fp32", Moments.bfloat16: "bf16", Moments.int8: "int8, scales"}
PROCESS_DRIFT = 16 * MIB  # by which the process's own use differs from one moment to another
DRAIN_SLOTS = 2
RING_BUFFERS = 3  # draining, waiting and updating; a tied embedding holds one for the whole backward


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the plan."""

    tier: str
    purpose: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be used; bytes."""

    host: int
    device: int
    host_key: str = "memory.host_budget"
    device_key: str = "memory.device_budget"


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes per tier and purpose of one engine, activations excluded until the batch shape is known."""

    num_blocks: int
    num_parameters: int
    lines: tuple[Line, ...]
    limits: Limits
    activations: tuple[Line, ...] = field(default=())

    def num_bytes(self, tier: str) -> int:
        """Planned bytes of `tier`."""
        return sum(line.num_bytes for line in (*self.lines, *self.activations) if line.tier == tier)

    def table(self) -> str:
        """The plan as text, one line per tier and purpose."""
        head = f"{self.num_blocks} blocks, {self.num_parameters:,} parameters"
        rows = [f"  {line.tier:<7}{line.purpose:<34}{format_bytes(line.num_bytes):>12}" for line in self._all()]
        for tier, limit in (("host", self.limits.host), ("device", self.limits.device)):
            total = format_bytes(self.num_bytes(tier))
            rows.append(f"  {tier:<7}{'predicted peak':<34}{total:>12}  of {format_bytes(limit)}")
        return "\n".join([head, *rows])

    def _all(self) -> list[Line]:
        lines = [line for line in (*self.lines, *self.activations) if line.num_bytes]
        return sorted(lines, key=lambda line: line.tier != "host")

    def with_activations(self, lines: Sequence[Line]) -> MemoryPlan:
        """This plan for a known batch shape."""
        return MemoryPlan(self.num_blocks, self.num_parameters, self.lines, self.limits, tuple(lines))


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """The facts of a model and a run that decide its fixed memory."""

    layouts: Sequence[BlockLayout]
    compute_dtype: torch.dtype
    grad_dtype: torch.dtype
    keeps_gradients: bool  # for the global norm, or to accumulate
    weight_slots: int
    host_overhead: int  # process memory before the store exists
    device_overhead: int  # context and buffers
    moments: Moments = Moments.float32


def plan_memory(needs: MemoryNeeds, limits: Limits) -> MemoryPlan:
    """Lay out the fixed memory of an engine.

    Raises:
        BudgetError: states, slots or framework do not fit; says by how much and the smallest budget that works.
    """
    trainable = sum(lay.num_trainable for lay in needs.layouts)
    largest = max(lay.num_trainable for lay in needs.layouts)
    kept = trainable if needs.keeps_gradients else RING_BUFFERS * largest
    lines = [
        Line("host", "weights (bf16)", num_bytes(MASTER[:1], needs.layouts)),
        Line("host", "residual (low halves)", num_bytes(MASTER[1:], needs.layouts)),
        Line("host", f"exp_avg, exp_avg_sq ({MOMENTS_LABEL[needs.moments]})", _moment_bytes(needs)),
        Line("host", "gradients" if needs.keeps_gradients else "gradient ring", kept * needs.grad_dtype.itemsize),
        Line("host", "framework", needs.host_overhead),
        Line("device", f"weight slots ({needs.weight_slots})", slot_bytes(needs)),
        Line("device", "gradient slots", gradient_slot_bytes(needs)),
        Line("device", "framework and buffers", needs.device_overhead),
    ]
    parameters = sum(p.spec.numel for lay in needs.layouts for p in lay.params)
    plan = MemoryPlan(len(needs.layouts), parameters, tuple(lines), limits)
    check_fits(plan, f"a smaller model, {_remedy(plan, needs.moments)}")
    return plan


def _moment_bytes(needs: MemoryNeeds) -> int:
    return num_bytes(MOMENTS[needs.moments], needs.layouts)


def _remedy(plan: MemoryPlan, moments: Moments) -> str:
    """The setting that helps most where `plan` does not fit."""
    if plan.num_bytes("host") > plan.limits.host and moments is not Moments.int8:
        return "optim.moments=int8"
    return "fewer memory.weight_slots"


def slot_bytes(needs: MemoryNeeds) -> int:
    """Device bytes of the weight slots: fp32 needs room for both halves and the joined values."""
    per_element = 2 if needs.compute_dtype is torch.bfloat16 else 8
    return needs.weight_slots * per_element * max(lay.num_slot_elements for lay in needs.layouts)


def gradient_slot_bytes(needs: MemoryNeeds) -> int:
    """Device bytes of the fp32 sum and the drain slots."""
    size = max(lay.num_slot_elements for lay in needs.layouts)
    return size * (DRAIN_SLOTS * needs.grad_dtype.itemsize + (4 if needs.grad_dtype is not torch.float32 else 0))


def check_fits(plan: MemoryPlan, remedy: str) -> None:
    """Raise BudgetError when a tier's planned bytes exceed its limit."""
    for tier, limit, key, slack in (
        ("host", plan.limits.host, plan.limits.host_key, PROCESS_DRIFT),
        ("device", plan.limits.device, plan.limits.device_key, 0),
    ):
        need = plan.num_bytes(tier)
        if need > limit:
            parts = ", ".join(
                f"{line.purpose} {format_bytes(line.num_bytes)}"
                for line in (*plan.lines, *plan.activations)
                if line.tier == tier and line.num_bytes
            )
            raise BudgetError(
                f"needs {format_bytes(need)} of {tier} memory ({parts}) but {format_bytes(limit)} is allowed, "
                f"{format_bytes(need - limit)} too little; the smallest {key} that works is {_round_up(need + slack)} "
                f"(or use {remedy})"
            )


def _round_up(num_bytes: int) -> str:
    unit, name = (GIB, "GiB") if num_bytes >= 10 * GIB else (MIB, "MiB")
    return f"{-(-num_bytes // unit)}{name}"
