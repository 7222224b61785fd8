"""The updater: worker threads that apply AdamW to the blocks in order and publish each block's new version.

`submit` queues one step's update of all blocks, `submit_block` that of one. A block's trainable parameters are cut
into chunks; all threads take chunks of the earliest submitted block that has any left, so blocks finish in order but
for the last chunks under way, and the loader of block 0 need not wait for the rest. The chunks of a block are the
same for any number of threads and each element belongs to exactly one, so threads and chunk size never change a
result. `enqueue` is for other work on a step's chunks, which may come before the update that publishes
(`horizon.optim.speculation`).

Invariants: padding between parameters is not touched, and a step's update starts when the one before it is done, and
when all other work on the step is.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeAlias

from torch import Tensor

from horizon.config.schema import MasterFormat, Moments
from horizon.errors import HorizonError, TierError
from horizon.layout import PARAM_ALIGN, BlockLayout
from horizon.optim.adamw import AdamW, StepScalars, Update, UpdateArrays, step_scalars, update_torch
from horizon.optim.chunks import Chunk, cut_chunks
from horizon.optim.moments import noise, stochastic_master, update_torch_bfloat16, update_torch_int8
from horizon.optim.pace import Pace, unpaced
from horizon.optim.states import UpdateStates, as_array, traffic, update_order
from horizon.plan.disk import PAGE_ELEMENTS
from horizon.store.ledger import Ledger
from horizon.store.pages import UpdatePages
from horizon.stream.timeline import Timeline

# Milliseconds of work a chunk: long against the Python around it, during which a thread keeps all others, and the one
# that drives the device, from the interpreter.
CHUNK_ELEMENTS = 1 << 21
MOST_ELEMENTS = 1 << 23
CHUNKS_A_THREAD = 32  # in a step, at least: so that all end at about the same time

log = logging.getLogger(__name__)


Work: TypeAlias = Callable[[int, UpdateArrays, StepScalars], None]  # of a chunk: its number, its arrays, the scalars


class Job(NamedTuple):
    """What is to be done with a block."""

    block: int
    work: Work | None = None  # None: the AdamW update
    chunks: Sequence[int] | None = None  # the numbers of those to work on; None: all


@dataclass(slots=True)
class _BlockUpdate:
    """One block's update at one step, while it is queued or under way."""

    layout: BlockLayout
    chunks: list[tuple[int, Chunk]]  # with their numbers
    work: Work | None
    step: int
    publishes: bool  # when all chunks are done
    decayed: StepScalars
    undecayed: StepScalars
    arrays: UpdateArrays | None = None  # asked for when the first chunk is taken
    opening: threading.Lock = field(default_factory=threading.Lock)  # held then: one block's may come after another's
    num_taken: int = 0
    num_done: int = 0
    left_of_page: Counter[int] = field(default_factory=Counter)  # chunks not done, where the block has states on nvme


@dataclass(slots=True)
class _Pace:
    """Of one step: elements that were updated, and for how long threads were busy with them, added up."""

    num_steps: int = 0  # begun until then
    num_elements: int = 0
    busy_s: float = 0.0


