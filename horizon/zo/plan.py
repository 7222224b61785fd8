"""The memory of a zeroth-order run, by tier and purpose: arithmetic, as `horizon.plan.memory`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from horizon.config.schema import MemoryConfig, Policy, Recompute
from horizon.errors import BudgetError, ConfigError
from horizon.layout import BlockLayout
from horizon.plan.memory import Limits, Line, MemoryPlan, check_fits
from horizon.plan.refusals import check_memory
from horizon.plan.states import num_bytes
from horizon.units import MIB
from horizon.zo.copies import copy_elements
from horizon.zo.masters import states_of
from horizon.zo.settings import ZerothOrder
from horizon.zo.slots import kept_blocks, slot_elements

HEAD_CHUNK_BYTES = 512 * MIB  # logits in fp32 that would exist at once; in bf16 they take half of it

Shapes = Sequence[tuple[int, int]]  # (rows, tokens) of a step's micro-batches


@dataclass(frozen=True, slots=True)
class ZerothOrderNeeds:
    """The facts of a model and a run that decide its fixed memory."""

    layouts: Sequence[BlockLayout]
    settings: ZerothOrder
    compute_dtype: torch.dtype
    weight_slots: int  # up and in use; one more is on its way back
    host_overhead: int  # process memory before the masters exist
    device_overhead: int  # context and buffers

    @property
    def num_slots(self) -> int:
        """Slots for masters."""
        return self.weight_slots + 1


@dataclass(frozen=True, slots=True)
class WorkingSet:
    """Device bytes that a block at work takes, as measured: a line in the micro-batch's tokens, or the head's chunk."""

    base: int = 0
    per_token: int = 0
    head: int = 0

    def at(self, tokens: int) -> int:
        """Bytes at a micro-batch of `tokens` tokens."""
        return max(self.head, self.base + self.per_token * tokens)


def plan_memory(needs: ZerothOrderNeeds, limits: Limits) -> MemoryPlan:
    """Lay out the fixed memory of an engine.

    Raises:
        BudgetError: it does not fit; says by how much and the smallest budget that works.
    """
    layouts, states = needs.layouts, states_of(needs.settings)
    kept = [layouts[block] for block in sorted(kept_blocks(layouts))]
    num_slots = min(needs.num_slots, len(layouts) - len(kept))
    master_bytes = sum(state.dtype.itemsize for state in states)
    slot = slot_elements(layouts, kept_blocks(layouts)) * master_bytes
    perturbed, frozen = (elements * needs.compute_dtype.itemsize for elements in copy_elements(layouts))
    lines = [
        Line("host", f"weights ({needs.settings.master})", num_bytes(states[:1], layouts)),
        Line("host", "residual (low halves)", num_bytes(states[1:], layouts)),
        Line("host", "framework", needs.host_overhead),
        Line("device", f"weight slots ({num_slots})", num_slots * slot),
        Line("device", "perturbed copies (+eps, -eps)", 2 * perturbed),
        Line("device", "copy of frozen weights", frozen),
        Line("device", "tied embedding", num_bytes(states, kept)),
        Line("device", "framework and buffers", needs.device_overhead),
    ]
    parameters = sum(layout.num_parameters for layout in layouts)
    plan = MemoryPlan(len(layouts), parameters, tuple(lines), limits)
    short = plan.num_bytes("host") > limits.host and len(states) > 1
    check_fits(plan, f"a smaller model, {'zo.master=bf16' if short else 'fewer memory.weight_slots'}")
    return plan


def with_activations(
    plan: MemoryPlan, shapes: Shapes, queries: int, token_bytes: int, working: WorkingSet
) -> MemoryPlan:
    """The plan of a step of these micro-batches: hidden states of all its passes, and one block at work.

    Raises:
        BudgetError: they do not fit.
    """
    tokens = [rows * length for rows, length in shapes]
    hidden = 2 * queries * sum(tokens) * token_bytes
    found = plan.with_activations(
        [
            Line("device", "hidden states", hidden),
            Line(
                "device", f"block at work ({max(tokens)} tokens)", working.at(max(tokens)) + max(tokens) * token_bytes
            ),
        ]
    )
    check_fits(found, "a smaller train.micro_batch or train.batch_size, or fewer zo.queries")
    return found


def choose_rows(
    plan: MemoryPlan, batch_size: int, seq_len: int, queries: int, token_bytes: int, working: WorkingSet
) -> int:
    """Rows per micro-batch, a divisor of `batch_size`: as many as fit.

    Raises:
        BudgetError: not even one row fits.
    """
    for rows in range(batch_size, 0, -1):
        if batch_size % rows == 0:
            try:
                with_activations(plan, [(rows, seq_len)] * (batch_size // rows), queries, token_bytes, working)
            except BudgetError:
                if rows == 1:
                    raise
            else:
                return rows
    raise AssertionError(f"batch_size={batch_size} has no divisor")


def least_traffic(needs: ZerothOrderNeeds) -> dict[tuple[str, str], int]:
    """Bytes by (direction, what) that a step must move: masters up once, the trained ones down every k-th step.

    Those of kept blocks stay on the device.
    """
    states = states_of(needs.settings)
    streamed = [lay for lay in needs.layouts if lay.index not in kept_blocks(needs.layouts)]
    trained = sum(lay.num_trainable for lay in streamed) * sum(state.dtype.itemsize for state in states)
    return {
        ("H2D", "weights"): num_bytes(states, streamed),
        ("D2H", "weights"): trained // needs.settings.writeback_every,
    }


def refuse_what_has_no_use(memory: MemoryConfig) -> None:
    """Raise a ConfigError for settings of memory that zeroth-order steps do not follow, or that cannot work."""
    check_memory(memory)
    for key, value, default in (
        ("recompute", memory.recompute, Recompute.auto),
        ("hbm_blocks", memory.hbm_blocks, None),
        ("turn_layers", memory.turn_layers, None),
        ("nvme_dir", memory.nvme_dir, None),
        ("host_reserve", memory.host_reserve, None),
        ("update_threads", memory.update_threads, None),
        ("cxl_nodes", memory.cxl_nodes, "auto"),
        ("cxl_budget", memory.cxl_budget, "auto"),
        ("cxl_simulated.size", memory.cxl_simulated.size, None),
    ):
        if value != default:
            raise ConfigError(f"memory.{key}={value} has no use in zeroth-order steps; leave it at {default or 'null'}")
    if memory.policy not in (Policy.auto, Policy.dram):
        raise ConfigError(f"memory.policy={memory.policy} has no use in zeroth-order steps; leave it at auto")
