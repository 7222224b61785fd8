"""How long a step will take: what was measured of passes, copies and updates, put on the lanes of `horizon.plan.lanes`.

Pure arithmetic, as `horizon.plan.memory`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

import torch

from horizon.config.schema import Recompute, Tier
from horizon.layout import BlockLayout, first_trained
from horizon.plan.activations import ActivationPlan
from horizon.plan.disk import DISK_BLOCK, UPDATE_PAGES, by_block, loaded_states, num_pages, paged_bytes, staged_parts
from horizon.plan.lanes import BlockCost, StepCost, run_steps
from horizon.plan.memory import GRADS, RING_BUFFERS, MemoryNeeds
from horizon.plan.prediction import StepPrediction
from horizon.plan.states import State, num_bytes
from horizon.plan.traffic import loaded_elements
from horizon.plan.updates import UpdateCost
from horizon.units import align_up

HOST_S = 0.005  # the norm's way to the host, the caller's loop, the checks of a batch
SIMULATED_PAGES = 1000  # of all blocks together at most: in larger models one of them stands for several

LayerKind = tuple[int, int, Recompute]  # elements, trainable elements, and what is kept from forward to backward


class DiskRates(NamedTuple):
    """Bytes per second between the nvme tier and memory, with nothing else going on."""

    read: float
    write: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the machine was measured to do."""

    up_bytes_per_s: float  # host to device
    down_bytes_per_s: float
    device_bytes_per_s: float  # read and written by kernels
    updates_per_s: float  # parameters, by all threads of the optimizer together, with all states in dram
    overlaps: bool  # copies run beside kernels
    cxl_bytes_per_s: float = math.inf  # read and written by updates of states on cxl
    joins_per_s: float = math.inf  # parameters whose halves become fp32 in a slot
    disk: DiskRates | None = None  # None: not known


@dataclass(frozen=True, slots=True)
class PassTimes:
    """Seconds of a block's passes over one micro-batch; recomputation is part of the backward."""

    forward_s: float
    backward_s: float


@dataclass(frozen=True, slots=True)
class StepTimes:
    """What a micro-batch of `num_tokens` tokens was measured to take."""

    num_tokens: int
    embedding: PassTimes
    layers: Mapping[LayerKind, PassTimes]
    head_s: float  # forward and backward


def layer_kind(layout: BlockLayout, first: int, plan: ActivationPlan) -> LayerKind:
    """What decides how long a layer's passes take; backward ends at block `first`."""
    kept = plan.recompute.get(layout.index, Recompute.full) if layout.index >= first else Recompute.full
    return layout.num_elements, layout.num_trainable, kept


def predict_step(step: StepCost, num_tokens: int) -> StepPrediction:
    """A step of that many tokens in steady state."""
    return StepPrediction(num_tokens=num_tokens, **{f"{cause}_s": spent for cause, spent in run_steps(step).items()})


