"""The running parts of one engine: built in order, used together, released in reverse.

    skeleton -> blocks -> plan -> store -> executor -> updater

Everything that may be refused is refused by the plan, before the store is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from horizon.checkpoint.hf_import import import_weights
from horizon.config.schema import ComputeDtype, Kernels, MemoryConfig
from horizon.errors import BudgetError, ConfigError
from horizon.models.blocks import BlockModel
from horizon.models.kernels import choose_kernels
from horizon.models.skeleton import init_parameters
from horizon.optim.adamw import AdamW
from horizon.optim.clipping import Clipping
from horizon.optim.steps import StepOutcome, Steps
from horizon.optim.threads import default_num_threads
from horizon.optim.updater import Updater, UpdateStates
from horizon.plan.machine import (
    context_bytes,
    framework_bytes,
    memory_limits,
    prepare_device,
    process_bytes,
    resolve_device,
)
from horizon.plan.memory import (
    RING_BUFFERS,
    MemoryNeeds,
    MemoryPlan,
    WorkingSet,
    boundary_sizes,
    choose_micro_batch,
    plan_activations,
    plan_memory,
)
from horizon.store.gradients import GradientBuffers, KeptGradients, RingGradients
from horizon.store.host import HostStore
from horizon.store.offload import OffloadSpace
from horizon.stream.batch import MicroBatch
from horizon.stream.boundaries import Boundaries
from horizon.stream.executor import Executor, ExecutorSettings
from horizon.stream.head import LossFn, chunk_tokens
from horizon.stream.measure import measure_working_set, measured_rows
from horizon.stream.streams import Streams
from horizon.units import MIB, format_bytes

T = TypeVar("T")
HEAD_CHUNK_BYTES = 1024 * MIB  # fp32 logits that exist at once


class Runtime:
    """See `build_runtime`; the engine is its only user."""

    def __init__(
        self, model: BlockModel, plan: MemoryPlan, needs: MemoryNeeds, optimizer: AdamW, device: torch.device,
        num_threads: int, clipping: Clipping,
    ):  # fmt: skip
        self.model, self.plan, self.device = model, plan, device
        self._needs = needs
        self._pin = device.type == "cuda"
        self._working: dict[tuple[int, int], WorkingSet] = {}  # by tokens of a row, and rows
        with ExitStack() as release:  # in reverse, and all of it whatever fails
            release.callback(_lift_device_limit, device)
            _limit_device(device, plan.limits.device)
            self.store = HostStore(model.layouts, self._pin, needs.compute_dtype is torch.float32)
            release.callback(self.store.close)
            self.buffers: GradientBuffers = self._new_buffers(needs.grad_dtype, needs.keeps_gradients)
            release.callback(lambda: self.buffers.close())  # those of then: they may be exchanged
            self._offload = OffloadSpace(self._pin)
            release.callback(self._offload.close)
            self.streams = Streams.on(device)
            head_chunk = chunk_tokens(model.vocab_size, HEAD_CHUNK_BYTES)
            settings = ExecutorSettings(needs.compute_dtype, needs.weight_slots, head_chunk)
            self.executor = Executor(model, self.store, self.streams, settings)
            release.callback(delattr, self, "executor")  # its slots
            self.executor.use_buffers(self.buffers)
            release.callback(self.streams.synchronize)
            self._updater = Updater(
                model.layouts, self._update_states, self.store.ledger, optimizer, num_threads, self._published
            )
            release.callback(self._updater.close)
            self.store.ledger.on_failure(lambda error: self.buffers.fail(error))
            self._steps = Steps(
                lambda: self.executor, self._updater, self.store.ledger, clipping, norms=self.gradient_norms,
                release=self._published, kept=needs.keeps_gradients, weight_decay=optimizer.weight_decay,
            )  # fmt: skip
            self._release = release.pop_all()

    @property
    def version(self) -> int:
        """Optimizer steps that the weights have seen, those still under way included."""
        return self._steps.version

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

    def run_step(self, batches: Sequence[MicroBatch], lr: float, seed: int, loss_fn: LossFn | None) -> StepOutcome:
        """A whole step: forward, backward, and the update, which may run on behind."""
        return self._steps.run(batches, lambda: self._boundaries(batches, self.buffers.kept), lr, seed, loss_fn)

    def accumulate(self, batches: Sequence[MicroBatch], seed: int, old_share: float, loss_fn: LossFn | None) -> Tensor:
        """Forward and backward that leaves old_share * (waiting gradients) + (1 - old_share) * (this batch's)."""
        return self._steps.accumulate(batches, self._boundaries(batches, old_share == 0), seed, old_share, loss_fn)

    def apply(self, lr: float, loss: float) -> StepOutcome:
        """Clip and apply the gradients that `accumulate` has left; `loss` is theirs."""
        return self._steps.apply(lr, loss)

    def fail(self, error: BaseException) -> None:
        """The weights are of no use any more: whatever is asked next raises `error`."""
        self.store.ledger.fail(error)

    def raise_if_failed(self) -> None:
        """Raise the first failure of any thread, if there was one."""
        self.store.ledger.raise_if_failed()

    def gradient_norms(self) -> Tensor:
        """L2 norm of every trainable parameter's gradient, fp32 [parameters] on CPU, in the model's order."""
        assert self.executor.gradients is not None
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
        needs = MemoryNeeds(
            self._needs.layouts, self._needs.compute_dtype, torch.float32, True, self._needs.weight_slots,
            self._needs.host_overhead, self._needs.device_overhead,
        )  # fmt: skip
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
        self._steps.keep_gradients()

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

    # ---- memory

    def plan_micro_batch(self, batch_size: int, seq_len: int, rows: int | None) -> int:
        """Rows per micro-batch for steps of `batch_size` rows, `rows` if given; the plan then includes activations."""
        limit = self.model.max_positions
        if limit is not None and seq_len > limit:
            raise ConfigError(f"train.seq_len={seq_len}, but the model has only {limit} positions")
        working, idle = self._working_set(seq_len, rows or batch_size), self._idle_bytes(self.buffers.kept)
        fixed = self.plan.with_activations(())
        rows = rows or choose_micro_batch(fixed, batch_size, seq_len, self._token_bytes(), working, idle)
        tokens = [min(rows, batch_size - start) * seq_len for start in range(0, batch_size, rows)]
        self.plan = fixed.with_activations(plan_activations(fixed, tokens, self._token_bytes(), working, idle).lines)
        return rows

    def device_bytes(self) -> int:
        """Peak device memory of this process; on CPU the planned bytes of the stand-in."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device) + context_bytes(self.device)
        return self.plan.num_bytes("device")

    def close(self) -> None:
        """Stop the threads, then release memory. Idempotent."""
        self._release.close()

    def _boundaries(self, batches: Sequence[MicroBatch], borrow: bool) -> Boundaries:
        shapes = [b.shape for b in batches]
        tokens = [rows * length for rows, length in shapes]
        seq_len = max(length for _, length in shapes)
        working = self._working_set(seq_len, -(-max(tokens) // seq_len))
        idle = self._idle_bytes(borrow)
        fixed = self.plan.with_activations(())
        planned = plan_activations(fixed, tokens, self._token_bytes(), working, idle)
        self.plan = fixed.with_activations(planned.lines)
        if not planned.offloaded:
            return Boundaries(self.streams, {})
        sizes = boundary_sizes(planned.offloaded, tokens, self._token_bytes())
        buffers = [self.buffers.claim(b)[: size // self.buffers.dtype.itemsize] for b, size in enumerate(idle)]
        return Boundaries(self.streams, self._offload.regions(sizes, buffers))

    def _idle_bytes(self, borrow: bool) -> list[int]:
        """Bytes of each block's kept gradient buffer, which activations may use until its gradient comes."""
        layouts = self.model.layouts if borrow else ()
        lent = {b.owner for layout in layouts for b in layout.borrowed}  # the head writes there before backward begins
        return [0 if lay.index in lent else lay.num_trainable * self.buffers.dtype.itemsize for lay in layouts]

    def _working_set(self, seq_len: int, max_rows: int) -> WorkingSet:
        if self.device.type != "cuda":
            return WorkingSet(0, 0, 0)  # the stand-in has no memory of its own for kernels
        key = seq_len, measured_rows(seq_len, max_rows)
        if key not in self._working:
            self._working[key] = self.guarded(lambda: measure_working_set(self.executor, *key, self.version))
        return self._working[key]

    def _token_bytes(self) -> int:
        return self.model.hidden_size * self._needs.compute_dtype.itemsize

    def _new_buffers(self, dtype: torch.dtype, kept: bool) -> GradientBuffers:
        if kept:
            return KeptGradients(self.model.layouts, dtype, self._pin)
        return RingGradients(self.model.layouts, dtype, self._pin, RING_BUFFERS)

    def _update_states(self, block: int) -> UpdateStates:
        store, grads = self.store, self.buffers.claim(block)
        return UpdateStates.of_tensors(
            store.weights[block], store.residual[block], store.exp_avg[block], store.exp_avg_sq[block], grads
        )

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
    clipping: Clipping,
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
    limits = memory_limits(memory, target)
    overhead = framework_bytes(target) + sum(b.nbytes for b in skeleton.buffers())
    needs = MemoryNeeds(model.layouts, dtype, dtype, keeps_gradients, memory.weight_slots, process_bytes(), overhead)
    runtime = Runtime(model, plan_memory(needs, limits), needs, optimizer, target, num_threads, clipping)
    try:
        runtime.load(weights, seed)
    except BaseException:
        runtime.close()
        raise
    return runtime


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
