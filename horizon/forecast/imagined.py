"""An engine that does not exist: its steps are planned by the planner of those that do, on estimates.

Nothing is allocated and no weights are read; of the model only its shape is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from horizon.checkpoint.format import list_arrays
from horizon.checkpoint.saves import saving_bytes, staging_bytes
from horizon.config.schema import (
    Clip,
    HorizonConfig,
    MasterFormat,
    MemoryConfig,
    Moments,
    OnNonFinite,
    Policy,
    Recompute,
)
from horizon.errors import BudgetError, ConfigError
from horizon.forecast.machine import Target
from horizon.models.shape import ModelShape
from horizon.optim.adamw import AdamW
from horizon.optim.clipping import Clipping
from horizon.plan.activations import ActivationPlan
from horizon.plan.cost import Rates, update_bytes
from horizon.plan.estimate import Estimator
from horizon.plan.memory import WEIGHT_SLOTS, Limits, MemoryNeeds, MemoryPlan, fixed_lines, plan_memory
from horizon.plan.placement import Placer, read_policy, turn_layers, unknown_activations
from horizon.plan.policies import tier_bytes
from horizon.plan.prediction import StepPrediction
from horizon.plan.refusals import check_memory, check_speculation
from horizon.planner import StepPlanner
from horizon.stream.activations import Activations
from horizon.stream.head import HEAD_CHUNK_BYTES, chunk_bytes, chunk_tokens
from horizon.stream.prediction import Predictor
from horizon.stream.streams import Streams

T = TypeVar("T")
CXL_SLOWER = 4  # updates with all states there, as published (arXiv 2507.03305)


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run with these settings would use, and how long its steps would take."""

    config: HorizonConfig
    plan: MemoryPlan
    needs: MemoryNeeds
    activations: ActivationPlan
    micro_batch: int

    @property
    def prediction(self) -> StepPrediction | None:
        """Of a step in steady state; None where a disk has a part in it whose speed is not known."""
        return self.plan.prediction

    def layers_that(self, recompute: Recompute) -> int:
        """How many layers keep what `recompute` says."""
        kept = self.activations.recompute
        return sum(kept.get(block, Recompute.full) is recompute for block in range(1, len(self.needs.layouts) - 1))


class _Imagined:
    """What `StepPlanner` plans for."""

    version = 0
    updates_per_s = None  # no update was seen

    def __init__(self, model: ModelShape, needs: MemoryNeeds, plan: MemoryPlan, as_landed: bool):
        self.model, self.needs, self.plan, self.as_landed = model, needs, plan, as_landed

    @property
    def moves_blocks(self) -> bool:
        return not self.needs.placed

    def guarded(self, work: Callable[[], T]) -> T:
        return work()

    def rearrange(self, needs: MemoryNeeds) -> None:
        self.plan, self.needs = plan_memory(needs, self.plan.limits), needs


