"""What a run will use, decided before anything is allocated: bytes per tier and purpose, and what fits.

Pure arithmetic on layouts, budgets and measured facts that are passed in. Host = DRAM; device = GPU memory, or, on a
CPU-only run, the part of DRAM that stands in for it; cxl = memory on other NUMA nodes, or what stands in for that;
nvme = a file.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace

import torch

from horizon.config.schema import MasterFormat, Moments, Tier
from horizon.errors import BudgetError
from horizon.layout import BlockLayout
from horizon.plan.cxl import NO_CXL, CxlTier
from horizon.plan.disk import (
    LOAD_BUFFERS,
    UPDATE_PAGES,
    DiskMap,
    Place,
    Placement,
    load_buffer_bytes,
    loaded_states,
    map_disk,
    on_tier,
    staged_places,
    update_page_bytes,
)
from horizon.plan.prediction import StepPrediction
from horizon.plan.states import MOMENTS, State, num_bytes, states_of
from horizon.units import GIB, MIB, format_bytes

MOMENTS_LABEL = {Moments.float32: "fp32", Moments.bfloat16: "bf16", Moments.int8: "int8, scales"}
PROCESS_DRIFT = 16 * MIB  # by which the process's own use differs from one moment to another
DRAIN_SLOTS = 2
WEIGHT_SLOTS = 2  # where nobody asks for a number: a block in use, and one on its way
GRADS = "grads"
ACTIVATIONS = "activations"  # offloaded boundaries, which have no place of their own per block
RING_BUFFERS = 3  # draining, waiting and updating; a tied embedding holds one for the whole backward

ON_HOST = Tier.dram, Tier.cxl


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
    nvme: int = 0
    nvme_key: str = "memory.nvme_budget"
    cxl: CxlTier = NO_CXL

    def of(self, tier: str) -> tuple[int, str]:
        """(bytes, setting) of a tier."""
        return {
            "host": (self.host, self.host_key),
            "nvme": (self.nvme, self.nvme_key),
            self.cxl.name: (self.cxl.num_bytes, self.cxl.budget_key),
            "device": (self.device, self.device_key),
        }[tier]

    @property
    def tiers(self) -> tuple[str, ...]:
        """In the order in which a plan shows them."""
        return "host", self.cxl.name, "nvme", "device"


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes per tier and purpose of one engine, activations excluded until the batch shape is known.

    `boundaries`: the tier of those that leave the device. `turn_layers`: see `MemoryNeeds`. `prediction`: how long a
    step takes, where its shape was planned ahead.
    """

    num_blocks: int
    num_parameters: int
    lines: tuple[Line, ...]
    limits: Limits
    activations: tuple[Line, ...] = field(default=())
    prediction: StepPrediction | None = None
    boundaries: Tier = Tier.dram
    turn_layers: int = 0

    def num_bytes(self, tier: str) -> int:
        """Planned bytes of `tier`."""
        return sum(line.num_bytes for line in (*self.lines, *self.activations) if line.tier == tier)

    def table(self) -> str:
        """The plan as text, one line per tier and purpose."""
        head = f"{self.num_blocks} blocks, {self.num_parameters:,} parameters"
        used = [tier for tier in self.limits.tiers if tier in ("host", "device") or self.num_bytes(tier)]
        wide = 2 + max(5, *map(len, used))
        rows = [f"  {line.tier:<{wide}}{line.purpose:<34}{format_bytes(line.num_bytes):>12}" for line in self._all()]
        for tier in used:
            total, limit = format_bytes(self.num_bytes(tier)), format_bytes(self.limits.of(tier)[0])
            rows.append(f"  {tier:<{wide}}{'predicted peak':<34}{total:>12}  of {limit}")
        if self.limits.cxl.simulated:
            rows.append(f"  {self.limits.cxl.describe()}")
        if self.prediction:
            rows.append(f"  {self.prediction.describe()}")
        elif self.num_bytes("nvme"):
            rows.append("  step time not predicted: the disk's speed is not known")
        return "\n".join([head, *rows])

    def _all(self) -> list[Line]:
        lines = [line for line in (*self.lines, *self.activations) if line.num_bytes]
        return sorted(lines, key=lambda line: self.limits.tiers.index(line.tier))

    def with_activations(self, lines: Sequence[Line], prediction: StepPrediction | None = None) -> MemoryPlan:
        """This plan for a known batch shape."""
        return replace(self, activations=tuple(lines), prediction=prediction)


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
    in_hbm: frozenset[int] = frozenset()  # blocks whose states are on the device
    moments: Moments = Moments.float32
    master: MasterFormat = MasterFormat.split
    placed: Placement = field(default_factory=dict)  # of states and kept gradients of the others that are not in dram
    boundaries: Tier = Tier.dram  # of those that leave the device
    saving: int = 0  # bytes that checkpoints are written from
    cxl: CxlTier = NO_CXL
    pageable: frozenset[str] = frozenset()  # states that cross the link and that CUDA refuses to register
    turn_layers: int = 0  # the last so many, which micro-batch after micro-batch passes with the head, there and back

    @property
    def states(self) -> tuple[State, ...]:
        """What every block has, gradients apart."""
        return states_of(self.master, self.moments)

    @property
    def turn(self) -> range:
        """The blocks of the layers at the turn."""
        head = len(self.layouts) - 1
        return range(head - self.turn_layers, head)

    @property
    def on_nvme(self) -> frozenset[Place]:
        """States of blocks that are on nvme, gradients apart."""
        return frozenset(place for place in on_tier(self.placed, Tier.nvme) if place[0] != GRADS)

    @property
    def grads_on_nvme(self) -> frozenset[int]:
        """Blocks whose gradients wait on nvme."""
        return frozenset(block for name, block in on_tier(self.placed, Tier.nvme) if name == GRADS)

    @property
    def uses_disk(self) -> bool:
        """Whether steps may have something on nvme."""
        return bool(self.on_nvme or self.grads_on_nvme) or self.boundaries is Tier.nvme

    @property
    def gradient_map(self) -> DiskMap:
        """The file of the gradients that wait on nvme."""
        places = [(GRADS, block) for block in self.grads_on_nvme]
        return map_disk([State(GRADS, self.grad_dtype)], self.layouts, places)

    def tier(self, state: str, block: int) -> Tier:
        """Where a state of a block, or its gradient, is."""
        return Tier.hbm if block in self.in_hbm else self.placed.get((state, block), Tier.dram)

    def nodes(self, state: str, block: int) -> tuple[int, ...]:
        """NUMA nodes that a state on the host is striped over; none: the kernel decides."""
        return self.cxl.nodes_of(self.tier(state, block))


