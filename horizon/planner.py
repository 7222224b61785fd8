"""Plans steps before they run: rows of a micro-batch, where states and activations go, how long it will take.

Bytes of a step come from what was measured of its blocks (`horizon.stream.measure`), its time from passes that were
timed (`horizon.stream.timing`). Rows follow from bytes alone, so that the same settings give the same sums in every
run; what time decides is which blocks live in HBM, which changes no result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol, TypeVar

import torch

from horizon.config.schema import Policy
from horizon.errors import BudgetError, ConfigError
from horizon.layout import BlockLayout
from horizon.plan.activations import ActivationPlan
from horizon.plan.memory import WEIGHT_SLOTS, Limits, MemoryNeeds, MemoryPlan, plan_memory
from horizon.plan.placement import Placer, unknown_activations
from horizon.plan.search import Arrangement, best, placements, worth_a_slot
from horizon.store.gradients import GradientBuffers
from horizon.stream.activations import Activations, StepSpace
from horizon.stream.batch import MicroBatch
from horizon.stream.prediction import Predictor

T = TypeVar("T")
NOTHING = torch.empty(0)
Shapes = Sequence[tuple[int, int]]  # (rows, tokens) of a step's micro-batches


class Blocks(Protocol):
    """The model, as far as it is asked here."""

    @property
    def layouts(self) -> Sequence[BlockLayout]:
        """Of its blocks."""

    @property
    def max_positions(self) -> int | None:
        """Positions that it has an embedding for; None where any position can be computed."""


class Arranged(Protocol):
    """What steps are planned for: the engine's running parts."""

    plan: MemoryPlan
    needs: MemoryNeeds

    @property
    def model(self) -> Blocks:
        """What they go through."""

    @property
    def moves_blocks(self) -> bool:
        """Whether blocks can move between host and device memory between steps."""

    @property
    def version(self) -> int:
        """Optimizer steps that the weights have seen."""

    @property
    def as_landed(self) -> bool:
        """Whether the host updates a block as soon as its gradient has landed."""

    @property
    def updates_per_s(self) -> float | None:
        """Parameters a second that the host's update was seen to take."""

    def guarded(self, work: Callable[[], T]) -> T:
        """Run device work; whatever fails, forget it."""

    def rearrange(self, needs: MemoryNeeds) -> None:
        """Have states, gradient buffers and slots as `needs` says."""


