"""Slows updates down to what a simulated cxl tier would allow: they wait, and change no result.

A tier of a given bandwidth is one queue: each use takes its turn behind those before it, for its bytes' time at that
bandwidth. Work of the update itself goes on meanwhile, so only what is slower than that work shows. Copies over a
link are left alone: a link is slower than either tier, as real expanders have shown.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from horizon.config.schema import Tier
from horizon.optim.adamw import Array
from horizon.optim.states import GRADS, update_order
from horizon.plan.memory import MemoryNeeds

Pace = Callable[[int, Sequence[Array]], AbstractContextManager[None]]  # around an update of a block's arrays


def unpaced(block: int, arrays: Sequence[Array]) -> AbstractContextManager[None]:
    """Real memory's."""
    return nullcontext()


class SimulatedPace:
    """Makes updates wait for the bytes that they touch on the tier; called from any thread.

    Args:
        shares: per block and state, in the order an update takes them, what part of it is on the tier.
    """

    def __init__(self, bytes_per_s: float, shares: Callable[[int], Sequence[float]], grads: int):
        self._bytes_per_s, self._shares, self._grads = bytes_per_s, shares, grads
        self._lock = threading.Lock()
        self._free_at = 0.0  # when the tier has served what was asked of it

    @contextmanager
    def __call__(self, block: int, arrays: Sequence[Array]) -> Iterator[None]:
        num_bytes = sum(
            share * array.nbytes * (1 if i == self._grads else 2)  # gradients are only read
            for i, (array, share) in enumerate(zip(arrays, self._shares(block), strict=True))
        )
        with self._lock:
            self._free_at = max(self._free_at, time.perf_counter()) + num_bytes / self._bytes_per_s
            served_at = self._free_at
        yield
        if num_bytes:
            time.sleep(max(0.0, served_at - time.perf_counter()))


def simulated_pace(needs: MemoryNeeds) -> Pace | None:
    """The pace of updates of states placed as `needs` says; None where the tier is real, or there is none."""
    if needs.cxl.bytes_per_s is None:
        return None
    order = update_order(needs.moments, needs.master)
    names = [state.name for state in order]

    def share(name: str, block: int) -> float:
        return 1.0 if needs.tier(name, block) is Tier.cxl else needs.cxl.share

    shares = {lay.index: [share(name, lay.index) for name in names] for lay in needs.layouts}
    return SimulatedPace(needs.cxl.bytes_per_s, shares.__getitem__, order.index(GRADS))
