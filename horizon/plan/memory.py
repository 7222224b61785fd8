"""What a run will use, decided before anything is allocated: bytes per tier and purpose, and what fits.

Pure arithmetic on layouts, budgets and measured facts that are passed in. Host = DRAM; device = GPU memory, or, on a
CPU-only run, the part of DRAM that stands in for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from horizon.errors import BudgetError
from horizon.layout import BlockLayout
from horizon.units import GIB, MIB, align_up, format_bytes

STATE_BYTES = {"weights": 2, "residual": 2, "exp_avg": 4, "exp_avg_sq": 4}
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


def plan_memory(needs: MemoryNeeds, limits: Limits) -> MemoryPlan:
    """Lay out the fixed memory of an engine.

    Raises:
        BudgetError: states, slots or framework do not fit; says by how much and the smallest budget that works.
    """
    owned = sum(lay.num_elements for lay in needs.layouts)
    trainable = sum(lay.num_trainable for lay in needs.layouts)
    largest = max(lay.num_trainable for lay in needs.layouts)
    kept = trainable if needs.keeps_gradients else RING_BUFFERS * largest
    lines = [
        Line("host", "weights (bf16)", owned * STATE_BYTES["weights"]),
        Line("host", "residual (low halves)", owned * STATE_BYTES["residual"]),
        Line("host", "exp_avg, exp_avg_sq (fp32)", trainable * (STATE_BYTES["exp_avg"] + STATE_BYTES["exp_avg_sq"])),
        Line("host", "gradients" if needs.keeps_gradients else "gradient ring", kept * needs.grad_dtype.itemsize),
        Line("host", "framework", needs.host_overhead),
        Line("device", f"weight slots ({needs.weight_slots})", slot_bytes(needs)),
        Line("device", "gradient slots", gradient_slot_bytes(needs)),
        Line("device", "framework and buffers", needs.device_overhead),
    ]
    parameters = sum(p.spec.numel for lay in needs.layouts for p in lay.params)
    plan = MemoryPlan(len(needs.layouts), parameters, tuple(lines), limits)
    check_fits(plan, "a smaller model, fewer memory.weight_slots")
    return plan


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


@dataclass(frozen=True, slots=True)
class WorkingSet:
    """Device bytes that running one block takes, as measured: a line in the micro-batch's tokens, or the head."""

    base: int
    per_token: int
    least: int  # a chunk of the head

    def at(self, tokens: int) -> int:
        """Bytes at a micro-batch of `tokens` tokens."""
        return max(self.least, self.base + self.per_token * tokens)


@dataclass(frozen=True, slots=True)
class ActivationPlan:
    """Where the boundary activations of one batch shape go."""

    offloaded: frozenset[int]  # blocks whose input is kept on the host
    lines: tuple[Line, ...]

    @property
    def host_bytes(self) -> int:
        """Bytes of boundaries on the host that found no idle gradient buffer."""
        return sum(line.num_bytes for line in self.lines if line.tier == "host")


def plan_activations(
    plan: MemoryPlan, tokens: Sequence[int], token_bytes: int, working: WorkingSet, idle: Sequence[int]
) -> ActivationPlan:
    """Decide which boundaries stay on the device.

    Args:
        plan: without activations.
        tokens: tokens of each micro-batch of the step.
        token_bytes: bytes of one token's hidden state.
        working: what a block's recompute and backward need.
        idle: per block the bytes of its gradient buffer on the host, which boundaries may borrow; 0 where not.

    Raises:
        BudgetError: not even with all boundaries on the host.
    """
    num_layers = plan.num_blocks - 2
    boundary = sum(tokens) * token_bytes
    passing = 3 * boundary  # entering a block, leaving it, and the gradient on its way down
    busy = working.at(max(tokens))
    room = plan.limits.device - plan.num_bytes("device") - busy - passing
    on_device = max(0, min(num_layers, room // boundary))
    # The last blocks go to the host: gradient buffers of the blocks below are idle until they have come back.
    offloaded = frozenset(range(1 + on_device, 1 + num_layers))
    own = own_bytes(boundary_sizes(offloaded, tokens, token_bytes), idle)
    lines = (
        Line("host", "offloaded activations", own),
        Line("device", f"block at work ({max(tokens)} tokens)", busy),
        Line("device", "hidden states", passing),
        Line("device", f"boundaries of {on_device} blocks", on_device * boundary),
    )
    check_fits(plan.with_activations(lines), "a smaller train.micro_batch or train.batch_size")
    return ActivationPlan(offloaded, lines)


def boundary_sizes(offloaded: Iterable[int], tokens: Sequence[int], token_bytes: int) -> dict[Key, int]:
    """Bytes of every offloaded boundary, by (block, micro-batch)."""
    return {(block, m): num * token_bytes for block in offloaded for m, num in enumerate(tokens)}


EFFICIENT_TOKENS = 8192  # below, a block's kernels no longer fill a large GPU
WORTHWHILE = 2 * GIB  # of host memory: to save less, micro-batches are not made smaller


def choose_micro_batch(
    plan: MemoryPlan, batch_size: int, seq_len: int, token_bytes: int, working: WorkingSet, idle: Sequence[int]
) -> int:
    """Rows per micro-batch, a divisor of `batch_size`: as many as fit without host memory of their own for activations.

    Large ones save launches and gradient sums, until the block at work pushes boundaries out to the host.

    Raises:
        BudgetError: not even one row fits.
    """
    divisors = [rows for rows in range(1, batch_size + 1) if batch_size % rows == 0]
    best: tuple[tuple[bool, int, int], int] | None = None
    for rows in divisors:
        try:
            planned = plan_activations(plan, [rows * seq_len] * (batch_size // rows), token_bytes, working, idle)
        except BudgetError:
            if rows == 1:
                raise
            break  # more rows need more
        too_small = rows * seq_len < EFFICIENT_TOKENS and rows < batch_size
        rank = too_small, planned.host_bytes // WORTHWHILE, -rows
        if best is None or rank < best[0]:
            best = rank, rows
    assert best is not None
    return best[1]


Key = tuple[int, int]  # block that takes the hidden states as input, micro-batch
BORROW_ALIGN = 256


def borrow(sizes: Mapping[Key, int], idle: Sequence[int]) -> tuple[dict[Key, tuple[int, int]], list[Key]]:
    """Place offloaded boundaries in idle gradient buffers.

    A boundary that enters block b is written after the previous step's updates of blocks below b are done (the forward
    waited for them) and read back before gradients of blocks below b are drained: it may lie in those buffers.

    Args:
        sizes: bytes of each boundary.
        idle: bytes of each block's gradient buffer, 0 where it is not idle.

    Returns:
        (buffer's block, byte offset) per placed boundary, and the keys that found no room.
    """
    used = [0] * len(idle)
    placed: dict[Key, tuple[int, int]] = {}
    homeless = []
    for key in sorted(sizes):
        need = align_up(sizes[key], BORROW_ALIGN)
        home = next((b for b in range(min(key[0], len(idle))) if used[b] + need <= idle[b]), None)
        if home is None:
            homeless.append(key)
        else:
            placed[key] = home, used[home]
            used[home] += need
    return placed, homeless


def own_bytes(sizes: Mapping[Key, int], idle: Sequence[int]) -> int:
    """Host bytes that boundaries need beyond what they can borrow."""
    return sum(align_up(sizes[key], BORROW_ALIGN) for key in borrow(sizes, idle)[1])
