"""The running parts of one engine: built in order, used together, released in reverse.

    skeleton -> blocks -> plan -> store -> executor -> updater

Everything that may be refused is refused by the plan, before the store is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from horizon.checkpoint.hf_import import load_weights
from horizon.checkpoint.manifest import Manifest
from horizon.checkpoint.model_folder import Tokenizer
from horizon.checkpoint.saves import Save, Saves
from horizon.config.schema import ComputeDtype, Kernels, MasterFormat, MemoryConfig, Moments, NvmeEngine, Recompute
from horizon.config.values import choice
from horizon.models.blocks import BlockModel
from horizon.models.kernels import choose_kernels
from horizon.optim.adamw import AdamW
from horizon.optim.clipping import Clipping
from horizon.optim.device import can_update, make_updater
from horizon.optim.pace import simulated_pace
from horizon.optim.rate import measure_rates
from horizon.optim.steps import StepOutcome, Steps
from horizon.optim.threads import default_num_threads
from horizon.plan.cost import Rates
from horizon.plan.machine import (
    context_bytes,
    framework_bytes,
    host_overhead,
    lift_device_limit,
    limit_device,
    memory_limits,
    pins,
    prepare_device,
    resolve_device,
    resolve_dtype,
)
from horizon.plan.memory import WEIGHT_SLOTS, MemoryNeeds, MemoryPlan, check_fits, plan_memory
from horizon.plan.placement import Placer, read_policy, turn_layers, unknown_activations
from horizon.plan.refusals import check_memory, check_speculation
from horizon.plan.traffic import least_traffic
from horizon.planner import StepPlanner
from horizon.report.recording import Recording, record_steps
from horizon.store.cxl import find_cxl
from horizon.store.gradients import GradientBuffers, make_buffers
from horizon.store.host import HostStore
from horizon.store.nvme import NvmeFolder
from horizon.store.offload import OffloadFile
from horizon.store.speed import SAMPLE, probe_disk
from horizon.stream.activations import Activations
from horizon.stream.batch import MicroBatch
from horizon.stream.executor import Executor, ExecutorSettings
from horizon.stream.guard import guard
from horizon.stream.head import HEAD_CHUNK_BYTES, LossFn, chunk_bytes, chunk_tokens
from horizon.stream.measure import measure_working_set
from horizon.stream.prediction import Predictor, timed_on
from horizon.stream.streams import Streams
from horizon.stream.timeline import Cause

T = TypeVar("T")


class Runtime:
    """See `build_runtime`; the engine is its only user."""

    def __init__(
        self, model: BlockModel, plan: MemoryPlan, needs: MemoryNeeds, placer: Placer, optimizer: AdamW,
        device: torch.device, num_threads: int, recompute: Recompute, clipping: Clipping, seed: int, rates: Rates,
        memory: MemoryConfig,
    ):  # fmt: skip
        self.model, self.plan, self.needs, self.device = model, plan, needs, device
        self.optimizer, self._num_threads, self._seed, self._pin = optimizer, num_threads, seed, pins(device)
        with ExitStack() as release:  # in reverse, and all of it whatever fails
            release.callback(lift_device_limit, device)
            limit_device(device, plan.limits.device)
            self.store = HostStore(
                model.layouts, self._pin, needs.compute_dtype is torch.float32, device, needs.in_hbm, needs.moments,
                needs.master, needs.placed, memory.nvme_dir, memory.nvme_engine, needs.nodes,
            )  # fmt: skip
            release.callback(self.store.close)
            needs = self.needs = replace(needs, pageable=self.store.pageable)
            self.plan = plan_memory(needs, plan.limits)  # with staging for what CUDA refused, which nobody knew before
            disk = self.store.measure_disk()
            if disk is None and needs.uses_disk:  # for gradients or activations alone
                size = min(SAMPLE, plan.limits.nvme)
                disk = probe_disk(memory.nvme_dir or "", NvmeEngine(memory.nvme_engine), size)
            rates = replace(rates, disk=disk)
            self.streams = Streams.on(device)
            self.store.observe_disk(self.streams.timeline.disk)
            self._nvme = NvmeFolder(memory.nvme_dir or "", memory.nvme_engine, self.streams.timeline.disk)
            self.buffers: GradientBuffers = make_buffers(needs, self._pin, device, self.store.ledger, self._nvme)
            release.callback(lambda: self.buffers.close())  # those of then: they may be exchanged
            head_chunk = chunk_tokens(model.vocab_size, chunk_bytes(HEAD_CHUNK_BYTES, plan.limits.device))
            settings = ExecutorSettings(needs.compute_dtype, needs.weight_slots, head_chunk, needs.turn)
            self.executor = Executor(model, self.store, self.streams, settings)
            release.callback(delattr, self, "executor")
            release.callback(self.executor.free_slots)  # at once, whatever else still refers to the executor
            token_bytes = model.hidden_size * needs.compute_dtype.itemsize
            working_set, nodes = partial(measure_working_set, self.executor), needs.cxl.boundary_nodes
            on_disk = OffloadFile(self._nvme, self.store.ledger, self._pin, nodes)
            activations = Activations(
                working_set, self.streams, not self._pin, recompute, token_bytes, bool(needs.turn_layers), nodes,
                on_disk,
            )  # fmt: skip
            release.callback(activations.close)
            self.planner = StepPlanner(
                self, placer, activations, Predictor(timed_on(self.executor), rates, token_bytes)
            )
            release.callback(delattr, self, "planner")  # it holds the executor, too
            self.executor.use_buffers(self.buffers)
            release.callback(self.streams.synchronize)
            self._start_updater(needs)
            release.callback(lambda: self._updater.close())
            self.store.ledger.on_failure(lambda error: self.buffers.fail(error))
            self.saves = Saves(self.store, self.streams, needs.moments, needs.master, model.skeleton)
            release.callback(self.saves.close)  # before the updater: what is being saved waits for updates
            self._steps = Steps(
                lambda: self.executor, self._updater, self.streams, self.store.ledger, clipping,
                norms=self.gradient_norms, buffers=lambda: self.buffers, kept=needs.keeps_gradients,
                weight_decay=optimizer.weight_decay,
            )  # fmt: skip
            self._release = release.pop_all()

    def _start_updater(self, needs: MemoryNeeds) -> None:
        self._updater = make_updater(
            self.model.layouts, needs.in_hbm, self._states, self.store.ledger, self.optimizer, self._num_threads,
            self.streams, lambda b: self.buffers.release(b), self._seed, self.store.pages, simulated_pace(needs),
        )  # fmt: skip

    @property
    def version(self) -> int:
        """Optimizer steps that the weights have seen, those still under way included."""
        return self._steps.version

    @property
    def moves_blocks(self) -> bool:
        """Whether blocks can move between host and device memory: not where some have a place or staging apart."""
        return not self.needs.placed and self.store.loads is None

    @property
    def as_landed(self) -> bool:
        """Whether the host updates a block as soon as its gradient has landed."""
        return self._steps.as_landed

    @property
    def updates_per_s(self) -> float | None:
        """Parameters a second that the host's update was seen to take."""
        return self._updater.parameters_per_s

    @property
    def keeps_gradients(self) -> bool:
        """Gradients stay readable after a backward."""
        return self.buffers.kept

    def load(self, weights: Any, seed: int) -> None:
        """Fill the store: from a folder, from a live model, or (None) with random values."""
        self.executor.free_slots()  # in their place, values are drawn and split on the device
        load_weights(weights, self.model.skeleton, self.store.write_master, self.device, seed)
        self.executor.make_slots(self.buffers, self.needs.weight_slots, self.needs.turn)

    # ---- a step

    def run_step(self, batches: Sequence[MicroBatch], lr: float, seed: int, loss_fn: LossFn | None) -> StepOutcome:
        """A whole step: forward, backward, and the update, which may run on behind."""
        space = partial(self.planner.space, batches, self.buffers, self.buffers.kept)
        return self._steps.run(batches, space, lr, seed, loss_fn)

    def accumulate(self, batches: Sequence[MicroBatch], seed: int, old_share: float, loss_fn: LossFn | None) -> Tensor:
        """Forward and backward that leaves old_share * (waiting gradients) + (1 - old_share) * (this batch's)."""
        space = self.planner.space(batches, self.buffers, old_share == 0)
        return self._steps.accumulate(batches, space, seed, old_share, loss_fn)

    def apply(self, lr: float, loss: float) -> StepOutcome:
        """Clip and apply the gradients that `accumulate` has left; `loss` is theirs."""
        return self._steps.apply(lr, loss)

    def fail(self, error: BaseException) -> None:
        """The weights are of no use any more: whatever is asked next raises `error`."""
        self.store.ledger.fail(error)

    def raise_if_failed(self) -> None:
        """Raise the first failure of any thread, if there was one, or that of a save, once."""
        self.store.ledger.raise_if_failed()
        self.saves.raise_if_failed()

    def abandon_saves(self) -> None:
        """Give up what is being saved, so that closing does not wait for a disk."""
        self.saves.abandon()

    def gradient_norms(self) -> Tensor:
        """L2 norm of every trainable parameter's gradient, fp32 [parameters] on CPU, in the model's order."""
        assert self.executor.gradients is not None
        self.streams.timeline.enter(Cause.launch, "end of the step")
        norms = self.executor.gradients.norms.cpu()
        by_name = dict(zip(self.trainable_names(), norms, strict=True))
        return torch.stack([by_name[name] for name in self.model.parameter_names if name in by_name])

    def read_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(name, fp32 gradient as a new CPU tensor) of every trainable parameter, in the model's order."""
        for name in self.model.parameter_names:
            block, param = self.store.place(name)
            if param.spec.trainable:
                yield name, self.buffers.read(block, param.offset, param.end).view(param.spec.shape)

    def wait_for_updates(self) -> None:
        """Return once every block has seen all optimizer steps."""
        for layout in self.model.layouts:
            self.store.ledger.wait(layout.index, self.version)
        if self.needs.in_hbm:
            self.streams.synchronize()  # a version in HBM is published when its update is launched

    def keep_fp32_gradients(self) -> None:
        """From now on gradients of all blocks wait on the host in fp32, so that several backwards can add up.

        Raises:
            BudgetError: the host budget does not allow 4 B/param of gradients.
        """
        if self.buffers.kept and self.buffers.dtype is torch.float32:
            return
        needs = replace(self.needs, grad_dtype=torch.float32, keeps_gradients=True)
        self.rearrange(self.planner.make_room(needs))

    def rearrange(self, needs: MemoryNeeds) -> None:
        """Have states, gradient buffers and slots as `needs` says, with what they hold; no step may be under way.

        Raises:
            BudgetError: it does not fit, and nothing has changed, unless the system refuses what the plan allows.
        """
        plan = plan_memory(needs, self.plan.limits)
        self.wait_for_updates()
        self.saves.settle()
        self._updater.close()
        self.executor.free_slots()
        try:
            self.store.keep_in_hbm(needs.in_hbm)
            if (self.buffers.dtype, self.buffers.kept) == (needs.grad_dtype, needs.keeps_gradients):
                self.buffers.keep_in_hbm(needs.in_hbm)
            else:
                self.buffers.close()
                self.buffers = make_buffers(needs, self._pin, self.device, self.store.ledger, self._nvme)
            self.executor.make_slots(self.buffers, needs.weight_slots, needs.turn)
            self._start_updater(needs)
            self._steps.use_updater(self._updater, needs.keeps_gradients)
        except BaseException as error:
            self.fail(error)  # what was on its way is lost
            raise
        self.plan, self.needs = plan, needs

    # ---- checkpoints

    def plan_saves(self, staging: str) -> None:
        """Have room for checkpoints to be written from; `plan` then includes it. `staging`: a size, or `auto`.

        Raises:
            BudgetError: the host has no room for it.
        """
        activations, prediction = self.plan.activations, self.plan.prediction

        def planned(needs: MemoryNeeds) -> MemoryPlan:
            return plan_memory(needs, self.plan.limits).with_activations(activations, prediction)

        room = self.plan.limits.host - planned(replace(self.needs, saving=0)).num_bytes("host")
        needs = replace(self.needs, saving=self.saves.memory(staging, room))
        check_fits(planned(needs), "a smaller checkpoint.staging")
        self.saves.make_staging()
        self.plan, self.needs = planned(needs), needs

    def begin_save(self, folder: Path, manifest: Manifest, tokenizer: Tokenizer | None) -> Save:
        """See `Saves.begin`; blocks go in the order in which the next step will update them."""
        if not self.saves.planned:
            self.plan_saves("auto")
        blocks = [layout.index for layout in self.model.layouts]
        order = [*reversed(blocks)] if self._steps.as_landed else blocks
        return self.saves.begin(folder, manifest, sorted(order, key=lambda b: b not in self.needs.in_hbm), tokenizer)

    def restore(self, fill: Callable[[HostStore], None], version: int, last_norm: float | None) -> None:
        """Have `fill` exchange all states; they have then seen `version` steps.

        Raises:
            CheckpointError: `fill` failed, and the states are of no use any more.
        """
        self.wait_for_updates()
        self.saves.settle()
        self._updater.close()
        self.executor.reset()
        try:
            fill(self.store)
        except BaseException as error:
            self.fail(error)
            raise
        self.streams.synchronize()
        self.store.ledger.reset(version)
        self._start_updater(self.needs)
        self._steps.use_updater(self._updater, self.buffers.kept)
        self._steps.go_on_from(version, last_norm)

    @property
    def last_norm(self) -> float | None:
        """Of the gradients of the step applied last."""
        return self._steps.last_norm

    def guarded(self, work: Callable[[], T]) -> T:
        """Run device work; whatever fails, forget it (`horizon.stream.guard`)."""
        return guard(self.streams, self.executor, self.plan.limits, work)

    def recorded(self, trace: Path | None, picture: Path | None) -> AbstractContextManager[Recording]:
        """See `horizon.report.recording.record_steps`."""
        names = [layout.name for layout in self.model.layouts]
        return record_steps(self.streams, names, least_traffic(self.needs), trace, picture, self.needs.cxl.note)

    # ---- memory

    def plan_micro_batch(self, batch_size: int, seq_len: int, rows: int | None) -> int:
        """See `StepPlanner.announce`."""
        return self.planner.announce(batch_size, seq_len, rows)

    def device_bytes(self) -> int:
        """Peak device memory of this process; on CPU the planned bytes of the stand-in."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device) + context_bytes(self.device)
        return self.plan.num_bytes("device")

    def close(self) -> None:
        """Stop the threads, then release memory. Idempotent."""
        self._release.close()

    def _states(self, block: int) -> dict[str, Tensor]:
        """What an update of `block` takes, and is about to overwrite."""
        self.saves.before_update(block)
        return {**self.store.states(block), "grads": self.buffers.gradient(block)}

    def trainable_names(self) -> list[str]:
        """Of all parameters that have gradients, block by block."""
        return [p.name for layout in self.model.layouts for p in layout.trainable]


def build_runtime(
    skeleton: Any,
    weights: Any,
    *,
    optimizer: AdamW,
    memory: MemoryConfig,
    device: str,
    compute_dtype: ComputeDtype,
    seed: int,
    freeze: Sequence[str],
    keeps_gradients: bool,
    kernels: Kernels,
    clipping: Clipping,
) -> Runtime:
    """Plan, allocate and load an engine's parts.

    Args:
        weights: folder to stream from, live model to copy from, or None for random values.

    Raises:
        HorizonError: by kind; nothing stays allocated.
    """
    check_memory(memory)
    num_threads = default_num_threads() if memory.update_threads is None else memory.update_threads
    target = resolve_device(device)
    dtype = resolve_dtype(compute_dtype, target)
    model = BlockModel(skeleton, freeze, choose_kernels(kernels, target) is Kernels.liger)
    prepare_device(target)
    model.to(target)
    recompute = choice(Recompute, memory.recompute, "memory.recompute")
    cxl = find_cxl(memory)
    rates = measure_rates(target, num_threads, dtype, optimizer, cxl)
    limits = memory_limits(memory, target, cxl)
    overhead = framework_bytes(target) + sum(b.nbytes for b in skeleton.buffers())
    moments, master = Moments(optimizer.moments), MasterFormat(optimizer.master)
    needs = MemoryNeeds(
        model.layouts, dtype, dtype, keeps_gradients, memory.weight_slots or WEIGHT_SLOTS, host_overhead(target),
        overhead, moments=moments, master=master, cxl=cxl, turn_layers=turn_layers(memory, model.layouts),
    )  # fmt: skip
    placer = read_policy(memory, target, can_update(target), model.num_blocks, moments, master)
    needs = placer.place(needs, limits, unknown_activations(limits))
    plan = plan_memory(needs, limits)
    check_speculation(needs, clipping.mode)
    runtime = Runtime(
        model, plan, needs, placer, optimizer, target, num_threads, recompute, clipping, seed, rates, memory
    )  # fmt: skip
    try:
        runtime.load(weights, seed)
    except BaseException:
        runtime.close()
        raise
    return runtime