def step_cost(
    needs: MemoryNeeds,
    plan: ActivationPlan,
    tokens: Sequence[int],
    token_bytes: int,
    times: StepTimes,
    rates: Rates,
    as_landed: bool,
) -> StepCost:
    """What a step asks of the lanes that `horizon.plan.lanes` simulates.

    `plan` is that of its activations, `tokens` are those of each micro-batch, and the hidden state of one has
    `token_bytes`. `rates` must have the disk's, where states are on nvme. With `as_landed` the host updates a block as
    soon as its gradient has landed, not when the norm is known.
    """
    first, head, in_hbm = first_trained(needs.layouts), len(needs.layouts) - 1, needs.in_hbm
    shares = [num / times.num_tokens for num in tokens]
    lent = {b.owner: b.param.spec.numel for lay in needs.layouts for b in lay.borrowed if b.param.spec.trainable}
    loaded = loaded_states(needs.states, needs.compute_dtype)
    paging = _Paging.of(needs, rates.disk) if rates.disk and (needs.on_nvme or needs.grads_on_nvme) else None
    write_s, read_s = _boundaries_s([num * token_bytes for num in tokens], rates.disk if plan.on_nvme else None)

    def block(layout: BlockLayout) -> BlockCost:
        passes = _passes(layout, first, head, plan, times)
        at_home = layout.index in in_hbm
        shared = [b for b in layout.borrowed if b.param.spec.trainable]
        num_gradients = layout.num_trained + sum(b.param.spec.numel for b in shared)
        closing = _closing_bytes(needs, len(tokens) > 1 or layout.index == head)
        return BlockCost(
            load_s=_load_s(layout, needs, rates, loaded),
            forward_s=tuple(share * passes.forward_s for share in shares),
            backward_s=tuple(share * passes.backward_s for share in shares),
            close_s=num_gradients * closing / rates.device_bytes_per_s,
            drain_s=_drained_elements(layout, in_hbm) * needs.grad_dtype.itemsize / rates.down_bytes_per_s,
            add_s=0.0 if at_home else lent.get(layout.index, 0) * needs.grad_dtype.itemsize / rates.up_bytes_per_s,
            staging_s=paging.staging_s(layout, loaded) if paging else 0.0,
            update=_update(layout, needs, rates, paging, loaded),
            buffers=(*([layout.index] if layout.num_trainable else []), *(b.owner for b in shared)),
            offloads=layout.index in plan.offloaded,
            in_hbm=at_home,
            spill_s=paging.spill_s(layout) if paging else None,
        )

    return StepCost(
        blocks=tuple(map(block, needs.layouts)),
        first=first,
        weight_slots=needs.weight_slots,
        turn_layers=needs.turn_layers,
        save_s=tuple(num * token_bytes / rates.down_bytes_per_s for num in tokens),
        return_s=tuple(num * token_bytes / rates.up_bytes_per_s for num in tokens),
        write_s=write_s,
        read_s=read_s,
        as_landed=as_landed,
        hbm_as_landed=not needs.keeps_gradients,
        ring=None if needs.keeps_gradients else RING_BUFFERS,
        page_buffers=paging.buffers if paging else UPDATE_PAGES,
        host_s=HOST_S,
        overlaps=rates.overlaps,
    )


def _passes(layout: BlockLayout, first: int, head: int, plan: ActivationPlan, times: StepTimes) -> PassTimes:
    """Of the block; the head's forward is part of its backward."""
    if layout.index == 0:
        return times.embedding
    if layout.index == head:
        return PassTimes(0.0, times.head_s)
    return times.layers[layer_kind(layout, first, plan)]


def _load_s(layout: BlockLayout, needs: MemoryNeeds, rates: Rates, loaded: Sequence[State]) -> float:
    """Of the block's weights: over the link, and in fp32 until their halves are joined."""
    link_s = loaded_elements(layout, needs.in_hbm) * sum(s.dtype.itemsize for s in loaded) / rates.up_bytes_per_s
    joins = needs.compute_dtype is torch.float32
    return link_s + (layout.num_slot_elements / rates.joins_per_s if joins else 0.0)


