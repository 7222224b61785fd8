"""Plans steps before they run: rows of a micro-batch, where states and activations go, how long it will take.

Bytes of a step come from what was measured of its blocks (`horizon.stream.measure`), its time from passes that were
timed (`horizon.stream.timing`). Rows follow from bytes alone, so that the same settings give the same sums in every
run; what time decides is which blocks live in HBM and how many layers are at the turn, which changes no result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Protocol, TypeVar

import torch

from horizon.config.schema import Policy, Recompute
from horizon.errors import BudgetError, ConfigError
from horizon.layout import BlockLayout
from horizon.plan.activations import ActivationPlan
from horizon.plan.bound import least_seconds
from horizon.plan.lanes import step_seconds
from horizon.plan.memory import WEIGHT_SLOTS, Limits, MemoryNeeds, MemoryPlan, plan_memory
from horizon.plan.placement import Placer, most_turn_layers, unknown_activations
from horizon.plan.search import Arrangement, placements, sample, search, worth_a_slot
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
        self._placed_for: Shapes = []  # what blocks in HBM leave room for
        self._arranged_for: Shapes = []  # what slots and the turn were chosen for

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
        self._use_least()
        self._predictor.learn(parts.updates_per_s)
        rows = rows or next(self._leaving_room(kept, partial(self._choose_rows, batch_size, seq_len)))
        shapes = [(min(rows, batch_size - i), seq_len) for i in range(0, batch_size, rows)]
        if self._moves and self._placer.policy is not Policy.auto:
            self._place_for(shapes, kept, self._placer.place)
        if not self._arrange(shapes, kept) and self._moves:
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
        if self._placer.turns:
            needs = replace(needs, turn_layers=0)
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
        if shapes != self._arranged_for:
            self._use_least()
        if self._moves and parts.needs.in_hbm and shapes != self._placed_for:
            self._place_for(shapes, borrow, self._placer.make_room)
        fixed, idle = parts.plan.with_activations(()), self.idle_bytes(parts.needs, borrow)
        planned = parts.guarded(lambda: self._activations.plan(fixed, shapes, idle, parts.version))
        parts.plan = fixed.with_activations(planned.lines, self._predictor.known(parts.needs, shapes))
        return planned

    def _choose_rows(self, batch_size: int, seq_len: int, needs: MemoryNeeds, plan: MemoryPlan, idle: list[int]) -> int:
        """Rows of a micro-batch, for layers at the turn that there may be then.

        Half of all at most are counted on, for the host updates them when the last micro-batch has come back.
        """
        plans, turn = [plan], self._turns
        for i in sample(len(turn))[1:]:
            if turn[i] <= turn[-1] // 2:
                with suppress(BudgetError):
                    plans.append(plan_memory(replace(needs, turn_layers=turn[i]), plan.limits))
        return self._activations.choose_rows(plans, batch_size, seq_len, idle, self._parts.version)

    # ---- which blocks live in HBM, and which are at the turn

    @property
    def _moves(self) -> bool:
        """Whether the placement follows what activations need."""
        return self._placer.moves and self._parts.moves_blocks

    @property
    def _turns(self) -> list[int]:
        """How many layers may be at the turn."""
        needs, layouts = self._parts.needs, self._parts.model.layouts
        pays = self._predictor.overlaps and Recompute.none in self._activations.kinds and not needs.on_nvme
        return [*range(most_turn_layers(layouts) + 1)] if self._placer.turns and pays else [needs.turn_layers]

    def _arrange(self, shapes: Shapes, borrow: bool) -> bool:
        """Have blocks in HBM, with policy `auto`, and at the turn so that such a step is fastest.

        Returns:
            whether steps could be timed, and some arrangement fits.
        """
        parts, kinds = self._parts, self._activations.kinds
        placed = [parts.needs.in_hbm]
        if self._moves and self._placer.policy is Policy.auto:
            placed = placements(parts.model.layouts)
        turn = self._turns if len(shapes) > 1 else self._turns[:1]
        if len(placed) == len(turn) == 1:
            return True
        if not parts.guarded(partial(self._predictor.time, shapes, kinds, parts.version)):
            return False

        def arrange(in_hbm: frozenset[int], num: int) -> Arrangement | None:
            return self._arrangement(replace(parts.needs, in_hbm=in_hbm, turn_layers=num), shapes, borrow)

        chosen = search(placed, turn, arrange)
        if chosen is None:
            return False
        lines = chosen.activations.lines
        self._reserve = sum(line.num_bytes for line in lines if line.tier == "device")
        if chosen.needs != parts.needs:
            parts.rearrange(chosen.needs)
        self._placed_for = self._arranged_for = shapes
        return True

    def _arrangement(self, needs: MemoryNeeds, shapes: Shapes, borrow: bool) -> Arrangement | None:
        """Such a step, whose passes were timed, with these needs; None where it does not fit."""
        parts = self._parts
        try:
            fixed = plan_memory(needs, parts.plan.limits)
            idle = self.idle_bytes(needs, borrow)
            planned = self._activations.consider(fixed, shapes, idle, parts.version)
        except BudgetError:
            return None
        host_bytes = fixed.with_activations(planned.lines).num_bytes("host")
        cost = self._predictor.cost(needs, planned, shapes, parts.as_landed)
        return Arrangement(needs, planned, host_bytes, least_seconds(cost), partial(step_seconds, cost))

    # ---- how many slots weights have

    def _use_least(self) -> None:
        """Have few slots and no turn, where nobody asked for a number."""
        parts = self._parts
        slots = WEIGHT_SLOTS if self._placer.slots is None else self._placer.slots
        turn_layers = 0 if self._placer.turns else parts.needs.turn_layers
        needs = replace(parts.needs, weight_slots=slots, turn_layers=turn_layers)
        if needs != parts.needs:
            parts.rearrange(needs)

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
        self._arranged_for = shapes

    def _place_for(
        self, shapes: Shapes, borrow: bool, place: Callable[[MemoryNeeds, Limits, int], MemoryNeeds]
    ) -> None:
        """Move blocks, as `place` says, so that the activations of such a step find room."""
        parts, keeps = self._parts, self._placer.policy is Policy.auto
        sizes = self._leaving_room(
            borrow, lambda _, plan, idle: self._activations.num_bytes(plan, shapes, idle, parts.version, keeps)
        )
        _, self._reserve = min(sizes, key=lambda size: size[0])  # what is in HBM must not push more to the host
        needs = place(parts.needs, parts.plan.limits, self._reserve)
        if needs != parts.needs:
            parts.rearrange(needs)
        self._placed_for = shapes

    def _leaving_room(self, borrow: bool, work: Callable[[MemoryNeeds, MemoryPlan, list[int]], T]) -> Iterator[T]:
        """`work(needs, plan, idle bytes)` with as many blocks in HBM as may come before activations, where those fit.

        Then with the fewest.

        Raises:
            BudgetError: it finds no room even with these.
        """
        parts, refused, found = self._parts, None, False
        for needs in self._placer.bases(parts.needs, parts.plan.limits):
            try:
                plan, idle = plan_memory(needs, parts.plan.limits), self.idle_bytes(needs, borrow)
                yield parts.guarded(partial(work, needs, plan, idle))
                found = True
            except BudgetError as error:
                refused = error
        if refused is not None and not found:
            raise refused
