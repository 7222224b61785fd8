"""AdamW on blocks whose states are in device memory: the arithmetic of `horizon.optim.adamw`, run by the device itself.

On a GPU it is one Triton kernel a block. On CPU, where the hbm tier is ordinary memory, it is the host's own update.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence, Set
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from horizon.errors import HorizonError
from horizon.layout import PARAM_ALIGN, BlockLayout
from horizon.optim.adamw import AdamW, StepScalars, step_scalars
from horizon.optim.chunks import cut_chunks
from horizon.optim.pace import Pace
from horizon.optim.states import UpdateStates
from horizon.optim.updater import Updater, chunk_elements, load_update
from horizon.store.ledger import Ledger
from horizon.store.pages import UpdatePages
from horizon.stream.streams import Streams
from horizon.stream.timeline import HBM_UPDATE, Cause
from horizon.units import align_up

CHUNK_ELEMENTS = 1 << 16  # that one program updates: many programs to a block, few rows to a table


class StateTensors(NamedTuple):
    """The flat tensors of one block, wherever they are, its moments in fp32; see `horizon.store.host`."""

    weights: Tensor
    residual: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    grads: Tensor


class DeviceUpdate(Protocol):
    """Applies one step's AdamW to the trainable parameters of a block, in place."""

    def __call__(self, block: int, states: StateTensors, decayed: StepScalars, undecayed: StepScalars) -> None:
        """`decayed`, `undecayed`: the scalars for parameters that decay and for those that do not."""


def can_update(device: torch.device) -> bool:
    """Whether blocks in the memory of `device` can be updated there."""
    return device.type == "cpu" or importlib.util.find_spec("triton") is not None


def load_device_update(device: torch.device, layouts: Sequence[BlockLayout]) -> DeviceUpdate:
    """The update for the blocks of `layouts` in the memory of `device`."""
    if device.type == "cpu":
        return _HostArithmetic(layouts)
    from horizon.optim.triton_kernel import TritonUpdate

    return TritonUpdate({lay.index: chunk_table(lay).to(device) for lay in layouts})


def chunk_table(layout: BlockLayout, chunk_elements: int = CHUNK_ELEMENTS) -> Tensor:
    """The block's chunks as int64 [chunks, 3] on the CPU: start, stop, whether it decays.

    A stop is rounded up to where the next parameter may begin, so that every load is a whole vector. The padding there
    is zero in every state and gradient, and an update leaves zeros as they are.
    """
    rows = [(c.start, align_up(c.stop, PARAM_ALIGN), int(c.decay)) for c in cut_chunks(layout, chunk_elements)]
    return torch.tensor(rows, dtype=torch.int64).view(-1, 3)


class _HostArithmetic:
    def __init__(self, layouts: Sequence[BlockLayout]):
        self._chunks = {lay.index: tuple(cut_chunks(lay, max(lay.num_trainable, PARAM_ALIGN))) for lay in layouts}
        self._update = load_update()

    def __call__(self, block: int, states: StateTensors, decayed: StepScalars, undecayed: StepScalars) -> None:
        arrays = UpdateStates.of_tensors(**states._asdict()).arrays()
        for chunk in self._chunks[block]:
            weights, residual, exp_avg, exp_avg_sq, grads = (array[chunk.start : chunk.stop] for array in arrays)
            self._update(weights, residual, exp_avg, exp_avg_sq, grads, decayed if chunk.decay else undecayed)