def plan_memory(needs: MemoryNeeds, limits: Limits) -> MemoryPlan:
    """Lay out the fixed memory of an engine.

    Raises:
        BudgetError: states, slots or framework do not fit; says by how much and the smallest budget that works.
    """
    parameters = sum(lay.num_parameters for lay in needs.layouts)
    plan = MemoryPlan(
        len(needs.layouts), parameters, fixed_lines(needs), limits,
        boundaries=needs.boundaries, turn_layers=needs.turn_layers,
    )  # fmt: skip
    check_fits(plan, f"a smaller model, {_remedy(plan, needs)}")
    return plan


def fixed_lines(needs: MemoryNeeds) -> tuple[Line, ...]:
    """The fixed memory of an engine, by tier and purpose."""
    on_device = [lay for lay in needs.layouts if lay.index in needs.in_hbm]
    gradients = "gradients" if needs.keeps_gradients else "gradient ring"
    lines = [
        *_state_lines(needs),
        *host_lines(needs.cxl, gradients, *(_gradient_bytes(needs, _of_tier(needs, tier)) for tier in ON_HOST)),
        *_nvme_lines(needs),
        *_nvme_gradient_lines(needs),
        *_load_lines(needs),
        Line("host", "framework", needs.host_overhead),
        Line("device", f"weight slots ({needs.weight_slots})", slot_bytes(needs)),
        Line("device", "gradient slots", gradient_slot_bytes(needs)),
        Line("device", "framework and buffers", needs.device_overhead),
    ]
    if needs.turn_layers:
        purpose = f"weights, sums of {needs.turn_layers} turn layers"
        lines.append(Line("device", purpose, turn_bytes(needs)))
    if needs.saving:
        lines.append(Line("host", "checkpoint staging", needs.saving))
    if on_device:
        lines += [
            Line("device", f"states of {len(on_device)} blocks", num_bytes(needs.states, on_device)),
            Line("device", f"{gradients} of {len(on_device)} blocks", _gradient_bytes(needs, on_device)),
        ]
    return tuple(lines)


