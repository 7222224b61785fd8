"""The bytes that a step cannot help bringing across the link when all states live in host memory."""

from __future__ import annotations

import torch

from horizon.layout import BlockLayout
from horizon.plan.memory import MemoryNeeds


def least_traffic(needs: MemoryNeeds) -> dict[tuple[str, str], int]:
    """Bytes by (direction, what) of one step: weights up twice but for the turn-around, gradients down once.

    The blocks that are still in a slot when backward begins (the head, the last layer, with more than two slots more of
    them) go up once, and so do frozen blocks below the lowest one that trains. Boundaries depend on the batch.
    """
    layouts = needs.layouts
    last = len(layouts) - 1  # the head
    first = min(lay.index for lay in layouts if lay.num_trainable)
    kept = max(needs.weight_slots, 2) - 1
    again = layouts[first : max(first, last - kept)]
    element = 2 if needs.compute_dtype is torch.bfloat16 else 4  # fp32: both halves
    return {
        ("H2D", "weights"): element * sum(_loaded(lay) for lay in (*layouts, *again)),
        ("D2H", "gradient"): needs.grad_dtype.itemsize * sum(lay.num_trainable for lay in layouts),
    }


def _loaded(layout: BlockLayout) -> int:
    """Elements that a load of the block copies."""
    return layout.num_elements + sum(b.param.spec.numel for b in layout.borrowed)
