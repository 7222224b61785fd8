"""Predicts steps of a batch shape: times a micro-batch's passes once per shape, and leaves the rest to the plan."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from horizon.config.schema import Recompute
from horizon.plan.activations import ActivationPlan
from horizon.plan.cost import Rates, StepTimes, predict_step, step_cost
from horizon.plan.lanes import StepCost
from horizon.plan.memory import MemoryNeeds
from horizon.plan.prediction import StepPrediction
from horizon.stream.measure import sample_batch

if TYPE_CHECKING:
    from horizon.stream.executor import Executor

logger = logging.getLogger(__name__)


Shapes = Sequence[tuple[int, int]]  # (rows, tokens) of each micro-batch of a step
# of (rows, tokens) of a micro-batch, version, what layers keep, and whether it is the step's only one
StepTimesOf = Callable[[tuple[int, int], int, Set[Recompute], bool], StepTimes | None]


def timed_on(executor: Executor) -> StepTimesOf:
    """Times of passes as `executor` runs them.

    They are None while steps are recorded, for they would be taken for theirs, and where the device has no room.
    """

    def times(shape: tuple[int, int], version: int, kinds: Set[Recompute], alone: bool) -> StepTimes | None:
        if executor.recording:
            return None
        batch = sample_batch(executor, *shape)[0]
        try:
            return executor.time_passes(batch, version, kinds, alone=alone)
        except torch.cuda.OutOfMemoryError as error:
            executor.reset()
            logger.warning("no prediction of the step's time: %s", str(error).splitlines()[0])
            return None
        finally:
            if executor.device.type == "cuda":
                torch.cuda.empty_cache()

    return times


class Predictor:
    """Predicts steps whose shape is planned ahead; nothing is timed for others.

    Args:
        step_times: where the time of passes comes from: timed, or estimated for an engine that does not exist.
        rates: of the machine, measured before the states were allocated.
        token_bytes: bytes of one token's hidden state.
    """

    def __init__(self, step_times: StepTimesOf, rates: Rates, token_bytes: int):
        self._step_times, self._rates, self._token_bytes = step_times, rates, token_bytes
        self._times: dict[tuple[object, ...], tuple[Set[Recompute], StepTimes]] = {}  # with the kinds that were timed
        self._predictions: dict[tuple[object, ...], StepPrediction] = {}

    @property
    def overlaps(self) -> bool:
        """Whether copies run beside kernels."""
        return self._rates.overlaps

    def learn(self, updates_per_s: float | None) -> None:
        """Take the pace of real updates (parameters a second) from now on; None: there were none yet."""
        if updates_per_s is not None:
            self._rates = replace(self._rates, updates_per_s=updates_per_s)

    def known(self, needs: MemoryNeeds, shapes: Shapes) -> StepPrediction | None:
        """What was predicted for a step of these micro-batches, if anything was."""
        return self._predictions.get(_key(needs, shapes))

    def predict(
        self, needs: MemoryNeeds, planned: ActivationPlan, shapes: Shapes, version: int, as_landed: bool
    ) -> StepPrediction | None:
        """A step of these micro-batches, which `known` then knows.

        None where `time` fails, or where a disk has a part in it whose speed is not known.

        Args:
            planned: the step's activations.
            version: the weights' version to measure with.
            as_landed: the host updates a block as soon as its gradient has landed.
        """
        if self._rates.disk is None and (needs.on_nvme or needs.grads_on_nvme or planned.on_nvme):
            return None
        if not self.time(shapes, _kinds(needs, planned), version):
            return None
        cost = self.cost(needs, planned, shapes, as_landed)
        self._predictions[_key(needs, shapes)] = predict_step(cost, sum(rows * length for rows, length in shapes))
        return self._predictions[_key(needs, shapes)]

    def cost(self, needs: MemoryNeeds, planned: ActivationPlan, shapes: Shapes, as_landed: bool) -> StepCost:
        """A step of micro-batches that were timed, with all kinds of keeping in `planned`; arguments as `predict`."""
        _, times = self._times[_timed_key(shapes)]
        tokens = [rows * length for rows, length in shapes]
        return step_cost(needs, planned, tokens, self._token_bytes, times, self._rates, as_landed)

    def time(self, shapes: Shapes, kinds: Set[Recompute], version: int) -> bool:
        """Time the passes over the first of these micro-batches, which is as large as any, once for each kind.

        Returns:
            whether they are timed.
        """
        key = _timed_key(shapes)
        if key in self._times and kinds <= self._times[key][0]:
            return True
        times = self._step_times(shapes[0], version, kinds, len(shapes) == 1)
        if times is None:
            return False
        self._times[key] = kinds, times
        return True


def _kinds(needs: MemoryNeeds, planned: ActivationPlan) -> frozenset[Recompute]:
    return frozenset(planned.recompute.get(layout.index, Recompute.full) for layout in needs.layouts[1:-1])


def _timed_key(shapes: Shapes) -> tuple[object, ...]:
    return shapes[0], len(shapes) == 1


def _key(needs: MemoryNeeds, shapes: Shapes) -> tuple[object, ...]:
    return needs.in_hbm, needs.weight_slots, needs.turn_layers, needs.keeps_gradients, needs.grad_dtype, tuple(shapes)