def _state_lines(needs: MemoryNeeds) -> list[Line]:
    """What dram and cxl hold of every kind of state."""
    return [
        line
        for purpose, states in _kinds(needs).items()
        for line in host_lines(needs.cxl, purpose, *(_held(needs, states, tier) for tier in ON_HOST))
    ]


def _kinds(needs: MemoryNeeds) -> dict[str, Sequence[State]]:
    """The states that share a line of the plan."""
    return {
        "weights (bf16)": [s for s in needs.states if s.name == "weights"],
        "residual (low halves)": [s for s in needs.states if s.name == "residual"],
        f"exp_avg, exp_avg_sq ({MOMENTS_LABEL[needs.moments]})": MOMENTS[needs.moments],
    }


def _held(needs: MemoryNeeds, states: Sequence[State], tier: Tier) -> int:
    """Bytes of these states on one tier of the host."""
    if tier is not Tier.dram and tier not in needs.placed.values():
        return 0  # is asked for often
    of_tier = ((s, lay) for s in states for lay in needs.layouts if needs.tier(s.name, lay.index) is tier)
    return sum(s.num_bytes(lay) for s, lay in of_tier)


def host_lines(cxl: CxlTier, purpose: str, dram: int, on_cxl: int) -> list[Line]:
    """The lines of what lies in dram and on cxl; interleaving moves a share of both."""
    away = on_cxl + int(cxl.share * dram)
    lines = [Line("host", purpose, dram + on_cxl - away)]
    return [*lines, Line(cxl.name, purpose, away)] if away else lines


def _of_tier(needs: MemoryNeeds, tier: Tier) -> list[BlockLayout]:
    """Blocks whose gradients are there."""
    return [lay for lay in needs.layouts if needs.tier(GRADS, lay.index) is tier]


def _nvme_lines(needs: MemoryNeeds) -> list[Line]:
    """What the nvme tier holds, and the host memory it passes through."""
    states, layouts, places = needs.states, needs.layouts, needs.on_nvme
    if not places:
        return []
    lines = [Line("nvme", purpose, _held(needs, kind, Tier.nvme)) for purpose, kind in _kinds(needs).items()]
    padding = map_disk(states, layouts, places).num_bytes - sum(line.num_bytes for line in lines)
    return [
        Line("host", "nvme staging, updates", UPDATE_PAGES * update_page_bytes(states, layouts, places)),
        *lines,
        Line("nvme", "padding", padding),
    ]


def _nvme_gradient_lines(needs: MemoryNeeds) -> list[Line]:
    """Gradients that wait on nvme, and the ring that they pass through."""
    on_disk = needs.gradient_map
    if not on_disk.regions:
        return []
    return [
        Line("host", "nvme staging, gradients", RING_BUFFERS * on_disk.largest),
        Line("nvme", "gradients", on_disk.num_bytes),
    ]


def _load_lines(needs: MemoryNeeds) -> list[Line]:
    """Pinned memory that loads pass through: those from disk, and those from memory that CUDA does not know."""
    loaded = loaded_states(needs.states, needs.compute_dtype)
    places = staged_places(needs.on_nvme, needs.pageable, needs.layouts, needs.in_hbm)
    if not places:
        return []
    purpose = "pinned staging, loads" if needs.pageable else "nvme staging, loads"
    return [Line("host", purpose, LOAD_BUFFERS * load_buffer_bytes(loaded, needs.layouts, places))]


def _gradient_bytes(needs: MemoryNeeds, layouts: Sequence[BlockLayout]) -> int:
    """Bytes of the buffers in which the gradients of the blocks of one tier wait."""
    sizes = [lay.num_trainable for lay in layouts]
    kept = sum(sizes) if needs.keeps_gradients else RING_BUFFERS * max(sizes, default=0)
    return kept * needs.grad_dtype.itemsize