class StepPlanner:
    """Plans the steps of one engine; its `plan` then includes the activations of the last planned step."""

    def __init__(self, parts: Arranged, placer: Placer, activations: Activations, predictor: Predictor):
        self._parts, self._placer, self._activations, self._predictor = parts, placer, activations, predictor
        self._reserve = unknown_activations(parts.plan.limits)  # of the device, for activations
        self._placed_for: Shapes = []
        self._slots_for: Shapes = []

    def announce(self, batch_size: int, seq_len: int, rows: int | None) -> int:
        """Plan steps of `batch_size` rows in micro-batches of `rows`, or as many as suit; gives the rows.

        Raises:
            BudgetError: they do not fit.
            ConfigError: the model has no positions for rows of that length.
        """
        parts, limit = self._parts, self._parts.model.max_positions
        if limit is not None and seq_len > limit:
            raise ConfigError(f"train.seq_len={seq_len}, but the model has only {limit} positions")
        kept = parts.needs.keeps_gradients
        self._use_slots(WEIGHT_SLOTS)
        self._predictor.learn(parts.updates_per_s)
        rows = rows or next(
            self._leaving_room(
                kept, lambda plan, idle: self._activations.choose_rows(plan, batch_size, seq_len, idle, parts.version)
            )
        )
        shapes = [(min(rows, batch_size - i), seq_len) for i in range(0, batch_size, rows)]
        if self._moves and not self._place_fastest(shapes, kept):
            self._place_for(shapes, kept, self._placer.place)
        self._try_another_slot(shapes, kept)
        planned = self._plan(shapes, kept)
        predict = partial(self._predictor.predict, parts.needs, planned, shapes, parts.version, parts.as_landed)
        parts.plan = parts.plan.with_activations(planned.lines, parts.guarded(predict))
        return rows

    def space(self, batches: Sequence[MicroBatch], buffers: GradientBuffers, borrow: bool) -> StepSpace:
        """Room for the activations of a step; with `borrow` also in gradient buffers, where idle meanwhile."""
        planned = self._plan([b.shape for b in batches], borrow)
        idle = self.idle_bytes(self._parts.needs, borrow)
        lent = [buffers.claim(b)[: size // buffers.dtype.itemsize] if size else NOTHING for b, size in enumerate(idle)]
        tokens = [rows * length for rows, length in (b.shape for b in batches)]
        return StepSpace(self._activations.boundaries(planned, tokens, lent), planned.recompute)

    def make_room(self, needs: MemoryNeeds) -> MemoryNeeds:
        """`needs` with as few blocks in HBM, and slots, as it takes for the steps planned last."""
        if self._placer.slots is None:
            needs = replace(needs, weight_slots=WEIGHT_SLOTS)
        return self._placer.make_room(needs, self._parts.plan.limits, self._reserve)

    def idle_bytes(self, needs: MemoryNeeds, borrow: bool) -> list[int]:
        """Bytes of each block's kept gradient buffer, which activations in dram may use until its gradient comes."""
        layouts = self._parts.model.layouts if borrow else ()
        lent = {b.owner for layout in layouts for b in layout.borrowed}  # the head writes there before backward begins
        taken = lent | needs.in_hbm | needs.grads_on_nvme
        return [0 if lay.index in taken else lay.num_trainable * needs.grad_dtype.itemsize for lay in layouts]

    def _plan(self, shapes: Shapes, borrow: bool) -> ActivationPlan:
        """Where the activations of micro-batches of these (rows, tokens) go; the engine's plan then includes them."""
        parts = self._parts
        if shapes != self._slots_for:
            self._use_slots(WEIGHT_SLOTS)
        if self._moves and parts.needs.in_hbm and shapes != self._placed_for:
            self._place_for(shapes, borrow, self._placer.make_room)
        fixed, idle = parts.plan.with_activations(()), self.idle_bytes(parts.needs, borrow)
        planned = parts.guarded(lambda: self._activations.plan(fixed, shapes, idle, parts.version))
        parts.plan = fixed.with_activations(planned.lines, self._predictor.known(parts.needs, shapes))
        return planned

    # ---- which blocks live in HBM

    @property
    def _moves(self) -> bool:
        """Whether the placement follows what activations need."""
        return self._placer.moves and self._parts.moves_blocks

    def _place_fastest(self, shapes: Shapes, borrow: bool) -> bool:
        """Move blocks so that such a step is fastest; False where the policy is another, or no step could be timed."""
        parts, kinds = self._parts, self._activations.kinds
        if self._placer.policy is not Policy.auto:
            return False
        if not parts.guarded(partial(self._predictor.time, shapes, kinds, parts.version)):
            return False
        chosen = best(self._arrangements(shapes, borrow))
        if chosen is None:
            return False
        lines = chosen.activations.lines
        self._reserve = sum(line.num_bytes for line in lines if line.tier == "device")
        if chosen.needs != parts.needs:
            parts.rearrange(chosen.needs)
        self._placed_for = shapes
        return True

    def _arrangements(self, shapes: Shapes, borrow: bool) -> Iterator[Arrangement]:
        """All placements that fit."""
        for in_hbm in placements(self._parts.model.layouts):
            found = self._arrangement(replace(self._parts.needs, in_hbm=in_hbm), shapes, borrow)
            if found is not None:
                yield found

    def _arrangement(self, needs: MemoryNeeds, shapes: Shapes, borrow: bool) -> Arrangement | None:
        """Such a step, whose passes were timed, with these needs; None where it does not fit."""
        parts = self._parts
        try:
            fixed = plan_memory(needs, parts.plan.limits)
            idle = self.idle_bytes(needs, borrow)
            planned = self._activations.consider(fixed, shapes, idle, parts.version)
        except BudgetError:
            return None
        step = needs, planned, shapes, parts.as_landed
        host_bytes = fixed.with_activations(planned.lines).num_bytes("host")
        least_s = self._predictor.least_seconds(*step)
        return Arrangement(needs, planned, host_bytes, least_s, partial(self._predictor.estimate, *step))

    # ---- how many slots weights have

    def _use_slots(self, num: int) -> None:
        """Have so many slots, where nobody asked for a number."""
        parts = self._parts
        if self._placer.slots is None and parts.needs.weight_slots != num:
            parts.rearrange(replace(parts.needs, weight_slots=num))

    def _try_another_slot(self, shapes: Shapes, borrow: bool) -> None:
        """One slot more where such a step is faster by it, with what is then left for activations.

        Not where copies do not run beside kernels: it would only be memory that is read once more.
        """
        parts, kinds = self._parts, self._activations.kinds
        if self._placer.slots is not None or not self._predictor.overlaps or parts.needs.on_nvme:
            return
        if not parts.guarded(partial(self._predictor.time, shapes, kinds, parts.version)):
            return
        more = replace(parts.needs, weight_slots=WEIGHT_SLOTS + 1)
        now, then = (self._arrangement(needs, shapes, borrow) for needs in (parts.needs, more))
        if now is None or then is None or not worth_a_slot(now, then):
            return
        parts.rearrange(more)
        self._slots_for = shapes

    def _place_for(
        self, shapes: Shapes, borrow: bool, place: Callable[[MemoryNeeds, Limits, int], MemoryNeeds]
    ) -> None:
        """Move blocks, as `place` says, so that the activations of such a step find room."""
        parts, keeps = self._parts, self._placer.policy is Policy.auto
        sizes = self._leaving_room(
            borrow, lambda plan, idle: self._activations.num_bytes(plan, shapes, idle, parts.version, keeps)
        )
        _, self._reserve = min(sizes, key=lambda size: size[0])  # what is in HBM must not push more to the host
        needs = place(parts.needs, parts.plan.limits, self._reserve)
        if needs != parts.needs:
            parts.rearrange(needs)
        self._placed_for = shapes

    def _leaving_room(self, borrow: bool, work: Callable[[MemoryPlan, list[int]], T]) -> Iterator[T]:
        """`work(plan, idle bytes)` with as many blocks in HBM as may come before activations, where that has room.

        Then with the fewest.

        Raises:
            BudgetError: it finds no room even with these.
        """
        parts, refused, found = self._parts, None, False
        for needs in self._placer.bases(parts.needs, parts.plan.limits):
            try:
                plan, idle = plan_memory(needs, parts.plan.limits), self.idle_bytes(needs, borrow)
                yield parts.guarded(partial(work, plan, idle))
                found = True
            except BudgetError as error:
                refused = error
        if refused is not None and not found:
            raise refused
