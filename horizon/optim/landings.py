"""Gradients as they land: a thread waits for the device's events, so that whoever launches work need not."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from horizon.errors import HorizonError
from horizon.store.ledger import Ledger
from horizon.stream.streams import Event

Landing: TypeAlias = tuple[int, Event, Tensor]  # block, when its gradient is on the host, its parameters' norms


class Landings:
    """A thread that waits for a step's gradients, and hands each to `take` once it is on the host.

    Where the step's loss is not finite, `drop` gets the block instead. A failure is recorded in the ledger.

    Args:
        take: called with a block and its parameters' norms, in the order of landing.
        drop: called with a block.
    """

    def __init__(self, ledger: Ledger, take: Callable[[int, Tensor], None], drop: Callable[[int], None]) -> None:
        self._ledger, self._take, self._drop = ledger, take, drop
        self._waiting: queue.SimpleQueue[Landing | None] = queue.SimpleQueue()  # None: the end
        self._thread: threading.Thread | None = None
        self._loss: tuple[Tensor, Event] | None = None

    def begin(self, step: int) -> None:
        """What lands from now on is of `step`."""
        self._waiting = queue.SimpleQueue()  # a new one: nothing that a failed step left is taken for this one's
        self._loss = None
        self._thread = threading.Thread(
            target=self._watch, args=(self._waiting, step), name="horizon-landings", daemon=True
        )
        self._thread.start()

    def turned(self, loss: Tensor, event: Event) -> None:
        """As in `GradientSink`."""
        self._loss = loss, event

    def landed(self, block: int, event: Event, norms: Tensor) -> None:
        """As in `GradientSink`."""
        self._waiting.put((block, event, norms))

    def finish(self) -> None:
        """No gradient of this step will follow; returns when all of them were taken. May be called again."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
            self._thread = None

    def _watch(self, waiting: queue.SimpleQueue[Landing | None], step: int) -> None:
        while (landing := waiting.get()) is not None:
            block, event, norms = landing
            try:
                event.synchronize()
                if self._loss_is_finite():
                    self._take(block, norms)
                else:
                    self._drop(block)
            except BaseException as error:  # whoever waits for a version or a buffer must hear of it
                failure = HorizonError(f"the gradient of block {block} at step {step} did not land: {error!r}")
                failure.__cause__ = error
                self._ledger.fail(failure)
                return

    def _loss_is_finite(self) -> bool:
        if self._loss is None:
            return False  # the forward failed
        loss, event = self._loss
        event.synchronize()
        return math.isfinite(float(loss))
