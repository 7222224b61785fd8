"""Predicts steps of a batch shape: times a micro-batch's passes once per shape, and leaves the rest to the plan."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from horizon.config.schema import Recompute
from horizon.plan.activations import ActivationPlan
from horizon.plan.cost import Rates, StepTimes, predict_step
from horizon.plan.memory import MemoryNeeds
from horizon.plan.prediction import StepPrediction
from horizon.stream.executor import Executor
from horizon.stream.measure import sample_batch

logger = logging.getLogger(__name__)


Shapes = Sequence[tuple[int, int]]  # (rows, tokens) of each micro-batch of a step


class Predictor:
    """Predicts steps whose shape is planned ahead; nothing is timed for others.

    Args:
        rates: of the machine, measured before the states were allocated.
        token_bytes: bytes of one token's hidden state.
    """

    def __init__(self, executor: Executor, rates: Rates, token_bytes: int):
        self._executor, self._rates, self._token_bytes = executor, rates, token_bytes
        self._times: dict[tuple[object, ...], StepTimes] = {}
        self._predictions: dict[tuple[object, ...], StepPrediction] = {}

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
        """A step of these micro-batches, the first as large as any; None where there is no room to time that one.

        Nothing is timed while steps are recorded, for it would be taken for theirs; None then, too.

        Args:
            planned: the step's activations.
            version: the weights' version to measure with.
            as_landed: the host updates a block as soon as its gradient has landed.
        """
        if self._executor.recording:
            return None
        try:
            times = self._measured(needs, planned, shapes, version)
        except torch.cuda.OutOfMemoryError as error:
            self._executor.reset()
            logger.warning("no prediction of the step's time: %s", str(error).splitlines()[0])
            return None
        tokens = [rows * length for rows, length in shapes]
        predicted = predict_step(needs, planned, tokens, self._token_bytes, times, self._rates, as_landed)
        self._predictions[_key(needs, shapes)] = predicted
        return predicted

    def _measured(self, needs: MemoryNeeds, planned: ActivationPlan, shapes: Shapes, version: int) -> StepTimes:
        kinds = frozenset(planned.recompute.get(lay.index, Recompute.full) for lay in needs.layouts[1:-1])
        alone = len(shapes) == 1
        key = shapes[0], alone, kinds
        if key not in self._times:
            batch = sample_batch(self._executor, *shapes[0])[0]
            self._times[key] = self._executor.time_passes(batch, version, kinds, alone)
            if self._executor.device.type == "cuda":
                torch.cuda.empty_cache()
        return self._times[key]


def _key(needs: MemoryNeeds, shapes: Shapes) -> tuple[object, ...]:
    return needs.in_hbm, needs.keeps_gradients, needs.grad_dtype, tuple(shapes)
