"""What a walk does to one block: apply pending updates to its weights, and make the perturbed copies it computes with.

    w <- the updates that the block has not seen, each rounded to the master's format
    copies: w + eps z and w - eps z, or w alone, each rounded to the dtype that blocks compute in

Invariant: what is written to `w` never depends on eps; copies are made from the clean weights, each time anew.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from horizon.errors import ConfigError
from horizon.layout import BlockLayout
from horizon.store.split import join_master, split_master
from horizon.zo.noise import GROUP, HALF, Array
from horizon.zo.settings import ZerothOrder
from horizon.zo.table import Work, decay_masks, make_table, noise_at

PIECE = 64 * GROUP  # elements that the host takes at a time: temporaries stay in cache


class Perturber(Protocol):
    """Updates and perturbs the blocks of one model."""

    def begin(self, works: Sequence[Work]) -> None:
        """What the walk that begins does to each block, in the blocks' order."""

    def __call__(
        self, block: int, states: Sequence[Tensor], copies: Sequence[Tensor], query: int, updates: bool
    ) -> None:
        """Update a block in place if `updates`, and fill its copies.

        Args:
            states: flat weights of the block, and the residual of a split master.
            copies: flat tensors as long as these: none, one (the weights), or two (plus, minus) with the noise of
                `query`.
        """


def make_perturber(layouts: Sequence[BlockLayout], settings: ZerothOrder, device: torch.device) -> Perturber:
    """What suits the device.

    Raises:
        ConfigError: a GPU without Triton.
    """
    if device.type == "cpu":
        return HostPerturber(layouts, settings)
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "optim=mezo on a GPU needs Triton, which comes with torch's builds for CUDA; or set device=cpu"
        )
    return DevicePerturber(layouts, settings, device)


class HostPerturber:
    """The numba kernel, piece by piece; torch converts to and from 16 bits."""

    def __init__(self, layouts: Sequence[BlockLayout], settings: ZerothOrder):
        from horizon.zo.host_kernel import run_piece  # compiles

        self._run = run_piece
        self._trained = [layout.num_trainable // GROUP for layout in layouts]
        self._decays = [decay_masks(layout) for layout in layouts]
        self._settings = settings
        self._table: Array = np.zeros((0, 0), np.uint32)

    def begin(self, works: Sequence[Work]) -> None:
        self._table = make_table(self._settings.seed, works)

    def __call__(
        self, block: int, states: Sequence[Tensor], copies: Sequence[Tensor], query: int, updates: bool
    ) -> None:
        for start in range(0, states[0].numel(), PIECE):
            span = slice(start, min(start + PIECE, states[0].numel()))
            self._run_piece(block, start, [s[span] for s in states], [c[span] for c in copies], query, updates)

    def _run_piece(
        self, block: int, start: int, states: Sequence[Tensor], copies: Sequence[Tensor], query: int, updates: bool
    ) -> None:
        w = join_master(*states) if len(states) == 2 else states[0].float()
        made = [c if c.dtype is torch.float32 else torch.empty_like(w) for c in copies]
        plus, minus = ([copy.numpy() for copy in made] + [_NOTHING] * 2)[:2]
        self._run(
            w.numpy(), plus, minus, self._table[block], noise_at(query), start // GROUP * HALF,
            self._trained[block] - start // GROUP, self._decays[block][start // GROUP :], self._settings.eps,
            self._settings.dropped_bits, updates,
        )  # fmt: skip
        for copy, value in zip(copies, made, strict=True):
            if copy is not value:
                copy.copy_(value)
        if updates and len(states) == 2:
            split_master(w, out=(states[0], states[1]))
        elif updates:
            states[0].copy_(w)


_NOTHING = np.empty(0, np.float32)


class DevicePerturber:
    """The Triton kernel, launched on the stream that is current; the table goes to the device once a walk."""

    def __init__(self, layouts: Sequence[BlockLayout], settings: ZerothOrder, device: torch.device):
        from horizon.zo.triton_kernel import launch  # compiles

        self._launch = launch
        self._trained = [layout.num_trainable // GROUP for layout in layouts]
        self._decays = _on_device([decay_masks(layout) for layout in layouts], device)
        self._settings, self._device = settings, device
        self._table = torch.empty(0)

    def begin(self, works: Sequence[Work]) -> None:
        table = torch.from_numpy(make_table(self._settings.seed, works).view(np.int32))
        self._table = table.pin_memory().to(self._device, non_blocking=True)

    def __call__(
        self, block: int, states: Sequence[Tensor], copies: Sequence[Tensor], query: int, updates: bool
    ) -> None:
        self._launch(
            states, copies, self._table[block], self._decays[block], self._trained[block], noise_at(query),
            self._settings.eps, self._settings.dropped_bits, updates,
        )  # fmt: skip


def _on_device(masks: Sequence[Array], device: torch.device) -> list[Tensor]:
    """One tensor for all blocks that look alike."""
    found: dict[bytes, Tensor] = {}
    for mask in masks:
        if mask.tobytes() not in found:
            found[mask.tobytes()] = torch.from_numpy(mask.view(np.int32)).to(device)
    return [found[mask.tobytes()] for mask in masks]
