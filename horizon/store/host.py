"""The host store: every parameter and optimizer state of the model, flat per block, in DRAM or on nvme.

`horizon.plan.states` lists the kinds. `weights` (bf16, the high half of the fp32 master) is what streams to the device;
`residual` is the low half, if there is one; moments exist for trainable parameters only. Nothing is held twice: a
parameter is read or written through the layout, by its Hugging Face name. Blocks that the placement names have all
their states in device memory (`hbm`) instead, and none on the host. States on nvme reach their update through `pages`,
the device through `loads`, and everybody else through `read_state` and `write_state`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

import torch
from torch import Tensor

from horizon.config.schema import Master, Moments, NvmeEngine, Tier
from horizon.errors import CheckpointError
from horizon.layout import BlockLayout, Param
from horizon.plan.disk import LOAD_BUFFERS, UPDATE_PAGES, Place, Placement, map_disk
from horizon.plan.states import MASTERS, MOMENTS, State, states_of
from horizon.store.ledger import Ledger
from horizon.store.loads import StagedLoads
from horizon.store.nvme import NvmeTier, Observer, as_bytes, open_nvme
from horizon.store.pages import UpdatePages
from horizon.store.split import join_master, split_master
from horizon.store.tiers import NOWHERE, TieredState

CPU = torch.device("cpu")


class HostStore:
    """States of all blocks; index with the block number.

    Args:
        pin: register with CUDA what crosses the link.
        pin_residual: residuals cross it, too: blocks compute in fp32.
        placed: states of blocks on the host that are not in DRAM.
        nvme_dir: the folder for those on nvme.

    Attributes:
        weights: bf16 [num_elements] per block; empty where they are on nvme, as with all states.
        residual: int16 [num_elements] per block; an empty list where the weights alone are the masters.
        moments: by name, in the order of `horizon.plan.states`, the flat tensors of all blocks.
        in_hbm: blocks whose states are on the device.
        ledger: how many optimizer steps the weights of each block have seen.
        pages: of states on nvme, for their update; None where none are.
        loads: of states on nvme, for the device; None where none are.
    """

    def __init__(
        self,
        layouts: Sequence[BlockLayout],
        pin: bool,
        pin_residual: bool,
        device: torch.device = CPU,
        in_hbm: Set[int] = NOWHERE,
        moments: Moments = Moments.float32,
        master: Master = Master.split,
        placed: Placement | None = None,
        nvme_dir: str | None = None,
        nvme_engine: NvmeEngine = NvmeEngine.auto,
    ):
        self.layouts = tuple(layouts)
        self.in_hbm = frozenset(in_hbm)
        self._device, self._placed = device, placed or {}
        self.ledger = Ledger(len(self.layouts))
        self._states: dict[str, TieredState] = {}
        self._nvme: NvmeTier | None = None
        self.pages: UpdatePages | None = None
        self.loads: StagedLoads | None = None
        weights, *rest = MASTERS[master]
        self._kinds = {state.name: state for state in states_of(master, moments)}
        try:
            if Tier.nvme in self._placed.values():
                loaded = [weights, *rest] if pin_residual else [weights]
                self._open_nvme(nvme_dir or "", nvme_engine, loaded, pin)
            # Only weights (and, computing in fp32, residuals) cross the link; the moments are the CPU's alone.
            self.weights = self._allocate(weights, pin)
            self.residual = self._allocate(rest[0], pin and pin_residual) if rest else []
            self.moments = {state.name: self._allocate(state, False) for state in MOMENTS[moments]}
        except BaseException:
            self.close()
            raise
        self._places = {p.name: (lay.index, p) for lay in self.layouts for p in lay.params}

    def _open_nvme(self, folder: str, engine: NvmeEngine, loaded: Sequence[State], pin: bool) -> None:
        states, layouts, placed = [*self._kinds.values()], self.layouts, self._placed
        self._nvme = tier = open_nvme(folder, engine, map_disk(states, layouts, placed))
        self.pages = UpdatePages(tier, states, loaded, layouts, placed, self.ledger, UPDATE_PAGES)
        self.loads = StagedLoads(tier, loaded, layouts, placed, self.ledger, pin, LOAD_BUFFERS)

    def _allocate(self, state: State, pin: bool) -> list[Tensor]:
        numels = [state.numel(lay) for lay in self.layouts]
        on_nvme = {block for block in range(len(numels)) if self._placed.get((state.name, block)) is Tier.nvme}
        self._states[state.name] = TieredState(numels, state.dtype, state.name, pin, self._device, self.in_hbm, on_nvme)
        return self._states[state.name].blocks

    def states(self, block: int) -> dict[str, Tensor]:
        """All flat tensors of a block, by name, where they are; those on nvme are empty here."""
        moments = {name: blocks[block] for name, blocks in self.moments.items()}
        residual = {"residual": self.residual[block]} if self.residual else {}
        return {"weights": self.weights[block], **residual, **moments}

    def read_state(self, name: str, block: int) -> Tensor:
        """A copy in host memory of a state of a block, wherever it is; no update of it may be under way."""
        if (name, block) not in self._placed:
            return self._states[name].blocks[block].to("cpu", copy=True)
        copy = torch.empty(self._kinds[name].numel(self.layouts[block]), dtype=self._kinds[name].dtype)
        self._on_nvme().read_range((name, block), 0, as_bytes(copy))
        return copy

    def write_state(self, name: str, block: int, value: Tensor) -> None:
        """Set a state of a block, wherever it is; nobody may be reading or updating it."""
        self._write((name, block), 0, value.to(self._kinds[name].dtype))

    def _on_nvme(self) -> NvmeTier:
        """The tier, nothing on its way to it."""
        assert self._nvme is not None and self.pages is not None
        self.pages.wait_written()
        return self._nvme

    def _write(self, place: Place, start: int, value: Tensor) -> None:
        """Set numbers of a state from number `start` on."""
        name, block = place
        if place in self._placed:
            self._on_nvme().write_range(place, start * value.itemsize, as_bytes(value.cpu().contiguous()))
        else:
            self._states[name].blocks[block][start : start + value.numel()].copy_(value)

    def _read(self, place: Place, start: int, stop: int) -> Tensor:
        """Numbers `start` to `stop` of a state, on the CPU."""
        name, block = place
        if place not in self._placed:
            return self._states[name].blocks[block][start:stop].cpu()
        numbers = torch.empty(stop - start, dtype=self._kinds[name].dtype)
        self._on_nvme().read_range(place, start * numbers.itemsize, as_bytes(numbers))
        return numbers

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
        """Set a parameter from a tensor of any float dtype on any device: exactly, or to the nearest bf16 value."""
        block, param = self.place(name)
        if tuple(value.shape) != param.spec.shape:
            raise CheckpointError(f"{name} has shape {tuple(value.shape)}, the model expects {param.spec.shape}")
        high, low = split_master(value.detach().reshape(-1).float())
        self._write(("weights", block), param.offset, high)
        if self.residual:
            self._write(("residual", block), param.offset, low)

    def read_master(self, name: str) -> Tensor:
        """A parameter's exact fp32 value, a new CPU tensor of its shape."""
        block, param = self.place(name)
        high = self._read(("weights", block), param.offset, param.end)
        if not self.residual:
            return high.float().view(param.spec.shape)
        low = self._read(("residual", block), param.offset, param.end)
        return join_master(high, low).view(param.spec.shape)

    def observe_disk(self, observe: Observer) -> None:
        """Have `observe` opened around all that is read from and written to nvme."""
        if self._nvme is not None:
            self._nvme.observe = observe

    def close(self) -> None:
        """Give all memory back, and what is on disk. Idempotent."""
        if self.loads is not None:
            self.loads.close()
        if self.pages is not None:
            self.pages.stop()
        if self._nvme is not None:
            self._nvme.close()
        if self.pages is not None:
            self.pages.close()
        self.weights, self.residual, self.moments = [], [], {}
        for state in self._states.values():
            state.close()
