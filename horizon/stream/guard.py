"""Device work that may fail: whatever happens, nothing of it is left in flight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from horizon.errors import BudgetError
from horizon.plan.memory import Limits
from horizon.stream.streams import Streams
from horizon.units import format_bytes

T = TypeVar("T")


class Resettable(Protocol):
    """An executor, as far as it is known here."""

    def reset(self) -> None:
        """Wait for what is in flight, then forget it."""


def guard(streams: Streams, executor: Resettable, limits: Limits, work: Callable[[], T]) -> T:
    """Run device work; whatever fails, wait for what is in flight and forget it.

    Raises:
        BudgetError: the device ran out of memory.
    """
    try:
        with streams.entered():
            return work()
    except torch.cuda.OutOfMemoryError as error:
        executor.reset()
        raise BudgetError(
            f"the device ran out of memory ({str(error).splitlines()[0]}); use a smaller train.micro_batch, or fewer "
            f"prompts at once, or raise memory.device_budget ({format_bytes(limits.device)})"
        ) from error
    except BaseException:
        executor.reset()
        raise