class Updater:
    """Applies AdamW to every block's states on `num_threads` threads, which start at the first `submit`.

    `seed` is that of the random bits with which what is kept in 16 or 8 bits is rounded, `pace` slows it down.

    A worker calls `states(block index)` when the block's turn comes, once per block and job, and owns the arrays
    until it calls `release(block index)`, just before the new version is published. States of a block that are on nvme
    come from `pages` instead, where they are announced as the update is queued; the block's version is then published
    when loads can see it. A failure is recorded in `ledger` naming the block, after which no further chunk is begun.
    Close the updater before freeing an array it may use.

    Attributes:
        chunks: of every block that has something to train, by its index.
    """

    def __init__(
        self,
        layouts: Sequence[BlockLayout],
        states: Callable[[int], UpdateStates],
        ledger: Ledger,
        adamw: AdamW,
        num_threads: int,
        release: Callable[[int], None],
        chunk_elements: int = CHUNK_ELEMENTS,
        *,
        seed: int = 0,
        timeline: Timeline | None = None,
        pages: UpdatePages | None = None,
        pace: Pace | None = None,
    ) -> None:
        if num_threads < 1 or chunk_elements < 1 or chunk_elements % PARAM_ALIGN:
            raise RuntimeError(
                f"an updater needs num_threads >= 1 and chunk_elements a multiple of {PARAM_ALIGN}, "
                f"got {num_threads} and {chunk_elements}"
            )
        chunks = {layout.index: tuple(cut_chunks(layout, chunk_elements)) for layout in layouts}
        self.chunks = {index: cut for index, cut in chunks.items() if cut}
        self._layouts = {layout.index: layout for layout in layouts}
        self._frozen = [index for index, cut in chunks.items() if not cut]
        self._states, self._release, self._ledger = states, release, ledger
        self._adamw, self._seed = adamw, seed
        self._num_threads = num_threads
        moments, master = Moments(adamw.moments), MasterFormat(adamw.master)
        self._update = load_update(moments, master)
        self._order = update_order(moments, master)
        self._rounds = moments is not Moments.float32 or master is not MasterFormat.split
        self._timeline = timeline or Timeline()
        self._pages, self._pace_of = pages, pace or unpaced
        self._threads: list[threading.Thread] = []
        self._wake = threading.Condition()  # guards everything below
        self._queue: deque[_BlockUpdate] = deque()  # blocks with chunks left to take, in order
        self._submitted = dict.fromkeys(self.chunks, 0)  # the last step of each block
        self._round = 0, False  # step and `publishes` of the chunk taken last
        self._num_under_way = 0  # chunks taken and not finished
        self._pace = _Pace()  # of the step under way
        self._last_pace = _Pace()  # of the one before it
        self._closed = False
        ledger.on_failure(lambda error: self._notify())

    @property
    def num_blocks(self) -> int:
        """Blocks that have something to train."""
        return len(self.chunks)

    @property
    def parameters_per_s(self) -> float | None:
        """Pace of all threads together in the step before the one begun last; None before the third.

        The first step does not count: it takes the states' pages.
        """
        pace = self._last_pace
        return self._num_threads * pace.num_elements / pace.busy_s if pace.num_steps > 1 else None

    def submit(self, step: int, lr: float, grad_scale: float) -> None:
        """Queue the update of all blocks, in order, for `step` (from 1, growing) and return at once.

        Raises:
            NonFiniteError: `lr` or `grad_scale` is not finite; nothing is queued.
            RuntimeError: the updater is closed, or was given `step` before.
        """
        self.enqueue([Job(block) for block in self.chunks], step, lr, grad_scale)

    def submit_block(self, block: int, step: int, lr: float, grad_scale: float = 1.0) -> None:
        """Queue the update of one block that has something to train; raises as `submit`.

        The first block of a step also publishes the blocks that have nothing to train.
        """
        self.enqueue([Job(block)], step, lr, grad_scale)

    def enqueue(self, jobs: Sequence[Job], step: int, lr: float, grad_scale: float, publishes: bool = True) -> None:
        """Queue `jobs`, of which those that publish are their blocks' updates of `step`; raises as `submit`.

        All jobs of a step that do not publish are over before the first that does begins. One that publishes and has
        no chunks does so at once.
        """
        self._ledger.raise_if_failed()
        decayed, undecayed = (step_scalars(self._adamw, lr, step, grad_scale, decay) for decay in (True, False))
        with self._wake:
            self._check_new(jobs, step)
            for block, work, numbers in jobs:
                cut, layout = self.chunks[block], self._layouts[block]
                chunks = [(n, cut[n]) for n in (range(len(cut)) if numbers is None else numbers)]
                update = _BlockUpdate(layout, chunks, work, step, publishes, decayed, undecayed)
                if publishes:
                    self._submitted[block] = step
                if chunks:
                    self._announce(update)
                    self._queue.append(update)
                elif publishes:
                    self._publish(update)
            for block in self._frozen if publishes else ():
                if self._ledger.version(block) < step:
                    self._ledger.publish(block, step)
            self._start_threads()
            self._wake.notify_all()

    def withdraw(self) -> None:
        """Forget what is queued, not begun, and would not publish."""
        with self._wake:
            self._queue = deque(update for update in self._queue if update.publishes)

    def wait_idle(self) -> None:
        """Return when nothing is queued or under way; raise the ledger's failure, at once, if there is one."""
        with self._wake:
            self._wake.wait_for(lambda: self._ledger.failed or not (self._queue or self._num_under_way))
        self._ledger.raise_if_failed()

    def _check_new(self, jobs: Sequence[Job], step: int) -> None:
        if self._closed:
            raise RuntimeError(f"cannot submit step {step}: the updater is closed")
        for block, _, _ in jobs:
            if step <= self._submitted[block]:
                raise RuntimeError(
                    f"cannot submit step {step} of block {block}: it was given step {self._submitted[block]} before"
                )

    def wait(self) -> None:
        """Return when every submitted update is published; raise the ledger's failure, at once, if there is one."""
        self._ledger.raise_if_failed()
        for block, step in self._submitted.items():
            self._ledger.wait(block, step)

    def close(self) -> None:
        """Stop the threads after the chunks they are at; may be called again.

        Updates not finished by then are given up and recorded as a failure, so that nobody waits for them.
        """
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        if self._queue or self._num_under_way:
            self._ledger.fail(HorizonError("the updater was closed before every submitted update was applied"))
            self._queue.clear()

    def _start_threads(self) -> None:
        while len(self._threads) < self._num_threads:
            name = f"horizon-update-{len(self._threads)}"
            self._threads.append(threading.Thread(target=self._work, name=name, daemon=True))
            self._threads[-1].start()

    def _work(self) -> None:
        """Take chunks and work on them until closed or failed; the body of each thread."""
        while (taken := self._take()) is not None:
            block, number, chunk = taken
            try:
                arrays = self._arrays(block, chunk)
                started = time.perf_counter()
                self._apply(block, number, chunk, arrays)
                self._finish(block, chunk, time.perf_counter() - started)
            except BaseException as error:  # whatever it is, those who wait must hear of it
                self._fail(block, error)

    def _take(self) -> tuple[_BlockUpdate, int, Chunk] | None:
        """The next chunk of the earliest block that has one, once there is one; None when it is time to stop."""
        with self._wake:
            while not (self._closed or self._ledger.failed):
                # chunks of an earlier round may still be under way on the same arrays
                if self._queue and (self._round_of(self._queue[0]) == self._round or self._num_under_way == 0):
                    block = self._queue[0]
                    number, chunk = block.chunks[block.num_taken]
                    block.num_taken += 1
                    if block.num_taken == len(block.chunks):
                        self._queue.popleft()
                    if block.step != self._round[0]:
                        self._last_pace, self._pace = self._pace, _Pace(self._pace.num_steps + 1)
                    self._round = self._round_of(block)
                    self._num_under_way += 1
                    return block, number, chunk
                self._wake.wait()
            return None

    @staticmethod
    def _round_of(block: _BlockUpdate) -> tuple[int, bool]:
        return block.step, block.publishes

    def _announce(self, block: _BlockUpdate) -> None:
        """Have what the update needs read from disk in its turn."""
        if self._pages is None or block.layout.index not in self._pages.states:
            return
        if not block.publishes:
            raise RuntimeError(f"block {block.layout.index} has states on nvme, and updates there cannot be taken back")
        block.left_of_page.update(chunk.start // PAGE_ELEMENTS for _, chunk in block.chunks)
        self._pages.announce(block.layout.index)

    def _arrays(self, block: _BlockUpdate, chunk: Chunk) -> UpdateArrays:
        """The chunk's part of every array; waits for those on nvme."""
        arrays, index = block.arrays or self._open(block), block.layout.index
        page, staged = chunk.start // PAGE_ELEMENTS, dict[str, Tensor]()
        if block.left_of_page:
            assert self._pages is not None
            staged = self._pages.acquire(index, page)
        parts = []
        for array, state in zip(arrays, self._order, strict=True):
            if state.name in staged:
                start = page * PAGE_ELEMENTS
                parts.append(as_array(staged[state.name])[state.span(chunk.start - start, chunk.stop - start)])
            else:
                parts.append(array[state.span(chunk.start, chunk.stop)])
        return tuple(parts)

    def _apply(self, block: _BlockUpdate, number: int, chunk: Chunk, parts: UpdateArrays) -> None:
        scalars = block.decayed if chunk.decay else block.undecayed
        at = block.layout.index
        with self._timeline.update(at, traffic(parts, self._order)), self._pace_of(at, parts):
            if block.work is not None:
                block.work(number, parts, scalars)
            elif self._rounds:
                self._update(*parts, scalars, noise(self._seed, block.step, block.layout.index, chunk.start))
            else:
                self._update(*parts, scalars)

    def _open(self, block: _BlockUpdate) -> UpdateArrays:
        with block.opening:
            if block.arrays is None:
                states = self._states(block.layout.index)
                paged = () if self._pages is None else self._pages.states.get(block.layout.index, ())
                states.check(block.layout.num_trainable, self._order, [state.name for state in paged])
                block.arrays = states.arrays()
            return block.arrays

    def _finish(self, block: _BlockUpdate, chunk: Chunk, busy_s: float) -> None:
        with self._wake:
            self._pace.num_elements += chunk.stop - chunk.start
            self._pace.busy_s += busy_s
            self._num_under_way -= 1
            block.num_done += 1
            if block.left_of_page:
                self._release_page(block, chunk.start // PAGE_ELEMENTS)
            if block.publishes and block.num_done == len(block.chunks):
                self._publish(block)
            if self._num_under_way == 0:
                self._wake.notify_all()

    def _release_page(self, block: _BlockUpdate, page: int) -> None:
        block.left_of_page[page] -= 1
        if block.left_of_page[page] == 0:
            assert self._pages is not None
            self._pages.release(block.layout.index, page)

    def _publish(self, block: _BlockUpdate) -> None:
        index = block.layout.index
        self._release(index)
        if self._pages is None or index not in self._pages.states:
            self._ledger.publish(index, block.step)
        else:
            self._pages.when_loadable(index, partial(self._ledger.publish, index, block.step))

    def _fail(self, block: _BlockUpdate, error: BaseException) -> None:
        if isinstance(error, TierError):  # it names what failed, and the update is not to blame
            self._ledger.fail(error)
            return
        failure = HorizonError(
            f"the update of block {block.layout.index} ({block.layout.name}) at step {block.step} failed: {error!r}"
        )
        failure.__cause__ = error
        self._ledger.fail(failure)

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify_all()


def chunk_elements(layouts: Sequence[BlockLayout], num_threads: int) -> int:
    """Elements of a chunk: the more, the larger the model."""
    share = sum(layout.num_trainable for layout in layouts) // (CHUNKS_A_THREAD * num_threads)
    return min(max(share // PARAM_ALIGN * PARAM_ALIGN, CHUNK_ELEMENTS), MOST_ELEMENTS)


def load_update(moments: Moments = Moments.float32, master: MasterFormat = MasterFormat.split) -> Update:
    """The numba kernel, or plain torch with one warning in the log where numba cannot be imported."""
    try:
        from horizon.optim.kernel import update_numba
        from horizon.optim.narrow import narrow_update
    except (ImportError, OSError) as error:  # OSError: llvmlite's library does not load
        log.warning("numba is not available (%s): AdamW runs as plain torch operations, about ten times slower", error)
        return torch_update(moments, master)
    split = moments is Moments.float32 and master is MasterFormat.split
    return update_numba if split else narrow_update(moments, master)


def torch_update(moments: Moments, master: MasterFormat = MasterFormat.split) -> Update:
    """The update as plain torch operations."""
    update = TORCH_UPDATES[moments]
    return update if master is MasterFormat.split else stochastic_master(update, moments is not Moments.float32)


TORCH_UPDATES: dict[Moments, Update] = {
    Moments.float32: update_torch,
    Moments.bfloat16: update_torch_bfloat16,
    Moments.int8: update_torch_int8,
}
