"""The host store: every parameter and optimizer state of the model, flat per block, in DRAM or on nvme.

`horizon.plan.states` lists the kinds. `weights` (bf16, the high half of the fp32 master) is what streams to the device;
`residual` is the low half, if there is one; moments exist for trainable parameters only. Nothing is held twice: a
parameter is read or written through the layout, by its Hugging Face name. Blocks that the placement names have all
their states in device memory (`hbm`) instead, and none on the host. States on nvme reach their update through `pages`,
the device through `loads`, and everybody else through `read_state` and `write_state`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence, Set

import torch
from torch import Tensor

from horizon.config.schema import MasterFormat, Moments, NvmeEngine, Tier
from horizon.errors import CheckpointError
from horizon.layout import BlockLayout, Param
from horizon.plan.cost import DiskRates
from horizon.plan.disk import (
    LOAD_BUFFERS,
    UPDATE_PAGES,
    DiskMap,
    Place,
    Placement,
    load_buffer_bytes,
    map_disk,
    on_tier,
    staged_places,
)
from horizon.plan.states import MASTERS, MOMENTS, State, states_of
from horizon.store.ledger import Ledger
from horizon.store.loads import StagedLoads
from horizon.store.nvme import Move, NvmeTier, Observer, as_bytes, open_nvme
from horizon.store.pages import UpdatePages
from horizon.store.speed import measure_disk
from horizon.store.split import join_master, split_master
from horizon.store.tiers import NOWHERE, Nodes, TieredState, anywhere
from horizon.units import format_bytes

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
WRITE_PIECE = 1 << 24  # elements of a parameter that are split into halves at a time: 64 MiB in fp32


class HostStore:
    """States of all blocks; index with the block number.

    Args:
        pin: register with CUDA what crosses the link.
        pin_residual: residuals cross it, too: blocks compute in fp32.
        placed: states of blocks on the host that are not in DRAM; it may name other things, which are not here.
        nvme_dir: the folder for those on nvme.

    Attributes:
        weights: bf16 [num_elements] per block; empty where they are on nvme, as with all states.
        residual: int16 [num_elements] per block; an empty list where the weights alone are the masters.
        moments: by name, in the order of `horizon.plan.states`, the flat tensors of all blocks.
        in_hbm: blocks whose states are on the device.
        on_nvme: (state, block) of what is there.
        ledger: how many optimizer steps the weights of each block have seen.
        pages: of states on nvme, for their update; None where none are.
        loads: of what the device cannot copy by itself; None where there is nothing of the kind.
        pageable: states that cross the link and that CUDA refused to register.
    """

    def __init__(
        self,
        layouts: Sequence[BlockLayout],
        pin: bool,
        pin_residual: bool,
        device: torch.device = CPU,
        in_hbm: Set[int] = NOWHERE,
        moments: Moments = Moments.float32,
        master: MasterFormat = MasterFormat.split,
        placed: Placement | None = None,
        nvme_dir: str | None = None,
        nvme_engine: NvmeEngine = NvmeEngine.auto,
        nodes: Nodes = anywhere,
    ):
        self._nodes = nodes
        self.layouts = tuple(layouts)
        self.in_hbm = frozenset(in_hbm)
        self._device = device
        self.ledger = Ledger(len(self.layouts))
        self._states: dict[str, TieredState] = {}
        self._nvme: NvmeTier | None = None
        self.pages: UpdatePages | None = None
        self.loads: StagedLoads | None = None
        self.pageable: frozenset[str] = frozenset()
        weights, *rest = MASTERS[master]
        self._kinds = {state.name: state for state in states_of(master, moments)}
        self.on_nvme = frozenset(place for place in on_tier(placed or {}, Tier.nvme) if place[0] in self._kinds)
        loaded = [weights, *rest] if pin_residual else [weights]
        try:
            if self.on_nvme:
                self._nvme = open_nvme(nvme_dir or "", nvme_engine, self._map())
                self.pages = UpdatePages(
                    self._nvme,
                    [*self._kinds.values()],
                    loaded,
                    self.layouts,
                    self.on_nvme,
                    self.ledger,
                    UPDATE_PAGES,
                )
            # Only weights (and, computing in fp32, residuals) cross the link; the moments are the CPU's alone.
            self.weights = self._allocate(weights, pin)
            self.residual = self._allocate(rest[0], pin and pin_residual) if rest else []
            self.moments = {state.name: self._allocate(state, False) for state in MOMENTS[moments]}
            self._stage_loads(loaded, pin)
        except BaseException:
            self.close()
            raise
        self._places = {p.name: (lay.index, p) for lay in self.layouts for p in lay.params}

    def _map(self) -> DiskMap:
        return map_disk([*self._kinds.values()], self.layouts, self.on_nvme)

    def _allocate(self, state: State, pin: bool) -> list[Tensor]:
        numels = [state.numel(lay) for lay in self.layouts]
        on_nvme = {block for block in range(len(numels)) if (state.name, block) in self.on_nvme}
        self._states[state.name] = TieredState(
            numels, state.dtype, state.name, pin, self._device, self.in_hbm, on_nvme, self._nodes
        )
        return self._states[state.name].blocks

    def _stage_loads(self, loaded: Sequence[State], pin: bool) -> None:
        """Have what the device cannot copy by itself brought to pinned buffers ahead of it."""
        self.pageable = frozenset(state.name for state in loaded if pin and not self._states[state.name].pinned)
        places = staged_places(self.on_nvme, self.pageable, self.layouts, self.in_hbm)
        if load_buffer_bytes(loaded, self.layouts, places):
            self.loads = StagedLoads(self._read_moves, loaded, self.layouts, places, self.ledger, pin, LOAD_BUFFERS)
        if self.pageable:
            staged = LOAD_BUFFERS * load_buffer_bytes(loaded, self.layouts, places)
            logger.warning("blocks pass through %s of pinned staging on their way to the device", format_bytes(staged))

    def _read_moves(self, moves: Sequence[Move]) -> None:
        """Fill memory from where the states are."""
        on_disk = [move for move in moves if move.place in self.on_nvme]
        for move in moves:
            if move.place not in self.on_nvme:
                name, block = move.place
                source = as_bytes(self._states[name].blocks[block])
                move.data.copy_(source[move.offset : move.offset + move.data.numel()])
        if self._nvme is not None:
            self._nvme.run(on_disk)

    def states(self, block: int) -> dict[str, Tensor]:
        """All flat tensors of a block, by name, where they are; those on nvme are empty here."""
        moments = {name: blocks[block] for name, blocks in self.moments.items()}
        residual = {"residual": self.residual[block]} if self.residual else {}
        return {"weights": self.weights[block], **residual, **moments}

    def read_state(self, name: str, block: int) -> Tensor:
        """A copy in host memory of a state of a block, wherever it is; no update of it may be under way."""
        if (name, block) not in self.on_nvme:
            return self._states[name].blocks[block].to("cpu", copy=True)
        copy = torch.empty(self._kinds[name].numel(self.layouts[block]), dtype=self._kinds[name].dtype)
        self._settled_nvme().read_range((name, block), 0, as_bytes(copy))
        return copy

    def write_state(self, name: str, block: int, value: Tensor) -> None:
        """Set a state of a block, wherever it is; nobody may be reading or updating it."""
        self.write_numbers(block, name, 0, value.to(self._kinds[name].dtype))

    def clear_state(self, name: str, block: int) -> None:
        """Set all numbers of a state of a block to zero; nobody may be reading or updating it."""
        kind, numel = self._kinds[name], self._kinds[name].numel(self.layouts[block])
        zeros = torch.zeros(min(numel, WRITE_PIECE), dtype=kind.dtype)
        for start in range(0, numel, WRITE_PIECE):
            self.write_numbers(block, name, start, zeros[: numel - start])

    def _settled_nvme(self) -> NvmeTier:
        """The tier, nothing on its way to it."""
        assert self._nvme is not None and self.pages is not None
        self.pages.wait_written()
        return self._nvme

    def write_numbers(self, block: int, name: str, start: int, value: Tensor) -> None:
        """Set numbers of a state of a block, wherever it is, from number `start` on; as `write_state`."""
        if (name, block) in self.on_nvme:
            bits = as_bytes(value.cpu().contiguous())
            self._settled_nvme().write_range((name, block), start * value.itemsize, bits)
        else:
            self._states[name].blocks[block][start : start + value.numel()].copy_(value)

    def _read(self, place: Place, start: int, stop: int) -> Tensor:
        """Numbers `start` to `stop` of a state, on the CPU."""
        name, block = place
        if place not in self.on_nvme:
            return self._states[name].blocks[block][start:stop].cpu()
        numbers = torch.empty(stop - start, dtype=self._kinds[name].dtype)
        self._settled_nvme()
        self.read_nvme(block, name, start, numbers)
        return numbers

    def read_nvme(self, block: int, name: str, start: int, out: Tensor) -> None:
        """Fill `out`, flat on the CPU, with numbers of a state on nvme from number `start` on, as the disk has them.

        May be called from any thread, while other blocks are updated.
        """
        assert self._nvme is not None
        self._nvme.read_range((name, block), start * out.itemsize, as_bytes(out))

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
        self.write_elements(block, param.offset, value)

    def write_elements(self, block: int, start: int, value: Tensor) -> None:
        """Set masters of a block from element `start` on; as `write_master`."""
        for piece in torch.split(value.detach().reshape(-1), WRITE_PIECE):  # a device may have little room beside it
            high, low = split_master(piece.float())
            self.write_numbers(block, "weights", start, high)
            if self.residual:
                self.write_numbers(block, "residual", start, low)
            start += piece.numel()

    def read_master(self, name: str) -> Tensor:
        """A parameter's exact fp32 value, a new CPU tensor of its shape."""
        block, param = self.place(name)
        high = self._read(("weights", block), param.offset, param.end)
        if not self.residual:
            return high.float().view(param.spec.shape)
        low = self._read(("residual", block), param.offset, param.end)
        return join_master(high, low).view(param.spec.shape)

    def measure_disk(self) -> DiskRates | None:
        """How fast states on nvme can be moved, before there is anything in them; None where there are none."""
        return None if self._nvme is None else measure_disk(self._nvme, self._map())

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
