"""Steps: the executor's passes, and what becomes of their gradients.

Invariant: a step that is not applied leaves every block at its version, or, where blocks were updated for good inside
the backward, an engine that refuses to go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from horizon.config.schema import Clip
from horizon.errors import HorizonError
from horizon.optim.apply import Applied, DroppedGradients, KeptUpdates, SpeculativeUpdates, StreamedUpdates, Updates
from horizon.optim.clipping import Clipping, global_norm
from horizon.optim.device import TieredUpdater
from horizon.optim.updater import Updater
from horizon.records import StepResult
from horizon.store.gradients import GradientBuffers
from horizon.store.ledger import Ledger
from horizon.stream.activations import StepSpace
from horizon.stream.batch import MicroBatch
from horizon.stream.executor import Executor
from horizon.stream.head import LossFn
from horizon.stream.streams import Streams
from horizon.stream.timeline import Cause

MakeSpace = Callable[[], StepSpace]


@dataclass(slots=True)
class StepOutcome:
    """What a step's backward gave, and what became of it."""

    loss: float
    norm: Tensor  # of all gradients before clipping, fp32 scalar on the CPU
    applied: Applied | None = None  # None: loss or norm is not finite

    @property
    def is_finite(self) -> bool:
        """Whether the step may be applied."""
        return math.isfinite(self.loss) and math.isfinite(float(self.norm))

    def result(self, num_tokens: int, seconds: float) -> StepResult:
        """What the caller of a step is told."""
        if self.applied is None:
            return StepResult(self.loss, float(self.norm), num_tokens, seconds, skipped=True)
        return StepResult(self.loss, float(self.norm), num_tokens, seconds, False, *self.applied)


@dataclass(slots=True)
class WaitingGradients:
    """What `Engine.forward_backward` has left for `Engine.optimizer_step`."""

    num_tokens: int = 0
    loss: float = 0.0  # mean over them
    batches: list[MicroBatch] = field(default_factory=list)  # of the last pass, or of the first with a bad loss

    def share_beside(self, num_tokens: int) -> float:
        """The weight of what waits beside a pass of so many trained tokens."""
        return self.num_tokens / (self.num_tokens + num_tokens)

    def joined(self, num_tokens: int, loss: float, batches: list[MicroBatch]) -> WaitingGradients:
        """This, and one pass more."""
        share = self.share_beside(num_tokens)
        mean = self.loss * share + loss * (1 - share)
        return WaitingGradients(
            self.num_tokens + num_tokens, mean, batches if math.isfinite(self.loss) else self.batches
        )


