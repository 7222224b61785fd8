"""What a run tells those who listen: plain records, as things happen.

class Stopwatch(horizon.Callback):
    def on_step(self, row):
        print(row.step, row.seconds)

horizon.Trainer(config, "out", callbacks=[Stopwatch()]).run()
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from horizon.errors import CallbackError, ConfigError
from horizon.records import CheckpointRow, EvalRow, RunSummary, StepRow

log = logging.getLogger(__name__)

Record = StepRow | EvalRow | CheckpointRow | RunSummary
EVENTS = {StepRow: "on_step", EvalRow: "on_eval", CheckpointRow: "on_checkpoint", RunSummary: "on_end"}


class Callback:
    """Listens to a run: inherit, and define what is of interest.

    Called on the thread that drives the device, between steps, so what takes long here makes the run take longer. An
    exception ends the run with a CallbackError that names the callback.
    """

    @property
    def name(self) -> str:
        """What errors call it."""
        return type(self).__name__

    def on_step(self, row: StepRow) -> None:
        """A step is done, and its row in metrics.jsonl."""

    def on_eval(self, row: EvalRow) -> None:
        """Held-out rows were scored."""

    def on_checkpoint(self, row: CheckpointRow) -> None:
        """A checkpoint is on disk; by then, steps after its own may be done."""

    def on_end(self, summary: RunSummary) -> None:
        """The run is over, its model and summary written."""

    def on_failure(self, error: BaseException) -> None:
        """The run ends with `error`: a KeyboardInterrupt where it was asked to stop. What fails here is only logged."""


class Callbacks:
    """Those who listen to one run, told in their order."""

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        """Raise a ConfigError where one is no Callback, or has a method for an event that does not exist."""
        self._callbacks = tuple(callbacks)
        events = {name for name in vars(Callback) if name.startswith("on_")}
        for callback in self._callbacks:
            if not isinstance(callback, Callback):
                raise ConfigError(f"callbacks: {callback!r} is no horizon.Callback")
            if unknown := {name for name in dir(callback) if name.startswith("on_")} - events:
                listed = ", ".join(sorted(events))
                raise ConfigError(f"callbacks: {callback.name}.{min(unknown)} is no event; expected {listed}")

    def tell(self, record: Record) -> None:
        """Pass a record on.

        Raises:
            CallbackError: a callback failed.
        """
        for callback in self._callbacks:
            event = EVENTS[type(record)]
            try:
                getattr(callback, event)(record)
            except Exception as error:
                raise CallbackError(f"callback {callback.name}.{event}: {type(error).__name__}: {error}") from error

    def tell_failure(self, error: BaseException) -> None:
        """Pass on what ended the run, to all of them."""
        for callback in self._callbacks:
            try:
                callback.on_failure(error)
            except Exception:  # the run's own error is the one to hear of
                log.exception("callback %s.on_failure failed, too", callback.name)
