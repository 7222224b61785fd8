"""How gradients become updates: one sink for each way to clip.

The executor sends a step's gradients to one of them:

- `KeptUpdates` (exact clipping, accumulation) has all wait on the host and updates every block once the norm is known,
  ahead of the next forward.
- `StreamedUpdates` (no clipping, lagged clipping) updates a block while the backward of the blocks below is still
  running, and gives its gradient buffer back to the ring.
- `SpeculativeUpdates` does the same with gradients that are kept, and makes it good where the norm says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from horizon.optim.clipping import clip_scale
from horizon.optim.device import TieredUpdater
from horizon.optim.landings import Landings
from horizon.optim.speculation import Speculation
from horizon.optim.updater import Updater
from horizon.store.ledger import Ledger
from horizon.stream.gradients import GradientSink
from horizon.stream.streams import Event


class Applied(NamedTuple):
    """How a step's gradients were applied."""

    scale: float  # that they were multiplied by; below 1: clipped
    corrected_blocks: int = 0  # that were updated with another scale first


class Updates(GradientSink, Protocol):
    """A sink, and what becomes of the gradients that it was sent."""

    def begin(self, step: int, lr: float, last_norm: Tensor | None) -> None:
        """The gradients from now on are those of `step`; `last_norm`: of the step before, if there was one."""

    def finish(self) -> None:
        """No gradient of this step will follow; returns when all are on the host or taken."""

    def settle(self, norm: Tensor) -> Applied:
        """Bring the update of all blocks under way, `norm` being that of all gradients; returns at once.

        The ledger tells when each block is done.
        """

    def drop(self) -> int:
        """End the step without its update; returns when blocks have their old states again.

        Returns:
            the number of blocks that keep it all the same.
        """


class KeptUpdates:
    """Gradients wait on the host until `settle`; `expect` has those brought back that wait on disk."""

    def __init__(self, updater: Updater | TieredUpdater, max_norm: float | None, expect: Callable[[], None]) -> None:
        self._updater, self._max_norm, self._expect = updater, max_norm, expect
        self._last: Event | None = None
        self._step, self._lr = 0, 0.0
        self._num_updates = 0

    def begin(self, step: int, lr: float, last_norm: Tensor | None) -> None:
        self._step, self._lr, self._num_updates = step, lr, 0

    def turned(self, loss: Tensor, event: Event) -> None:
        """The loss is looked at with the norm, at the end of the step."""

    def landed(self, block: int, event: Event, norms: Tensor) -> None:
        """Blocks drain in order on one stream, so the last event covers all."""
        self._last = event

    def finish(self) -> None:
        if self._last is not None:
            self._last.synchronize()

    def settle(self, norm: Tensor) -> Applied:
        scale = clip_scale(norm, self._max_norm)
        self._num_updates = self._updater.num_blocks
        self._expect()
        self._updater.submit(self._step, self._lr, scale)
        return Applied(scale)

    def drop(self) -> int:
        return self._num_updates


class _Landed:
    """What those sinks share whose updates begin as gradients land: a thread that watches for them."""

    _landings: Landings

    def turned(self, loss: Tensor, event: Event) -> None:
        self._landings.turned(loss, event)

    def landed(self, block: int, event: Event, norms: Tensor) -> None:
        self._landings.landed(block, event, norms)

    def finish(self) -> None:
        self._landings.finish()


class StreamedUpdates(_Landed):
    """Updates each block as soon as its gradient has landed; `release` gives a buffer back that needs no update.

    The scale is made from the norm of the step before, where there is a maximum. Nothing is updated before the step's
    loss is known to be finite; a step with another loss is dropped whole.
    """

    def __init__(
        self, updater: Updater | TieredUpdater, ledger: Ledger, release: Callable[[int], None], max_norm: float | None
    ) -> None:
        self._updater, self._max_norm = updater, max_norm
        self._landings = Landings(ledger, self._update, release)
        self._step, self._lr, self._scale = 0, 0.0, 1.0
        self._num_updates = 0

    def begin(self, step: int, lr: float, last_norm: Tensor | None) -> None:
        if self._max_norm is not None:
            if last_norm is None:
                raise RuntimeError("lagged clipping needs the norm of a step before the first")
            self._scale = clip_scale(last_norm, self._max_norm)
        self._step, self._lr, self._num_updates = step, lr, 0
        self._landings.begin(step)

    def settle(self, norm: Tensor) -> Applied:
        return Applied(self._scale)

    def drop(self) -> int:
        self._landings.finish()
        return self._num_updates

    def _update(self, block: int, norms: Tensor) -> None:
        self._updater.submit_block(block, self._step, self._lr, self._scale)
        self._num_updates += 1


class SpeculativeUpdates(_Landed):
    """Updates each block as soon as its gradient has landed, as if nothing would be clipped; `settle` knows better.

    It does so only where that is likely: when the step before was not clipped, and as long as the gradients so far
    have no larger norm than is allowed. Otherwise blocks wait for the norm, as with `KeptUpdates`; blocks in HBM always
    do, for their update takes no time to speak of.
    """

    def __init__(self, updater: Updater | TieredUpdater, ledger: Ledger, max_norm: float, weight_decay: float) -> None:
        self._device = updater.device if isinstance(updater, TieredUpdater) else None
        self._speculation = Speculation(updater.host if isinstance(updater, TieredUpdater) else updater)
        self._landings = Landings(ledger, self._take, lambda block: None)
        self._max_norm, self._weight_decay = max_norm, weight_decay
        self._hopeful = False  # that the step will not be clipped
        self._square = 0.0  # of the norm of the gradients so far
        self._step, self._lr = 0, 0.0
        self._num_on_device = 0  # blocks updated there

    def begin(self, step: int, lr: float, last_norm: Tensor | None) -> None:
        self._step, self._lr, self._num_on_device = step, lr, 0
        self._speculation.begin(step, lr)
        calm = last_norm is not None and clip_scale(last_norm, self._max_norm) == 1
        self._hopeful = calm and lr * self._weight_decay <= 0.5  # else little of a weight may be left to be given back
        self._square = 0.0
        self._landings.begin(step)

    def settle(self, norm: Tensor) -> Applied:
        scale = clip_scale(norm, self._max_norm)
        corrected = self._speculation.settle(scale)
        if self._device is not None:
            self._num_on_device = len(self._device.blocks)
            self._device.submit(self._step, self._lr, scale)
        return Applied(scale, corrected)

    def drop(self) -> int:
        self._hopeful = False
        self._landings.finish()
        return self._speculation.undo() + self._num_on_device

    def _take(self, block: int, norms: Tensor) -> None:
        if not self._hopeful:
            return
        self._square += float(norms.double().square().sum())
        self._hopeful = self._square <= self._max_norm**2  # not so if it is NaN
        if not self._hopeful:
            self._speculation.stop()
        elif self._device is None or block not in self._device.blocks:
            self._speculation.speculate(block)


class DroppedGradients:
    """A sink for a pass that is made for its norm alone; `release` gives a block's buffer back."""

    def __init__(self, release: Callable[[int], None]) -> None:
        self._release = release

    def turned(self, loss: Tensor, event: Event) -> None:
        """The loss is looked at with the norm."""

    def landed(self, block: int, event: Event, norms: Tensor) -> None:
        """Nobody reads the gradient, and what is drained next comes behind it on the same stream."""
        self._release(block)