class Steps:
    """Runs one optimizer step after another.

    Args:
        executor: gives the executor, which is not held here: it goes before the steps do.
        norms: the L2 norm of every trainable parameter's gradient, fp32 [parameters] on CPU, in the model's order.
        buffers: gives what gradients wait in, which may be exchanged.
        kept: whether all gradients of a step wait on the host.
        weight_decay: AdamW's.

    Attributes:
        version: steps that the weights have seen, those still under way included.
    """

    def __init__(
        self, executor: Callable[[], Executor], updater: Updater | TieredUpdater, streams: Streams, ledger: Ledger,
        clipping: Clipping, *, norms: Callable[[], Tensor], buffers: Callable[[], GradientBuffers], kept: bool,
        weight_decay: float,
    ) -> None:  # fmt: skip
        self._executor, self._streams, self._ledger, self._clipping = executor, streams, ledger, clipping
        self._norms, self._buffers, self._weight_decay = norms, buffers, weight_decay
        self.version = 0
        self._last_norm: Tensor | None = None  # of the step applied last
        self.use_updater(updater, kept)

    def use_updater(self, updater: Updater | TieredUpdater, kept: bool) -> None:
        """Update with this one from now on; `kept`: whether all gradients of a step wait on the host."""
        max_norm, mode = self._clipping.max_norm, self._clipping.mode
        self._kept = KeptUpdates(updater, max_norm, lambda: self._buffers().expect_updates())
        self._updates: Updates = self._kept
        if mode is Clip.speculative and max_norm is not None:
            self._updates = SpeculativeUpdates(updater, self._ledger, max_norm, self._weight_decay)
        elif mode is Clip.lagged or not kept:  # without clipping, kept gradients have nothing to begin early for
            self._updates = StreamedUpdates(updater, self._ledger, self._release, max_norm)

    @property
    def as_landed(self) -> bool:
        """Whether the host updates a block as soon as its gradient has landed, as far as clipping allows."""
        return not isinstance(self._updates, KeptUpdates)

    @property
    def last_norm(self) -> float | None:
        """Of the gradients of the step applied last, before clipping; None before the first."""
        return None if self._last_norm is None else float(self._last_norm)

    def _release(self, block: int) -> None:
        """Give a block's gradient buffer back."""
        self._buffers().release(block)

    def go_on_from(self, version: int, last_norm: float | None) -> None:
        """The weights are others now, and have seen `version` steps, the last with gradients of `last_norm`."""
        self.version = version
        self._last_norm = None if last_norm is None else torch.tensor(last_norm)

    def run(
        self, batches: Sequence[MicroBatch], space: MakeSpace, lr: float, seed: int, loss_fn: LossFn | None
    ) -> StepOutcome:
        """A whole step: forward, backward, and the update, which may run on behind."""
        last_norm = self._last_norm
        if self._clipping.mode is Clip.lagged and last_norm is None:
            measured = self._measure(batches, space(), seed, loss_fn)
            if not measured.is_finite:
                return measured
            last_norm = measured.norm
        placed = space()  # may have states moved, which gives the steps another updater
        self._updates.begin(self.version + 1, lr, last_norm)
        try:
            loss = self._train(batches, placed, self._updates, seed, loss_fn)
            with self._streams.waiting(Cause.link, "last gradient"):
                self._updates.finish()
            self._ledger.raise_if_failed()
            return self._settle(self._updates, float(loss))
        except BaseException as error:
            self._abandon(error)
            raise

    def accumulate(
        self, batches: Sequence[MicroBatch], space: StepSpace, seed: int, old_share: float, loss_fn: LossFn | None
    ) -> Tensor:
        """Forward and backward that leaves old_share * (waiting gradients) + (1 - old_share) * (this batch's)."""
        loss = self._train(batches, space, self._kept, seed, loss_fn, old_share)
        with self._streams.waiting(Cause.link, "last gradient"):
            self._kept.finish()
        return loss

    def apply(self, lr: float, loss: float) -> StepOutcome:
        """Apply what `accumulate` has left, clipped exactly; `loss` is that of its passes."""
        self._kept.begin(self.version + 1, lr, self._last_norm)
        return self._settle(self._kept, loss)

    def _train(
        self, batches: Sequence[MicroBatch], space: StepSpace, sink: Updates | DroppedGradients, seed: int,
        loss_fn: LossFn | None, old_share: float = 0.0,
    ) -> Tensor:  # fmt: skip
        return self._executor().train(
            batches, self.version, space.boundaries, sink, seed=seed, recompute=space.recompute, old_share=old_share,
            loss_fn=loss_fn,
        )  # fmt: skip

    def _measure(
        self, batches: Sequence[MicroBatch], space: StepSpace, seed: int, loss_fn: LossFn | None
    ) -> StepOutcome:
        """A pass for its norm alone: the first lagged step has none before it."""
        loss = self._train(batches, space, DroppedGradients(self._release), seed, loss_fn)
        return StepOutcome(float(loss), global_norm(self._norms()))

    def _settle(self, updates: Updates, loss: float) -> StepOutcome:
        """Update with the step's gradients if they are finite; else leave the weights as they were, where possible."""
        outcome = StepOutcome(loss, global_norm(self._norms()))
        if outcome.is_finite:
            outcome.applied = updates.settle(outcome.norm)
            self._last_norm = outcome.norm
            self.version += 1
        elif updates.drop():
            self.version += 1
        else:
            self._executor().reset()  # a slot may hold weights that were given back with other last bits
        return outcome

    def _abandon(self, error: BaseException) -> None:
        """A step has failed: nothing of it may be left, or the weights are lost."""
        step, lost = self.version + 1, "load the last saved model"
        try:
            num_updates = self._updates.drop()
        except BaseException as second:
            self._ledger.fail(HorizonError(f"step {step} failed ({error!r}), was not undone ({second!r}): {lost}"))
            return
        if num_updates:
            updated = f"{num_updates} of {len(self._ledger)} blocks had been updated"
            remedy = "with optim.max_grad_norm set and optim.clip=exact such a step can be repeated"
            self._ledger.fail(HorizonError(f"step {step} failed when {updated} ({error!r}): {lost}; {remedy}"))
