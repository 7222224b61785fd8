"""Speculation: blocks are updated before the step's norm is known, as if nothing would be clipped.

A chunk is worked on in pieces; marks tell which pieces still wait for the norm. Three passes over a chunk:

    speculate   updates every piece whose update could be undone well enough, and clears its mark
    settle      updates the pieces that wait, with the step's scale; if that is not 1, undoes the others and updates
                them, too
    restore     undoes what was updated: the step is dropped

The inverse of the update in `horizon.optim.adamw`, from the new states and the gradient, every intermediate fp32:

    p = (p - (nstep * m) / (sqrt(v) / rbc2 + eps)) / decay      in `settle` not divided: the update then does not decay
    m = fma(-(1-b1), g, m) * (1 / b1)                            0 where m equals (1-b1) * g
    v = fma(-(1-b2) * g, g, v) * (1 / b2)                        0 where v equals (1-b2) * g * g, or below 0

The step taken back from `p` is the one it was moved by, to the bit. What limits all is `v`: the new one keeps the old
to 1 + R rounding errors, R = (1-b2) g^2 / (b2 v), and the scaled update then moves `p` by a step as many errors off.
A piece therefore waits if any of its elements has

    R > MOST    or    R * stride > REACH * max(|p|, FLOOR * lr),      stride: the longest step that AdamW can make

unless its v is 0, which comes back exactly. `docs/numerics.md` says what holds then.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import partial

import numpy as np

from horizon.errors import ConfigError
from horizon.optim.adamw import Array, StepScalars, UpdateArrays
from horizon.optim.updater import Job, Updater

log = logging.getLogger(__name__)

FLOOR = 16  # learning rates; smaller weights are treated as if they were of that size
MOST = 1 << 16  # leaves 8 of v's 24 bits: with fewer, a step of the wrong size is no longer a small error
REACH = 4  # the scaled update of a weight is then off by less than one of its units in the last place (measured)


@dataclass(slots=True)
class _Block:
    """How far a block was updated before the norm was known."""

    waits: list[Array]  # per chunk, uint8 [pieces]: 1 where nothing was done yet
    left: list[bool]  # per chunk: whether a piece waits, or is at work

    @property
    def updated(self) -> bool:
        return any(not waits.all() for waits in self.waits)


class Speculation:
    """The updates of one step after another: begun block by block, then settled or undone together.

    `speculate` may be called from a thread of its own, which has ended when the step is settled or undone.

    Raises:
        ConfigError: numba cannot be imported.
    """

    def __init__(self, updater: Updater) -> None:
        try:
            from horizon.optim.kernel import PIECE, speculation_kernels
        except (ImportError, OSError) as error:
            raise ConfigError(f"clip=speculative needs numba ({error}); install it, or set optim.clip=exact") from error
        self._piece = PIECE
        self._speculate, self._settle, self._restore = speculation_kernels()
        self._updater = updater
        self._step, self._lr = 0, 0.0
        self._blocks: dict[int, _Block] = {}  # of this step, those that were begun
        self._num_settled = 0

    def begin(self, step: int, lr: float) -> None:
        """What follows is of `step`."""
        self._step, self._lr, self._blocks, self._num_settled = step, lr, {}, 0

    def speculate(self, block: int) -> None:
        """Begin the update of a block whose gradient, all of it finite, is on the host; returns at once."""
        sizes = [chunk.stop - chunk.start for chunk in self._updater.chunks[block]]
        begun = _Block([np.ones(-(-size // self._piece), np.uint8) for size in sizes], [True] * len(sizes))
        self._blocks[block] = begun
        self._updater.enqueue([Job(block, partial(self._begin, begun))], self._step, self._lr, 1.0, publishes=False)

    def stop(self) -> None:
        """Begin nothing more of what was asked for."""
        self._updater.withdraw()

    def settle(self, grad_scale: float) -> int:
        """Start what is missing from the step's update at `grad_scale`; blocks are published as it is done.

        Returns:
            the number of blocks that were updated and have to be corrected.
        """
        self.stop()
        corrected = []
        if grad_scale != 1:
            self._updater.wait_idle()
            corrected = [block for block in self._blocks.values() if block.updated]
        jobs = []
        for block in self._updater.chunks:
            begun = self._blocks.get(block)
            if begun is None:
                jobs.append(Job(block))
            else:
                chunks = [n for n, left in enumerate(begun.left) if left or grad_scale != 1]
                jobs.append(Job(block, partial(self._complete, begun), chunks))
        self._num_settled = len(jobs)
        if log.isEnabledFor(logging.DEBUG):
            marks = [waits for begun in self._blocks.values() for waits in begun.waits]
            num_waiting, num_pieces = sum(int(waits.sum()) for waits in marks), sum(waits.size for waits in marks)
            begun_blocks = f"{len(self._blocks)} of {len(jobs)} blocks begun before the norm was known"
            log.debug("step %d: %s, %d of their %d pieces wait", self._step, begun_blocks, num_waiting, num_pieces)
        self._updater.enqueue(jobs, self._step, self._lr, grad_scale)
        return len(corrected)

    def undo(self) -> int:
        """Give all blocks of the step back their old states; returns when that is done.

        Returns:
            the number of blocks whose update was settled before and stays.
        """
        if self._num_settled:
            return self._num_settled
        self.stop()
        self._updater.wait_idle()
        jobs = [Job(block, partial(self._take_back, begun)) for block, begun in self._blocks.items() if begun.updated]
        self._updater.enqueue(jobs, self._step, self._lr, 1.0, publishes=False)
        self._updater.wait_idle()
        self._blocks = {}
        return 0

    # ---- the passes over a chunk, on the updater's threads

    def _begin(self, block: _Block, number: int, arrays: UpdateArrays, scalars: StepScalars) -> None:
        waits = block.waits[number]
        self._speculate(*arrays, waits, *scalars, *trust(scalars, self._lr))
        block.left[number] = bool(waits.any())

    def _complete(self, block: _Block, number: int, arrays: UpdateArrays, scalars: StepScalars) -> None:
        self._settle(*arrays, block.waits[number], *scalars, *inverses(scalars))

    def _take_back(self, block: _Block, number: int, arrays: UpdateArrays, scalars: StepScalars) -> None:
        self._restore(*arrays, block.waits[number], *scalars, *inverses(scalars))


def trust(scalars: StepScalars, lr: float) -> tuple[np.float32, np.float32, np.float32]:
    """(floor, ceiling, reach): a piece waits if (1-b2) g^2 > v * reach * (|p|, but from floor to ceiling) somewhere."""
    stride, b2 = longest_step(scalars), float(scalars.b2)
    ceiling = MOST * stride / REACH
    return np.float32(FLOOR * lr), np.float32(ceiling), np.float32(REACH * b2 / stride if stride else 0)


def longest_step(scalars: StepScalars) -> float:
    """The most that AdamW can move a weight: |m| / sqrt(v) is bounded as both are sums over the same gradients."""
    b2, omb1, omb2 = float(scalars.b2), float(scalars.omb1), float(scalars.omb2)
    ratio = omb1 / math.sqrt(omb2 * (1 - (1 - omb1) ** 2 / b2))
    return ratio * abs(float(scalars.nstep)) * float(scalars.rbc2)


def inverses(scalars: StepScalars) -> tuple[np.float32, np.float32]:
    """1 / b1 and 1 / b2 of the betas as the update rounds them; 0 for a beta of 0, which forgets everything anyway."""
    b1, b2 = 1 - float(scalars.omb1), float(scalars.b2)
    return np.float32(1 / b1 if b1 else 0), np.float32(1 / b2 if b2 else 0)
