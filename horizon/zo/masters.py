"""The host's weights of a zeroth-order run: 2 or 4 bytes a parameter and nothing else, flat per block.

`weights` (bf16 or fp16) and, of a split master, `residual` have the elements of the block's layout. Each block also
has a version: the steps its bits on the host have seen. Bits and version change together, when a block is written back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from horizon.config.schema import Master
from horizon.errors import CheckpointError
from horizon.layout import BlockLayout, Param
from horizon.plan.states import MASTER, State
from horizon.store.arena import Arena
from horizon.store.split import join_master, split_master
from horizon.zo.settings import ZerothOrder


def states_of(settings: ZerothOrder) -> tuple[State, ...]:
    """What a block's master is made of."""
    if settings.master == Master.fp32:
        return MASTER
    return (State("weights", settings.master_dtype, frozen=True),)


class Masters:
    """States of all blocks; index with the block number.

    Attributes:
        states: per block its flat tensors, in the order of `states_of`.
        versions: per block the steps that these have seen.

    Raises:
        BudgetError: the system refuses the memory.
    """

    def __init__(self, layouts: Sequence[BlockLayout], settings: ZerothOrder, pin: bool):
        self.layouts = tuple(layouts)
        self.versions = [0] * len(self.layouts)
        self._dtype = settings.master_dtype
        self._arenas: list[Arena] = []
        try:
            for state in states_of(settings):
                sizes = [state.numel(layout) * state.dtype.itemsize for layout in self.layouts]
                self._arenas.append(Arena(sizes, state.name, pin))
        except BaseException:
            self.close()
            raise
        kinds = [
            [region.view(s.dtype) for region in a.regions]
            for s, a in zip(states_of(settings), self._arenas, strict=True)
        ]
        self.states: list[tuple[Tensor, ...]] = [*zip(*kinds, strict=True)]
        self._places = {p.name: (layout.index, p) for layout in self.layouts for p in layout.params}

    @property
    def num_bytes(self) -> int:
        """Host bytes held."""
        return sum(arena.num_bytes for arena in self._arenas)

    def place(self, name: str) -> tuple[int, Param]:
        """(block, parameter) of a Hugging Face name.

        Raises:
            CheckpointError: the model has no such parameter.
        """
        try:
            return self._places[name]
        except KeyError:
            raise CheckpointError(f"the model has no parameter {name!r}") from None

    def write_master(self, name: str, value: Tensor) -> None:
        """Set a parameter from a tensor of any float dtype on any device: exactly, or rounded to 16 bits.

        Raises:
            CheckpointError: it has another shape, or is too large for fp16.
        """
        block, param = self.place(name)
        if tuple(value.shape) != param.spec.shape:
            raise CheckpointError(f"{name} has shape {tuple(value.shape)}, the model expects {param.spec.shape}")
        value, targets = value.detach().reshape(-1), [state[param.offset : param.end] for state in self.states[block]]
        if len(targets) == 2:
            for target, half in zip(targets, split_master(value.float()), strict=True):
                target.copy_(half)
            return
        rounded = value.to(self._dtype)
        if self._dtype is torch.float16 and bool(rounded.isinf().any()):
            raise CheckpointError(f"{name} holds values that fp16 cannot hold; set zo.master=bf16 or fp32")
        targets[0].copy_(rounded)

    def read_master(self, name: str) -> Tensor:
        """A parameter's exact value in fp32, a new CPU tensor of its shape."""
        block, param = self.place(name)
        return self.read_elements(block, slice(param.offset, param.end)).view(param.spec.shape)

    def read_elements(self, block: int, span: slice) -> Tensor:
        """Exact values of some elements of a block, a new fp32 tensor."""
        parts = [state[span] for state in self.states[block]]
        return join_master(*parts) if len(parts) == 2 else parts[0].to(torch.float32, copy=True)

    def close(self) -> None:
        """Give all memory back. Idempotent."""
        self.states = []
        for arena in self._arenas:
            arena.close()
