"""Which of several arrangements of a step is best: they differ in which blocks live in HBM, and are at the turn.

What the device has left beside them goes to what layers keep for their backward (`horizon.plan.activations`), so that
each block in HBM is paid for with recomputation, and each saves link and host memory. Pure arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from horizon.layout import BlockLayout
from horizon.plan.activations import ActivationPlan
from horizon.plan.memory import MemoryNeeds
from horizon.plan.placement import preference

SAMPLES = 12  # of placements, and of numbers of layers at the turn, that are looked at first, about
A_SLOT = 0.02  # of a step: what another slot must save; it is as large as the largest block
AS_FAST = 0.002  # of a step: what is slower by less is as fast as the fastest, and may have less on the host instead


class Arrangement(NamedTuple):
    """One way to hold a step's states and activations."""

    needs: MemoryNeeds
    activations: ActivationPlan
    host_bytes: int
    least_s: float  # what such a step takes at least; is known sooner than
    seconds: Callable[[], float]  # what it takes


def placements(layouts: Sequence[BlockLayout]) -> list[frozenset[int]]:
    """The sets of blocks in HBM that are worth a look: the first in the order of preference, with a head last or early.

    A head of its own is the largest block beside the embedding: with it go slots of its size.
    """
    order, head = preference(layouts), len(layouts) - 1
    early = [order[0], head, *(block for block in order[1:] if block != head)]
    return list(dict.fromkeys(frozenset(blocks[:num]) for blocks in (order, early) for num in range(len(layouts) + 1)))


def sample(num: int, near: int | None = None) -> range:
    """Some of `num` options that lie in order: spread over all, from the first on, or those between two, `near` one."""
    step = max(1, num // SAMPLES)
    return range(0, num, step) if near is None else range(max(0, near - step + 1), min(num, near + step))


def search(
    placed: Sequence[frozenset[int]], turn: Sequence[int], arrange: Callable[[frozenset[int], int], Arrangement | None]
) -> Arrangement | None:
    """The best pair of blocks in HBM and layers at the turn, of which the first number is the least.

    With that number, of all placements. With more, of a sample of pairs, then of all near the best of these; and of
    those only which need no more of the host, for a turn takes room on the device that boundaries would have.
    """

    def found(rows: Iterable[int], columns: Sequence[int]) -> Iterator[Arrangement]:
        for i in rows:
            for j in columns:
                option = arrange(placed[i], turn[j])
                if option is None:
                    break  # more layers need more room
                yield option

    def no_larger(options: Iterable[Arrangement]) -> Iterator[Arrangement]:
        return (option for option in options if plain is None or option.host_bytes <= plain.host_bytes)

    plain = best(found(range(len(placed)), [0]))
    chosen = best(no_larger(found(sample(len(placed)), sample(len(turn))[1:])))
    if chosen is not None:
        i, j = placed.index(chosen.needs.in_hbm), turn.index(chosen.needs.turn_layers)
        chosen = best([chosen, *no_larger(found(sample(len(placed), i), sample(len(turn), j)))])
    return best(option for option in (plain, chosen) if option is not None)


def worth_a_slot(now: Arrangement, then: Arrangement) -> bool:
    """Whether `then`, with a slot more, is faster by more than steps differ by themselves."""
    return then.seconds() < (1 - A_SLOT) * now.seconds()


def best(arrangements: Iterable[Arrangement]) -> Arrangement | None:
    """The one that needs the least host memory among the fastest; None where there are none.

    Not worked out is the time of those that take longer at the least than another does.
    """
    timed: list[tuple[float, Arrangement]] = []
    limit = math.inf
    for option in sorted(arrangements, key=lambda option: option.least_s):
        if option.least_s > limit:
            break
        timed.append((option.seconds(), option))
        limit = min(limit, timed[-1][0] * (1 + AS_FAST))
    fast = [(option.host_bytes, seconds, option) for seconds, option in timed if seconds <= limit]
    return min(fast, key=lambda found: found[:2])[2] if fast else None
