"""How gradients become updates: after the global norm is known, or block by block as they land.

Both are sinks the executor sends gradients to. `KeptUpdates` (exact clipping, accumulation) remembers when the last
gradient has landed and updates all blocks once the norm is known, ahead of the next forward. `StreamedUpdates`
(no clipping) updates a block while the backward of the blocks below is still running, and gives its gradient
buffer back to the ring.
"""

from __future__ import annotations

import math
import queue
import threading
from typing import TypeAlias

from torch import Tensor

from horizon.errors import HorizonError
from horizon.optim.device import TieredUpdater
from horizon.optim.updater import Updater
from horizon.store.gradients import GradientBuffers
from horizon.store.ledger import Ledger
from horizon.stream.streams import Event

Landings: TypeAlias = "queue.SimpleQueue[tuple[int, Event] | None]"  # None: the end


class KeptUpdates:
    """Gradients wait on the host until `apply`."""

    def __init__(self, updater: Updater | TieredUpdater):
        self._updater = updater
        self._last: Event | None = None

    def turned(self, loss: Tensor, event: Event) -> None:
        """The loss is looked at with the norm, at the end of the step."""

    def landed(self, block: int, event: Event) -> None:
        """Blocks drain in order on one stream, so the last event covers all."""
        self._last = event

    def wait(self) -> None:
        """Return when all gradients are on the host."""
        if self._last is not None:
            self._last.synchronize()

    def apply(self, step: int, lr: float, grad_scale: float) -> None:
        """Start the update of all blocks and return at once; the ledger tells when each is done."""
        self._updater.submit(step, lr, grad_scale)


class StreamedUpdates:
    """Updates each block as soon as its gradient has landed, on a thread that waits for the events.

    Nothing is updated before the step's loss is known to be finite; a step with another loss is dropped whole.
    """

    def __init__(self, updater: Updater | TieredUpdater, buffers: GradientBuffers, ledger: Ledger) -> None:
        self._updater, self._buffers, self._ledger = updater, buffers, ledger
        self._landings: Landings = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._loss: tuple[Tensor, Event] | None = None
        self.num_updates = 0  # of the step begun last; final after `finish`

    def begin(self, step: int, lr: float) -> None:
        """Take the gradients that land from now on as those of `step`."""
        self._landings = queue.SimpleQueue()  # a new one: nothing that a failed step left is taken for this one's
        self._loss, self.num_updates = None, 0
        thread = threading.Thread(
            target=self._watch, args=(self._landings, step, lr), name="horizon-landings", daemon=True
        )
        thread.start()
        self._thread = thread

    def turned(self, loss: Tensor, event: Event) -> None:
        """`loss` (a host scalar) is valid after `event`; called before any gradient lands."""
        self._loss = loss, event

    def landed(self, block: int, event: Event) -> None:
        """Hand the block to the watching thread."""
        self._landings.put((block, event))

    def finish(self) -> None:
        """No gradient of this step will follow; returns when all of them were taken. May be called again."""
        if self._thread is not None:
            self._landings.put(None)
            self._thread.join()
            self._thread = None

    def _watch(self, landings: Landings, step: int, lr: float) -> None:
        while (landing := landings.get()) is not None:
            block, event = landing
            try:
                self._take(block, event, step, lr)
            except BaseException as error:  # whoever waits for a version or a buffer must hear of it
                failure = HorizonError(f"the gradient of block {block} at step {step} did not land: {error!r}")
                failure.__cause__ = error
                self._ledger.fail(failure)
                return

    def _take(self, block: int, event: Event, step: int, lr: float) -> None:
        event.synchronize()
        if self._loss_is_finite():
            self._updater.submit_block(block, step, lr)
            self.num_updates += 1
        else:
            self._buffers.release(block)

    def _loss_is_finite(self) -> bool:
        if self._loss is None:
            return False  # the forward failed
        loss, event = self._loss
        event.synchronize()
        return math.isfinite(float(loss))
