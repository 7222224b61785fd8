"""The ledger of versions: how many optimizer steps each block's weights have seen.

The optimizer publishes, whoever loads a block waits. It is also where a run's first failure is kept: every
waiter is woken by it and raises it, so a broken thread stops the run instead of hanging it.
Invariant: versions only grow, until all are set anew, and the first recorded failure is the one everybody sees.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Condition


class Ledger:
    """One version per block, starting at 0. Every method may be called from any thread."""

    def __init__(self, num_blocks: int) -> None:
        self._versions = [0] * num_blocks
        self._failure: BaseException | None = None
        self._listeners: list[Callable[[BaseException], None]] = []
        self._changed = Condition()

    def __len__(self) -> int:
        """The number of blocks."""
        return len(self._versions)

    @property
    def failed(self) -> bool:
        """Whether a failure was recorded."""
        return self._failure is not None

    def version(self, block: int) -> int:
        """The version last published for `block`."""
        return self._versions[block]

    def publish(self, block: int, version: int) -> None:
        """Record that the weights of `block` have seen `version` steps, and wake who waits for them.

        Raises:
            RuntimeError: the version is not above the present one.
        """
        with self._changed:
            if version <= self._versions[block]:
                raise RuntimeError(
                    f"block {block} is at version {self._versions[block]} and cannot go to {version}: versions grow"
                )
            self._versions[block] = version
            self._changed.notify_all()

    def reset(self, version: int) -> None:
        """The weights of all blocks were exchanged for others, which have seen `version` steps; nobody may wait."""
        with self._changed:
            self._versions = [version] * len(self._versions)

    def wait(self, block: int, version: int) -> None:
        """Return once `block` has reached `version`; raise the recorded failure, at once, if there is one."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or self._versions[block] >= version)
            self.raise_if_failed()

    def fail(self, error: BaseException) -> None:
        """Record `error` unless one was recorded before; wake every waiter and tell every listener."""
        with self._changed:
            if self._failure is not None:
                return
            self._failure = error
            self._changed.notify_all()
            listeners = tuple(self._listeners)
        for listener in listeners:
            listener(error)

    def on_failure(self, listener: Callable[[BaseException], None]) -> None:
        """Have `listener` called with the first failure, at once if there is one: for those who wait elsewhere."""
        with self._changed:
            failure = self._failure
            if failure is None:
                self._listeners.append(listener)
        if failure is not None:
            listener(failure)

    def raise_if_failed(self) -> None:
        """Raise the recorded failure, if there is one."""
        if self._failure is not None:
            raise self._failure