def _boundaries_s(sizes: Sequence[int], disk: DiskRates | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of boundaries of these bytes, to disk and back; empty where they stay in memory."""
    if disk is None:
        return (), ()
    whole = [align_up(num_bytes, DISK_BLOCK) for num_bytes in sizes]
    return tuple(size / disk.write for size in whole), tuple(size / disk.read for size in whole)


@dataclass(frozen=True, slots=True)
class _Paging:
    """What states and gradients on nvme ask of the disk."""

    needs: MemoryNeeds
    disk: DiskRates
    together: int  # pages that are simulated as one
    gradients: Mapping[int, int]  # bytes of those on nvme, by block, in the order of their updates

    @classmethod
    def of(cls, needs: MemoryNeeds, disk: DiskRates) -> _Paging:
        paged = {block for _, block in needs.on_nvme}
        total = sum(num_pages(layout) for layout in needs.layouts if layout.index in paged)
        gradients = {block: region.num_bytes for (_, block), region in needs.gradient_map.regions.items()}
        return cls(needs, disk, max(1, -(-total // SIMULATED_PAGES)), gradients)

    @property
    def buffers(self) -> int:
        """Pages in memory at a time; one that is read, one at work and one that is written, at least."""
        return max(UPDATE_PAGES // self.together, 3)

    def staging_s(self, layout: BlockLayout, loaded: Sequence[State]) -> float:
        """Of the reads ahead of a load of the block."""
        return staged_parts(loaded, layout, self.needs.on_nvme)[1] / self.disk.read

    def update(self, layout: BlockLayout, work_s: float, loaded: Sequence[State]) -> UpdateCost:
        """Of a block whose update takes the host's threads so long."""
        paged = [state for state, _ in by_block(self.needs.states, [layout], self.needs.on_nvme)]
        gradient_s = self._gradient_s(layout)
        if not paged or not layout.num_trainable:
            return UpdateCost(work_s=work_s, gradient_s=gradient_s)
        size = paged_bytes(paged, layout, self.needs.on_nvme)
        return UpdateCost(
            work_s=work_s,
            pages=-(-num_pages(layout) // self.together),
            read_s=size / self.disk.read,
            write_s=size / self.disk.write,
            loaded=not set(paged).isdisjoint(loaded),
            gradient_s=gradient_s,
        )

    def spill_s(self, layout: BlockLayout) -> float | None:
        """Of the block's gradient on its way to disk; None: it does not go there."""
        size = self.gradients.get(layout.index)
        return size / self.disk.write if size else None

    def _gradient_s(self, layout: BlockLayout) -> float | None:
        """And back for its update: what backward comes to last is in memory still."""
        size = self.gradients.get(layout.index)
        if not size:
            return None
        last = list(self.gradients)[:RING_BUFFERS]
        return 0.0 if layout.index in last else size / self.disk.read


def _drained_elements(layout: BlockLayout, in_hbm: Set[int]) -> int:
    """Elements of the block's gradient that cross the link: its own, and those of what it borrows."""
    own = layout.num_trained if layout.index not in in_hbm else 0
    return own + sum(b.param.spec.numel for b in layout.borrowed if b.param.spec.trainable and b.owner not in in_hbm)


def update_bytes(states: Iterable[State], grad_dtype: torch.dtype) -> float:
    """Bytes a parameter that an update reads and writes, as fractions where numbers stand for several parameters."""
    return sum(2 * state.dtype.itemsize / state.group for state in states) + grad_dtype.itemsize


def _update(
    layout: BlockLayout, needs: MemoryNeeds, rates: Rates, paging: _Paging | None, loaded: Sequence[State]
) -> UpdateCost:
    if layout.index in needs.in_hbm:
        return UpdateCost(work_s=_update_bytes(layout, needs) / rates.device_bytes_per_s)
    work_s = _host_update_s(layout, needs, rates)
    return paging.update(layout, work_s, loaded) if paging else UpdateCost(work_s=work_s)


def _host_update_s(layout: BlockLayout, needs: MemoryNeeds, rates: Rates) -> float:
    """An update by the host: at its pace in dram, or at that of cxl where what lies there takes longer."""
    dram_s = layout.num_trainable / rates.updates_per_s
    if not needs.cxl.share and Tier.cxl not in needs.placed.values():
        return dram_s

    def share(state: str) -> float:
        return 1.0 if needs.tier(state, layout.index) is Tier.cxl else needs.cxl.share

    trained = ((s.name, layout.num_trainable // s.group * s.dtype.itemsize) for s in needs.states)
    on_cxl = sum(2 * share(state) * num_bytes for state, num_bytes in trained)
    on_cxl += share(GRADS) * layout.num_trainable * needs.grad_dtype.itemsize
    return max(dram_s, on_cxl / rates.cxl_bytes_per_s)


def _update_bytes(layout: BlockLayout, needs: MemoryNeeds) -> int:
    """Bytes that an update on the device reads and writes."""
    states = num_bytes(needs.states, [layout])
    return 2 * states + layout.num_trainable * needs.grad_dtype.itemsize


def _closing_bytes(needs: MemoryNeeds, summed: bool) -> int:
    """Bytes that compute reads and writes for each element of a finished gradient: to measure it, and to cast a sum."""
    size = needs.grad_dtype.itemsize
    return 4 + size + size if summed and needs.grad_dtype is not torch.float32 else size
