"""The bytes that a step cannot help bringing across the link, none for blocks in HBM, and to and from the disk."""

from __future__ import annotations

from collections.abc import Sequence, Set

from horizon.layout import BlockLayout, first_trained
from horizon.plan.disk import loaded_states, paged_bytes, staged_parts
from horizon.plan.memory import GRADS, RING_BUFFERS, MemoryNeeds


def least_traffic(needs: MemoryNeeds) -> dict[tuple[str, str], int]:
    """Bytes by (direction, what) of one step: weights up twice but for the turn-around, gradients down once.

    The blocks that are still in a slot when backward begins (the head, the last layer, with more than two slots more of
    them) go up once, and so do layers at the turn and frozen blocks below the lowest one that trains. Boundaries depend
    on the batch.
    """
    first = first_trained(needs.layouts)
    layouts = [lay for lay in needs.layouts if lay.index not in needs.in_hbm]
    above = [lay for lay in layouts if lay.index >= first and lay.index not in needs.turn]
    kept = max(needs.weight_slots, 2)
    element = sum(state.dtype.itemsize for state in loaded_states(needs.states, needs.compute_dtype))
    loads = (*layouts, *above[:-kept])
    return {
        **_disk_traffic(needs, loads),
        ("H2D", "weights"): element * sum(loaded_elements(lay, needs.in_hbm) for lay in loads),
        ("D2H", "gradient"): needs.grad_dtype.itemsize * sum(lay.num_trainable for lay in layouts),
    }


def _disk_traffic(needs: MemoryNeeds, loads: Sequence[BlockLayout]) -> dict[tuple[str, str], int]:
    """What these loads and the update move: states on nvme are read for each load, read and written for the update.

    Gradients there are written, and read but for those that are still in the ring when the backward is over.
    """
    states, layouts, places = needs.states, needs.layouts, needs.on_nvme
    updated = sum(paged_bytes(states, layout, places) for layout in layouts)
    loaded = loaded_states(states, needs.compute_dtype)
    read = sum(staged_parts(loaded, layout, places)[1] for layout in loads)
    regions = needs.gradient_map.regions
    grads = [regions[GRADS, block].num_bytes for block in sorted(needs.grads_on_nvme)]
    if not places and not grads:
        return {}
    return {
        ("disk", "read"): updated + read + sum(grads[RING_BUFFERS:]),
        ("disk", "write"): updated + sum(grads),
    }


def loaded_elements(layout: BlockLayout, in_hbm: Set[int]) -> int:
    """Elements that a load of the block brings across the link, where those blocks are in HBM."""
    own = 0 if layout.index in in_hbm else layout.num_elements
    return own + sum(b.param.spec.numel for b in layout.borrowed if b.owner not in in_hbm)