class DeviceUpdater:
    """Updates the blocks of `layouts` where they are, and publishes their versions; see `Updater` for the host's.

    Args:
        states: gives a block's tensors; the updater owns them from `submit` until it calls `release(block)`.
    """

    def __init__(
        self,
        layouts: Sequence[BlockLayout],
        states: Callable[[int], StateTensors],
        ledger: Ledger,
        adamw: AdamW,
        streams: Streams,
        release: Callable[[int], None],
    ) -> None:
        self.blocks = {lay.index: lay for lay in layouts if lay.num_trainable}
        self._frozen = [lay.index for lay in layouts if not lay.num_trainable]
        self._states, self._ledger, self._adamw, self._release = states, ledger, adamw, release
        self._streams = streams
        self._update = load_device_update(streams.device, [*self.blocks.values()])

    def submit(self, step: int, lr: float, grad_scale: float) -> None:
        """Launch the update of all blocks for `step`, in order, and publish their versions at once.

        The kernels go to the compute stream: what computes with the weights later comes behind them there.

        Raises:
            NonFiniteError: `lr` or `grad_scale` is not finite; nothing is launched.
            HorizonError: an update failed; the ledger keeps that, too.
        """
        scalars = self._scalars(step, lr, grad_scale)
        with self._streams.running(self._streams.compute):
            for block in self.blocks:
                with self._streams.waiting(Cause.optimizer, HBM_UPDATE, block):
                    self._launch(block, step, scalars)
        for block in (*self._frozen, *self.blocks):
            self._finish(block, step)

    def submit_block(self, block: int, step: int, lr: float, grad_scale: float = 1.0) -> None:
        """Update one block, whose gradient is complete, beside what compute is at; return when that is done."""
        update, timeline = self._streams.update, self._streams.timeline
        with self._streams.running(update), timeline.beside(HBM_UPDATE, update, "update", block):
            self._launch(block, step, self._scalars(step, lr, grad_scale))
        update.record_event().synchronize()  # the buffer and the weights are given to others now
        for done in (*self._frozen, block):
            self._finish(done, step)

    def _scalars(self, step: int, lr: float, grad_scale: float) -> tuple[StepScalars, StepScalars]:
        self._ledger.raise_if_failed()
        return (
            step_scalars(self._adamw, lr, step, grad_scale, decay=True),
            step_scalars(self._adamw, lr, step, grad_scale, decay=False),
        )

    def _launch(self, block: int, step: int, scalars: tuple[StepScalars, StepScalars]) -> None:
        try:
            self._update(block, self._states(block), *scalars)
        except BaseException as error:
            name = self.blocks[block].name
            failure = HorizonError(f"the update of block {block} ({name}) at step {step} failed: {error!r}")
            self._ledger.fail(failure)
            raise failure from error

    def _finish(self, block: int, step: int) -> None:
        if block in self.blocks:
            self._release(block)
        elif self._ledger.version(block) >= step:
            return  # the first block of a step publishes those with nothing to train
        self._ledger.publish(block, step)


class TieredUpdater:
    """Hands the update of each block to whoever reaches its states: threads of the host, or the device."""

    def __init__(self, host: Updater, device: DeviceUpdater):
        self.host, self.device = host, device

    @property
    def num_blocks(self) -> int:
        """Blocks that have something to train."""
        return self.host.num_blocks + len(self.device.blocks)

    @property
    def parameters_per_s(self) -> float | None:
        """The host's pace, as `Updater.parameters_per_s`."""
        return self.host.parameters_per_s

    def submit(self, step: int, lr: float, grad_scale: float) -> None:
        """Begin the update of all blocks, as `Updater.submit`."""
        self.host.submit(step, lr, grad_scale)
        self.device.submit(step, lr, grad_scale)

    def submit_block(self, block: int, step: int, lr: float, grad_scale: float = 1.0) -> None:
        """Begin the update of one block whose gradient is complete, as `Updater.submit_block`."""
        updater = self.device if block in self.device.blocks else self.host
        updater.submit_block(block, step, lr, grad_scale)

    def close(self) -> None:
        """Stop the host's threads; may be called again."""
        self.host.close()


def make_updater(
    layouts: Sequence[BlockLayout],
    in_hbm: Set[int],
    states: Callable[[int], Mapping[str, Tensor]],
    ledger: Ledger,
    adamw: AdamW,
    num_threads: int,
    streams: Streams,
    release: Callable[[int], None],
    seed: int = 0,
    pages: UpdatePages | None = None,
    pace: Pace | None = None,
) -> Updater | TieredUpdater:
    """Who updates the blocks of a model of which `in_hbm` have their states on the device, with moments in fp32.

    Args:
        states: gives a block's tensors by name, its gradient as `grads`.
        seed, pages, pace: as `Updater` takes them.
    """

    def arrays(block: int) -> UpdateStates:
        return UpdateStates.of_tensors(**states(block))

    def tensors(block: int) -> StateTensors:
        return StateTensors(**states(block))

    # Blocks with nothing to train are known to both: whoever has a step's first block publishes them.
    on_host = [lay for lay in layouts if lay.index not in in_hbm or not lay.num_trainable]
    host = Updater(
        on_host, arrays, ledger, adamw, num_threads, release, chunk_elements(layouts, num_threads),
        seed=seed, timeline=streams.timeline, pages=pages, pace=pace,
    )  # fmt: skip
    if not in_hbm:
        return host
    on_device = [lay for lay in layouts if lay.index in in_hbm or not lay.num_trainable]
    return TieredUpdater(host, DeviceUpdater(on_device, tensors, ledger, adamw, streams, release))