class Forecaster:
    """Forecasts runs of one model on one machine, whose settings differ in anything but `model` and `device`."""

    def __init__(self, model: ModelShape, target: Target):
        self.model, self.target = model, target
        self._streams = Streams.on(torch.device("cpu"))
        self._estimators: dict[tuple[object, ...], Estimator] = {}

    def needs(self, config: HorizonConfig) -> MemoryNeeds:
        """The facts that decide the fixed memory, with all states on the host.

        Raises:
            ConfigError: settings that contradict each other.
        """
        optim = config.optim
        clipping = Clipping(optim.max_grad_norm, optim.clip)
        adamw = AdamW(betas=(optim.beta1, optim.beta2), eps=optim.eps, moments=optim.moments, master=optim.master)
        clipping.check(adamw, config.train.on_nonfinite)
        check_memory(config.memory)
        dtype = self.target.dtype(config.compute_dtype)
        return MemoryNeeds(
            self.model.layouts,
            dtype,
            dtype,
            clipping.keeps_gradients or config.train.on_nonfinite is OnNonFinite.skip,
            config.memory.weight_slots or WEIGHT_SLOTS,
            self.target.host_overhead,
            self.target.device_overhead + self.model.buffer_bytes,
            moments=Moments(optim.moments),
            master=MasterFormat(optim.master),
            cxl=self.target.cxl(config.memory),
            turn_layers=turn_layers(config.memory, self.model.layouts),
        )

    def forecast(self, config: HorizonConfig, limits: Limits | None = None) -> Forecast:
        """What a run with these settings would use, within `limits` instead of those that the settings ask for.

        Raises:
            BudgetError: it does not fit.
            ConfigError: settings that cannot work.
        """
        needs, memory = self.needs(config), config.memory
        limits = limits or self.target.limits(memory)
        placer, needs = self._placed(memory, needs, limits)
        check_speculation(needs, config.optim.clip)
        if config.checkpoint.save_every is not None:
            needs = self._saving(needs, limits, config.checkpoint.staging)
        parts = _Imagined(self.model, needs, plan_memory(needs, limits), _as_landed(config, needs))
        activations, predictor = self._estimates(config, needs, limits)
        planner, train = StepPlanner(parts, placer, activations, predictor), config.train
        rows = planner.announce(train.batch_size, train.seq_len, train.micro_batch)
        shapes = [(min(rows, train.batch_size - i), train.seq_len) for i in range(0, train.batch_size, rows)]
        idle = planner.idle_bytes(parts.needs, needs.keeps_gradients)
        planned = activations.plan(parts.plan.with_activations(()), shapes, idle, parts.version)
        return Forecast(config, parts.plan, parts.needs, planned, rows)

    def left_by_states(self, config: HorizonConfig) -> int:
        """Host bytes that activations and checkpoints may have.

        Raises:
            ConfigError: settings that cannot work.
        """
        limits = self.target.limits(config.memory)
        _, needs = self._placed(config.memory, self.needs(config), limits)
        return max(0, limits.host - tier_bytes(needs)[0])

    def _placed(self, memory: MemoryConfig, needs: MemoryNeeds, limits: Limits) -> tuple[Placer, MemoryNeeds]:
        device, can_update = self.target.device, self.target.can_update
        placer = read_policy(memory, device, can_update, len(needs.layouts), needs.moments, needs.master)
        return placer, placer.place(needs, limits, unknown_activations(limits))

    def _saving(self, needs: MemoryNeeds, limits: Limits, staging: str) -> MemoryNeeds:
        """The same, with the memory that checkpoints are written from, as `Runtime.plan_saves` has it."""
        arrays = list_arrays(needs.layouts, needs.moments, needs.master)
        size = staging_bytes(arrays, staging, limits.host - plan_memory(needs, limits).num_bytes("host"))
        return replace(needs, saving=saving_bytes(arrays, size, self.target.on_gpu, bool(needs.on_nvme)))

    def _estimates(self, config: HorizonConfig, needs: MemoryNeeds, limits: Limits) -> tuple[Activations, Predictor]:
        on_gpu, fused = self.target.on_gpu, self.target.fused(config.kernels)
        chunk = chunk_tokens(self.model.vocab_size, chunk_bytes(HEAD_CHUNK_BYTES, limits.device))
        key = needs.compute_dtype, fused, chunk
        if key not in self._estimators:
            self._estimators[key] = Estimator.of(
                self.model, self.target.facts, needs.compute_dtype, fused, on_gpu, chunk
            )
        estimator, token_bytes = self._estimators[key], self.model.hidden_size * needs.compute_dtype.itemsize
        activations = Activations(
            estimator.working_set,
            self._streams,
            not on_gpu,
            config.memory.recompute,
            token_bytes,
            bool(needs.turn_layers),
        )
        rates = estimator.rates(needs.moments, config.memory.update_threads)
        disk = self.target.disk(config.memory) if needs.uses_disk else None
        rates = replace(rates, cxl_bytes_per_s=self._cxl_bytes_per_s(rates, needs), disk=disk)
        return activations, Predictor(estimator.step_times, rates, token_bytes)

    def _cxl_bytes_per_s(self, rates: Rates, needs: MemoryNeeds) -> float:
        """Of updates on cxl: a stand-in's, the machine file's, or what AdamW out of cache was seen to lose there."""
        described = None if self.target.here else self.target.facts.tiers.get("cxl")
        if needs.cxl.bytes_per_s is not None:
            return needs.cxl.bytes_per_s
        if described is not None:
            return (
                described.read_bytes_per_s + described.write_bytes_per_s
            ) / 2  # an update reads as much as it writes
        return rates.updates_per_s * update_bytes(needs.states, needs.grad_dtype) / CXL_SLOWER

    def may_fit(self, config: HorizonConfig) -> bool:
        """Whether the fixed memory might fit, as nothing is placed in HBM but what the host has no room for."""
        try:
            needs, limits = self.needs(config), self.target.limits(config.memory)
        except ConfigError:
            return False
        fixed = fixed_lines(needs)
        total = sum(line.num_bytes for line in fixed)
        host = sum(line.num_bytes for line in fixed if line.tier == "host")
        if config.memory.nvme_dir is not None and host <= limits.host + limits.nvme:
            return True
        elsewhere = limits.cxl.num_bytes if limits.cxl.num_bytes else limits.device
        return host <= limits.host or (config.memory.policy is not Policy.dram and total <= limits.host + elsewhere)

    def fits(self, config: HorizonConfig) -> Forecast | None:
        """The forecast, or None where these settings do not fit or contradict each other."""
        try:
            return self.forecast(config)
        except (BudgetError, ConfigError):
            return None


def _as_landed(config: HorizonConfig, needs: MemoryNeeds) -> bool:
    """Whether the host updates a block as soon as its gradient has landed."""
    if config.optim.max_grad_norm is None:
        return not needs.keeps_gradients
    return config.optim.clip is not Clip.exact