def _remedy(plan: MemoryPlan, needs: MemoryNeeds) -> str:
    """The setting that helps most where `plan` does not fit."""
    if needs.in_hbm:  # with moments of fewer bits there could be no such blocks
        return "fewer memory.weight_slots, fewer blocks in HBM (memory.hbm_blocks)"
    if plan.num_bytes("host") > plan.limits.host and needs.moments is not Moments.int8:
        return "optim.moments=int8"
    return "fewer memory.weight_slots"


def slot_bytes(needs: MemoryNeeds) -> int:
    """Device bytes of the weight slots: fp32 needs room for what is loaded and the joined values."""
    size = slot_elements(needs.layouts, {*in_place(needs.in_hbm, needs.compute_dtype), *needs.turn})
    return needs.weight_slots * _bytes_per_slot_element(needs) * size


def _bytes_per_slot_element(needs: MemoryNeeds) -> int:
    halves = sum(state.dtype.itemsize for state in loaded_states(needs.states, needs.compute_dtype))
    return halves if needs.compute_dtype is torch.bfloat16 else halves + 4


def turn_bytes(needs: MemoryNeeds) -> int:
    """Device bytes of what each layer at the turn has to itself: a slot for its weights, and the fp32 sum."""
    resident, element = in_place(needs.in_hbm, needs.compute_dtype), _bytes_per_slot_element(needs)
    layouts = [needs.layouts[block] for block in needs.turn]
    weights = sum(lay.num_slot_elements for lay in layouts if lay.index not in resident)
    return element * weights + 4 * sum(lay.num_grad_elements for lay in layouts)


def in_place(in_hbm: frozenset[int], compute_dtype: torch.dtype) -> frozenset[int]:
    """Blocks that are computed with where they are: those in HBM, in bf16."""
    return in_hbm if compute_dtype is torch.bfloat16 else frozenset()


def slot_elements(layouts: Sequence[BlockLayout], elsewhere: Set[int]) -> int:
    """Elements of a slot that all blocks pass but those `elsewhere`, which are in place or have a slot each."""
    return max((lay.num_slot_elements for lay in layouts if lay.index not in elsewhere), default=0)


def gradient_slot_bytes(needs: MemoryNeeds) -> int:
    """Device bytes of the fp32 sum and the drain slots."""
    drain, total = gradient_slot_elements(needs.layouts, needs.in_hbm, needs.grad_dtype)
    return DRAIN_SLOTS * drain * needs.grad_dtype.itemsize + 4 * total


def gradient_slot_elements(
    layouts: Sequence[BlockLayout], in_hbm: Set[int], grad_dtype: torch.dtype
) -> tuple[int, int]:
    """Elements of a drain slot, and of the fp32 sum.

    The gradient of a block in HBM stays in a buffer of its own and needs no drain slot. In fp32 it is summed there,
    and those of other blocks in a drain slot, unless the block in HBM also has a share in another block's gradient.
    What is frozen needs neither.
    """
    drain = max((lay.num_grad_elements for lay in layouts if lay.index not in in_hbm), default=0)
    summed = [lay for lay in layouts if grad_dtype is not torch.float32 or (lay.index in in_hbm and lay.borrowed)]
    return drain, max((lay.num_grad_elements for lay in summed), default=0)


def check_fits(plan: MemoryPlan, remedy: str) -> None:
    """Raise BudgetError when a tier's planned bytes exceed its limit."""
    for tier in plan.limits.tiers:
        need, (limit, key), slack = plan.num_bytes(tier), plan.limits.of(tier), PROCESS_DRIFT if tier == "host" else 0
        if need > limit:
            kind = "space" if tier == "nvme" else "memory"
            parts = ", ".join(
                f"{line.purpose} {format_bytes(line.num_bytes)}"
                for line in (*plan.lines, *plan.activations)
                if line.tier == tier and line.num_bytes
            )
            raise BudgetError(
                f"needs {format_bytes(need)} of {tier} {kind} ({parts}) but {format_bytes(limit)} is allowed, "
                f"{format_bytes(need - limit)} too little; the smallest {key} that works is {round_up(need + slack)} "
                f"(or use {remedy})",
                tier,
                need,
                limit,
            )


def round_up(num_bytes: int) -> str:
    """A budget that `num_bytes` fit, as a setting."""
    unit, name = (GIB, "GiB") if num_bytes >= 10 * GIB else (MIB, "MiB")
    return f"{-(-num_bytes // unit)}{name}"
