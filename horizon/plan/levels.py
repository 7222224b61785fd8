"""What stays in DRAM and what goes to CXL with `cxl_aware`: levels, by what a byte costs on the slower tier.

1. moments and master: an update reads and writes every byte of them (both halves of the master, so weights, too)
2. gradients: written over the link, read once by the update
3. offloaded boundaries: the link alone moves them, and it is slower than either tier; they take no DRAM at all

Within a level the first blocks come first: the next forward waits for their updates soonest. Pure arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from horizon.config.schema import Tier
from horizon.plan.disk import Place
from horizon.plan.memory import GRADS, RING_BUFFERS, Limits, MemoryNeeds
from horizon.plan.states import MASTERS, MOMENTS


def fill_dram(needs: MemoryNeeds, limits: Limits) -> MemoryNeeds:
    """`needs` with dram filled level by level and the rest on cxl; the plan refuses what exceeds both."""
    room = limits.host - needs.host_overhead - needs.saving
    placed: dict[Place, Tier] = {}
    for places, num_bytes in _by_level(needs):
        if num_bytes <= room:
            room -= num_bytes
        else:
            placed |= dict.fromkeys(places, Tier.cxl)
    return replace(needs, placed=placed)


def _by_level(needs: MemoryNeeds) -> Iterator[tuple[list[Place], int]]:
    """What stays together, in the order in which it gets dram, and its bytes."""
    blocks = [lay for lay in needs.layouts if lay.index not in needs.in_hbm]
    for state in (*MOMENTS[needs.moments], *reversed(MASTERS[needs.master])):  # weights come last
        for layout in blocks:
            yield [(state.name, layout.index)], state.num_bytes(layout)
    grads = {lay.index: lay.num_trainable * needs.grad_dtype.itemsize for lay in blocks}
    if needs.keeps_gradients:
        yield from (([(GRADS, block)], num_bytes) for block, num_bytes in grads.items())
    elif grads:
        yield [(GRADS, block) for block in grads], RING_BUFFERS * max(grads.values())
