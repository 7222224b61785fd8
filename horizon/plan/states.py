"""Which flat states a block has, in which format, and what they weigh: the single authority for plan, store and update.

Every block owns `weights` and `residual`, which together are its fp32 masters; with `optim.master=bf16_stochastic` the
weights alone are. Its trainable prefix has moments too, whose format `optim.moments` chooses. `horizon.optim.adamw`
says what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from horizon.config.schema import MasterFormat, Moments
from horizon.layout import PARAM_ALIGN, BlockLayout

# Elements of int8 moments that share two scales. Parameters begin at multiples of it, so no group has two of them.
GROUP = PARAM_ALIGN


@dataclass(frozen=True, slots=True)
class State:
    """One kind of flat array that blocks have."""

    name: str
    dtype: torch.dtype
    frozen: bool = False  # frozen parameters have it, too
    group: int = 1  # parameters that one number of the array stands for

    def numel(self, layout: BlockLayout) -> int:
        """Numbers in this state of a block."""
        num_elements = layout.num_elements if self.frozen else layout.num_trainable
        return num_elements // self.group  # both are multiples of any group

    def num_bytes(self, layout: BlockLayout) -> int:
        """Bytes of this state of a block."""
        return self.numel(layout) * self.dtype.itemsize

    def span(self, start: int, stop: int) -> slice:
        """Where the numbers lie that stand for elements `start` (a multiple of the group) to `stop` of a block."""
        return slice(start // self.group, -(-stop // self.group))


MASTER = State("weights", torch.bfloat16, frozen=True), State("residual", torch.int16, frozen=True)
MASTERS = {MasterFormat.split: MASTER, MasterFormat.bf16_stochastic: MASTER[:1]}
MOMENTS = {
    Moments.float32: (State("exp_avg", torch.float32), State("exp_avg_sq", torch.float32)),
    Moments.bfloat16: (State("exp_avg", torch.bfloat16), State("exp_avg_sq", torch.bfloat16)),
    Moments.int8: (
        State("exp_avg", torch.uint8),
        State("exp_avg_sq", torch.uint8),
        State("exp_avg_scale", torch.float32, group=GROUP),
        State("exp_avg_sq_scale", torch.float32, group=GROUP),
    ),
}


def states_of(master: MasterFormat, moments: Moments) -> tuple[State, ...]:
    """What a block has with these formats, gradients apart."""
    return (*MASTERS[master], *MOMENTS[moments])


def num_bytes(states: Iterable[State], layouts: Iterable[BlockLayout]) -> int:
    """Bytes of `states` of all blocks together."""
    layouts = tuple(layouts)
    return sum(state.num_bytes(layout) for state in states for layout in layouts)
