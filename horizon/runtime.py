"""The running parts of one engine: built in order, used together, released in reverse.

    skeleton -> blocks -> plan -> store -> executor -> updater

Everything that may be refused is refused by the plan, before the store is allocated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from horizon.checkpoint.hf_import import import_weights
from horizon.config.schema import ComputeDtype, Kernels, MemoryConfig, Moments, Recompute
from horizon.config.values import choice
from horizon.errors import BudgetError, ConfigError, HorizonError
from horizon.models.blocks import BlockModel
from horizon.models.kernels import choose_kernels
from horizon.models.skeleton import init_parameters
from horizon.optim.adamw import AdamW
from horizon.optim.apply import KeptUpdates, StreamedUpdates
from horizon.optim.states import UpdateStates
from horizon.optim.threads import default_num_threads
from horizon.optim.updater import Updater
from horizon.plan.activations import ActivationPlan
from horizon.plan.machine import (
    context_bytes,
    framework_bytes,
    memory_limits,
    prepare_device,
    process_bytes,
    resolve_device,
)
from horizon.plan.memory import RING_BUFFERS, MemoryNeeds, MemoryPlan, plan_memory
from horizon.plan.traffic import least_traffic
from horizon.report.recording import Recording, record_steps
from horizon.store.gradients import GradientBuffers, KeptGradients, RingGradients
from horizon.store.host import HostStore
from horizon.stream.activations import Activations
from horizon.stream.batch import MicroBatch
from horizon.stream.executor import Executor, ExecutorSettings
from horizon.stream.head import LossFn, chunk_tokens
from horizon.stream.streams import Streams
from horizon.stream.timeline import Cause
from horizon.units import MIB, format_bytes

T = TypeVar("T")
HEAD_CHUNK_BYTES = 2048 * MIB  # logits and their gradient in bf16, or logits in fp32, that exist at once


class Runtime:
    """See `build_runtime`; the engine is its only user.

    Attributes:
        version: optimizer steps that the weights have seen, those still under way included.
    """

    def __init__(
        self, model: BlockModel, plan: MemoryPlan, needs: MemoryNeeds, optimizer: AdamW, device: torch.device,
        num_threads: int, recompute: Recompute, seed: int,
    ):  # fmt: skip
        self.model, self.plan, self.device = model, plan, device
        self._needs = needs
        self._pin = device.type == "cuda"
        self.version = 0
        with ExitStack() as release:  # in reverse, and all of it whatever fails
            release.callback(_lift_device_limit, device)
            _limit_device(device, plan.limits.device)
            self.store = HostStore(model.layouts, self._pin, needs.compute_dtype is torch.float32, needs.moments)
            release.callback(self.store.close)
            self.buffers: GradientBuffers = self._new_buffers(needs.grad_dtype, needs.keeps_gradients)
            release.callback(lambda: self.buffers.close())  # those of then: they may be exchanged
            self.streams = Streams.on(device)
            head_chunk = chunk_tokens(model.vocab_size, HEAD_CHUNK_BYTES)
            settings = ExecutorSettings(needs.compute_dtype, needs.weight_slots, head_chunk)
            self.executor = Executor(model, self.store, self.streams, settings)
            release.callback(delattr, self, "executor")  # its slots
            token_bytes = model.hidden_size * needs.compute_dtype.itemsize
            self._activations = Activations(self.executor, self.streams, recompute, token_bytes)
            release.callback(delattr, self, "_activations")
            release.callback(self._activations.close)
            self.executor.use_buffers(self.buffers)
            release.callback(self.streams.synchronize)
            self._updater = Updater(
                model.layouts, self._update_states, self.store.ledger, optimizer, num_threads, self._published,
                seed=seed, timeline=self.streams.timeline,
            )  # fmt: skip
            release.callback(self._updater.close)
            self.store.ledger.on_failure(lambda error: self.buffers.fail(error))
            self._kept = KeptUpdates(self._updater)
            self._streamed = StreamedUpdates(self._updater, self.buffers, self.store.ledger)
            self._release = release.pop_all()

    @property
    def keeps_gradients(self) -> bool:
        """Gradients stay readable after a backward."""
        return self.buffers.kept

    def load(self, weights: Any, seed: int) -> None:
        """Fill the store: from a folder, from a live model, or (None) with random values."""
        if isinstance(weights, Path):
            import_weights(weights, self.model.skeleton, self.store.write_master)
            return
        if weights is not None:
            for name, parameter in weights.named_parameters():
                self.store.write_master(name, parameter)
            return
        for name, value in init_parameters(self.model.skeleton, device=self.device, seed=seed):
            self.store.write_master(name, value)

    # ---- a step

    def run_step(self, batches: Sequence[MicroBatch], lr: float, seed: int, loss_fn: LossFn | None) -> Tensor:
        """Forward and backward; without clipping also the updates, hence the next version. Gives the device's loss."""
        if self.buffers.kept:
            return self.accumulate(batches, seed, 0.0, loss_fn)
        planned, step = self._plan_step([b.shape for b in batches], borrow=False), self.version + 1
        boundaries = self._activations.boundaries(planned, _num_tokens(batches), [])
        self._streamed.begin(step, lr)
        try:
            loss = self.executor.train(
                batches,
                self.version,
                boundaries,
                self._streamed,
                seed=seed,
                recompute=planned.recompute,
                loss_fn=loss_fn,
            )
            with self.streams.waiting(Cause.link, "last gradient"):
                self._streamed.finish()
            self.raise_if_failed()
            if self._streamed.num_updates:
                self.version = step
        except BaseException as error:
            self._abandon(step, error)
            raise
        return loss

    def accumulate(self, batches: Sequence[MicroBatch], seed: int, old_share: float, loss_fn: LossFn | None) -> Tensor:
        """Forward and backward that leaves old_share * (waiting gradients) + (1 - old_share) * (this batch's)."""
        borrow = old_share == 0
        planned, idle = self._plan_step([b.shape for b in batches], borrow), self._idle_bytes(borrow)
        buffers = [self.buffers.claim(b)[: size // self.buffers.dtype.itemsize] for b, size in enumerate(idle)]
        boundaries = self._activations.boundaries(planned, _num_tokens(batches), buffers)
        loss = self.executor.train(
            batches, self.version, boundaries, self._kept, seed=seed, recompute=planned.recompute, old_share=old_share,
            loss_fn=loss_fn,
        )  # fmt: skip
        with self.streams.waiting(Cause.link, "last gradient"):
            self._kept.wait()
        return loss

    def apply(self, lr: float, grad_scale: float) -> None:
        """Update all blocks from kept gradients."""
        self._kept.apply(self.version + 1, lr, grad_scale)
        self.version += 1

    def fail(self, error: BaseException) -> None:
        """The weights are of no use any more: whatever is asked next raises `error`."""
        self.store.ledger.fail(error)

    def raise_if_failed(self) -> None:
        """Raise the first failure of any thread, if there was one."""
        self.store.ledger.raise_if_failed()

    def gradient_norms(self) -> Tensor:
        """L2 norm of every trainable parameter's gradient, fp32 [parameters] on CPU, in the model's order."""
        assert self.executor.gradients is not None
        self.streams.timeline.enter(Cause.launch, "end of the step")
        norms = self.executor.gradients.norms.cpu()
        by_name = dict(zip(self._trainable_names(), norms, strict=True))
        return torch.stack([by_name[name] for name in self.model.parameter_names if name in by_name])

    def explain_non_finite(self, loss: float, batches: Sequence[MicroBatch]) -> str:
        """Where a loss or a gradient went wrong: the first block by a forward pass that looks, or the parameter."""
        if math.isfinite(loss):
            return f"the gradient of {self._first_bad_gradient()} is not finite (loss {loss:.4g})"
        block = self.guarded(lambda: self.executor.first_non_finite(batches, self.version))
        if block is None:
            return f"the loss is {loss}, though every block's output is finite; look at loss_fn and labels"
        return f"the loss is {loss}; block {self.model.layouts[block].name!r} is the first whose output is not finite"

    def _first_bad_gradient(self) -> str:
        """The parameter nearest the loss whose gradient is not finite."""
        assert self.executor.gradients is not None
        norms = self.executor.gradients.norms.cpu()
        bad = [name for name, norm in zip(self._trainable_names(), norms, strict=True) if not norm.isfinite()]
        return bad[-1] if bad else "no single parameter"

    def read_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(name, fp32 gradient as a new CPU tensor) of every trainable parameter, in the model's order."""
        for name in self.model.parameter_names:
            block, param = self.store.place(name)
            if param.spec.trainable:
                flat = self.buffers.claim(block)[param.offset : param.end]
                yield name, flat.to(torch.float32, copy=True).view(param.spec.shape)

    def wait_for_updates(self) -> None:
        """Return once every block has seen all optimizer steps."""
        for layout in self.model.layouts:
            self.store.ledger.wait(layout.index, self.version)

    def keep_fp32_gradients(self) -> None:
        """From now on gradients of all blocks wait on the host in fp32, so that several backwards can add up.

        Raises:
            BudgetError: the host budget does not allow 4 B/param of gradients.
        """
        if self.buffers.kept and self.buffers.dtype is torch.float32:
            return
        needs = dataclasses.replace(self._needs, grad_dtype=torch.float32, keeps_gradients=True)
        plan = plan_memory(needs, self.plan.limits)
        self._updater.wait()
        self.buffers.close()
        try:
            self.buffers = self._new_buffers(torch.float32, True)
            self.executor.use_buffers(self.buffers)
        except BaseException as error:
            self.fail(error)  # the old ones are gone
            raise
        self.plan, self._needs = plan, needs

    def guarded(self, work: Callable[[], T]) -> T:
        """Run device work; whatever fails, wait for what is in flight and forget the step."""
        try:
            with self.streams.entered():
                return work()
        except torch.cuda.OutOfMemoryError as error:
            self.executor.reset()
            raise BudgetError(
                f"the device ran out of memory ({str(error).splitlines()[0]}); use a smaller train.micro_batch, or "
                f"raise memory.device_budget ({format_bytes(self.plan.limits.device)})"
            ) from error
        except BaseException:
            self.executor.reset()
            raise

    def recorded(self, trace: Path | None, picture: Path | None) -> AbstractContextManager[Recording]:
        """See `horizon.report.recording.record_steps`."""
        names = [layout.name for layout in self.model.layouts]
        return record_steps(self.streams, names, least_traffic(self._needs), trace, picture)

    # ---- memory

    def plan_micro_batch(self, batch_size: int, seq_len: int, rows: int | None) -> int:
        """Rows per micro-batch for steps of `batch_size` rows, `rows` if given; the plan then includes activations."""
        limit = self.model.max_positions
        if limit is not None and seq_len > limit:
            raise ConfigError(f"train.seq_len={seq_len}, but the model has only {limit} positions")
        fixed, idle = self.plan.with_activations(()), self._idle_bytes(self.buffers.kept)
        rows = rows or self.guarded(
            lambda: self._activations.choose_rows(fixed, batch_size, seq_len, idle, self.version)
        )
        self._plan_step([(min(rows, batch_size - i), seq_len) for i in range(0, batch_size, rows)], self.buffers.kept)
        return rows

    def device_bytes(self) -> int:
        """Peak device memory of this process; on CPU the planned bytes of the stand-in."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device) + context_bytes(self.device)
        return self.plan.num_bytes("device")

    def close(self) -> None:
        """Stop the threads, then release memory. Idempotent."""
        self._release.close()

    def _abandon(self, step: int, error: BaseException) -> None:
        """A step whose updates begin inside has failed: nothing of it may be left, or the weights are lost."""
        self._streamed.finish()
        if num_updates := self._streamed.num_updates:
            self.fail(
                HorizonError(
                    f"step {step} failed when {num_updates} of {self.model.num_blocks} blocks had been updated "
                    f"({error!r}): load the last saved model; with optim.max_grad_norm set such a step can be repeated"
                )
            )

    def _plan_step(self, shapes: Sequence[tuple[int, int]], borrow: bool) -> ActivationPlan:
        """Where the activations of micro-batches of these (rows, tokens) go; `plan` then includes them."""
        fixed = self.plan.with_activations(())
        planned = self.guarded(lambda: self._activations.plan(fixed, shapes, self._idle_bytes(borrow), self.version))
        self.plan = fixed.with_activations(planned.lines)
        return planned

    def _idle_bytes(self, borrow: bool) -> list[int]:
        """Bytes of each block's kept gradient buffer, which activations may use until its gradient comes."""
        layouts = self.model.layouts if borrow else ()
        lent = {b.owner for layout in layouts for b in layout.borrowed}  # the head writes there before backward begins
        return [0 if lay.index in lent else lay.num_trainable * self.buffers.dtype.itemsize for lay in layouts]

    def _new_buffers(self, dtype: torch.dtype, kept: bool) -> GradientBuffers:
        if kept:
            return KeptGradients(self.model.layouts, dtype, self._pin)
        return RingGradients(self.model.layouts, dtype, self._pin, RING_BUFFERS)

    def _update_states(self, block: int) -> UpdateStates:
        return UpdateStates.of_tensors(**self.store.states(block), grads=self.buffers.claim(block))

    def _published(self, block: int) -> None:
        self.buffers.release(block)

    def _trainable_names(self) -> list[str]:
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
) -> Runtime:
    """Plan, allocate and load an engine's parts.

    Args:
        weights: folder to stream from, live model to copy from, or None for random values.

    Raises:
        HorizonError: by kind; nothing stays allocated.
    """
    if memory.weight_slots < 1:
        raise ConfigError(f"memory.weight_slots must be >= 1 (2 overlaps copy and compute), got {memory.weight_slots}")
    num_threads = default_num_threads() if memory.update_threads is None else memory.update_threads
    if num_threads < 1:
        raise ConfigError(f"memory.update_threads must be >= 1, got {num_threads}")
    target = resolve_device(device)
    dtype = _torch_dtype(compute_dtype, target)
    model = BlockModel(skeleton, freeze, choose_kernels(kernels, target) is Kernels.liger)
    prepare_device(target)
    model.to(target)
    recompute = choice(Recompute, memory.recompute, "memory.recompute")
    limits = memory_limits(memory, target)
    overhead = framework_bytes(target) + sum(b.nbytes for b in skeleton.buffers())
    needs = MemoryNeeds(
        model.layouts, dtype, dtype, keeps_gradients, memory.weight_slots, process_bytes(), overhead,
        Moments(optimizer.moments),
    )  # fmt: skip
    runtime = Runtime(model, plan_memory(needs, limits), needs, optimizer, target, num_threads, recompute, seed)
    try:
        runtime.load(weights, seed)
    except BaseException:
        runtime.close()
        raise
    return runtime


def _num_tokens(batches: Sequence[MicroBatch]) -> list[int]:
    return [rows * length for rows, length in (b.shape for b in batches)]


def _limit_device(device: torch.device, num_bytes: int) -> None:
    """Have torch's allocator keep to the budget, the CUDA context included."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        allowed = max(num_bytes - context_bytes(device), 1)
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), device)


def _lift_device_limit(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _torch_dtype(dtype: ComputeDtype, device: torch.device) -> torch.dtype:
    if dtype is ComputeDtype.auto:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if dtype is ComputeDtype.bfloat16 else torch.float32
