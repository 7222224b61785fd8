"""The host store: every parameter and optimizer state of the model, flat per block, in DRAM.

`horizon.plan.states` lists the kinds. `weights` (bf16, the high half of the fp32 master) is what streams to the device;
`residual` is the low half; moments exist for trainable parameters only. Nothing is held twice: a parameter is read or
written through the layout, by its Hugging Face name. Blocks that the placement names have all their states in device
memory (`hbm`) instead, and none on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

import torch
from torch import Tensor

from horizon.config.schema import Moments
from horizon.errors import CheckpointError
from horizon.layout import BlockLayout, Param
from horizon.plan.states import MASTER, MOMENTS, State
from horizon.store.ledger import Ledger
from horizon.store.split import join_master, split_master
from horizon.store.tiers import NOWHERE, Nodes, TieredState, anywhere

CPU = torch.device("cpu")
WRITE_PIECE = 1 << 24  # elements of a parameter that are split into halves at a time: 64 MiB in fp32


class HostStore:
    """States of all blocks; index with the block number.

    Attributes:
        weights: bf16 [num_elements] per block.
        residual: int16 [num_elements] per block.
        moments: by name, in the order of `horizon.plan.states`, the flat tensors of all blocks.
        in_hbm: blocks whose states are on the device.
        ledger: how many optimizer steps the weights of each block have seen.
    """

    def __init__(
        self,
        layouts: Sequence[BlockLayout],
        pin: bool,
        pin_residual: bool,
        device: torch.device = CPU,
        in_hbm: Set[int] = NOWHERE,
        moments: Moments = Moments.float32,
        nodes: Nodes = anywhere,
    ):
        self._nodes = nodes
        self.layouts = tuple(layouts)
        self.in_hbm = frozenset(in_hbm)
        self._device = device
        self.ledger = Ledger(len(self.layouts))
        self._states: dict[str, TieredState] = {}
        try:
            # Only weights (and, computing in fp32, residuals) cross the link; the moments are the CPU's alone.
            weights, residual = MASTER
            self.weights = self._allocate(weights, pin)
            self.residual = self._allocate(residual, pin and pin_residual)
            self.moments = {state.name: self._allocate(state, False) for state in MOMENTS[moments]}
        except BaseException:
            self.close()
            raise
        self._places = {p.name: (lay.index, p) for lay in self.layouts for p in lay.params}

    def _allocate(self, state: State, pin: bool) -> list[Tensor]:
        numels = [state.numel(lay) for lay in self.layouts]
        self._states[state.name] = TieredState(
            numels, state.dtype, state.name, pin, self._device, self.in_hbm, self._nodes
        )
        return self._states[state.name].blocks

    def states(self, block: int) -> dict[str, Tensor]:
        """All flat tensors of a block, by name."""
        moments = {name: blocks[block] for name, blocks in self.moments.items()}
        return {"weights": self.weights[block], "residual": self.residual[block], **moments}

    def keep_in_hbm(self, in_hbm: Set[int]) -> None:
        """Have the states of exactly these blocks on the device; nobody may be reading or updating any.

        Raises:
            BudgetError: a tier has no room; the states are then of no use any more.
        """
        for state in self._states.values():
            state.keep_in_hbm(in_hbm)
        self.in_hbm = frozenset(in_hbm)

    @property
    def num_bytes(self) -> dict[str, int]:
        """Host bytes held per state kind."""
        return {kind: state.num_bytes for kind, state in self._states.items()}

    def place(self, name: str) -> tuple[int, Param]:
        """(block, parameter) of a Hugging Face name.

        Raises:
            CheckpointError: the model has no such parameter.
        """
        try:
            return self._places[name]
        except KeyError:
            raise CheckpointError(f"the model has no parameter {name!r}") from None

    def names(self) -> Iterator[str]:
        """Hugging Face names, in block order."""
        return iter(self._places)

    def write_master(self, name: str, value: Tensor) -> None:
        """Set a parameter from a tensor of any float dtype on any device, exactly."""
        block, param = self.place(name)
        if tuple(value.shape) != param.spec.shape:
            raise CheckpointError(f"{name} has shape {tuple(value.shape)}, the model expects {param.spec.shape}")
        start = param.offset
        for piece in torch.split(value.detach().reshape(-1), WRITE_PIECE):  # a device may have little room beside it
            high, low = split_master(piece.float())
            end = start + piece.numel()
            self.weights[block][start:end].copy_(high)
            self.residual[block][start:end].copy_(low)
            start = end

    def read_master(self, name: str) -> Tensor:
        """A parameter's exact fp32 value, a new CPU tensor of its shape."""
        block, param = self.place(name)
        span = slice(param.offset, param.end)
        high, low = self.weights[block][span].cpu(), self.residual[block][span].cpu()
        return join_master(high, low).view(param.spec.shape)

    def close(self) -> None:
        """Give all memory back. Idempotent."""
        self.weights, self.residual, self.moments = [], [], {}
        for state in self._states.values():
            state.close()
