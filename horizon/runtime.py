"""The running parts of one engine: built in order, used together, released in reverse.

    skeleton -> blocks -> plan -> store -> executor -> updater

Everything that may be refused is refused by the plan, before the store is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from horizon.optim.apply import KeptUpdates, StreamedUpdates
from horizon.optim.threads import default_num_threads
from horizon.optim.updater import Updater, UpdateStates
from horizon.plan.machine import context_bytes, memory_limits, prepare_device, process_bytes, resolve_device
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
from horizon.stream.measure import measure_working_set
from horizon.stream.streams import Streams
from horizon.units import MIB, format_bytes

T = TypeVar("T")
HEAD_CHUNK_BYTES = 1024 * MIB  # fp32 logits that exist at once


class Runtime:
    """See `build_runtime`; the engine is its only user."""

    def __init__(
        self, model: BlockModel, plan: MemoryPlan, needs: MemoryNeeds, optimizer: AdamW, device: torch.device,
        num_threads: int,
    ):  # fmt: skip
        self.model, self.plan, self.device = model, plan, device
        self._needs = needs
        self._pin = device.type == "cuda"
        self._working: dict[int, WorkingSet] = {}
        self._version = 0  # of the weights the next pass computes with
        self._context_bytes = needs.device_overhead
        self.store = HostStore(model.layouts, self._pin, needs.compute_dtype is torch.float32)
        try:
            self.streams = Streams.on(device)
            self._offload = OffloadSpace(self._pin)
            head_chunk = chunk_tokens(model.vocab_size, HEAD_CHUNK_BYTES)
            settings = ExecutorSettings(needs.compute_dtype, needs.weight_slots, head_chunk)
            self.executor = Executor(model, self.store, self.streams, settings)
            self.buffers: GradientBuffers = self._new_buffers(needs.grad_dtype, needs.keeps_gradients)
            self.executor.use_buffers(self.buffers)
            self._updater = Updater(
                model.layouts, self._update_states, self.store.ledger, optimizer, num_threads, self._published
            )
            self.store.ledger.on_failure(lambda error: self.buffers.fail(error))
            self._kept = KeptUpdates(self._updater)
            self._streamed = StreamedUpdates(self._updater, self.buffers, self.store.ledger)
        except BaseException:
            self.store.close()
            raise

    @property
    def keeps_gradients(self) -> bool:
        """Gradients stay readable after a backward."""
        return self.buffers.kept

    def load(self, weights: Any, seed: int) -> None:
        """Fill the store: from a folder, from a live model, or (None) with random values."""
        if isinstance(weights, Path):
            import_weights(weights, self.model.skeleton, self.store.write_master)  # type: ignore[arg-type]
            return
        if weights is not None:
            for name, parameter in weights.named_parameters():
                self.store.write_master(name, parameter)
            return
        for name, value in init_parameters(self.model.skeleton, device=self.device, seed=seed):  # type: ignore[arg-type]
            self.store.write_master(name, value)

    # ---- a step

    def run_step(
        self, batches: Sequence[MicroBatch], version: int, lr: float, seed: int, loss_fn: LossFn | None
    ) -> Tensor:
        """Forward and backward; without clipping, updates begin inside. Returns the loss on the device."""
        boundaries = self._boundaries(batches, borrow=self.buffers.kept)
        if self.buffers.kept:
            loss = self.executor.train(batches, version, boundaries, self._kept, seed=seed, loss_fn=loss_fn)
            self._kept.wait()
            return loss
        self._streamed.begin(version + 1, lr)
        try:
            return self.executor.train(batches, version, boundaries, self._streamed, seed=seed, loss_fn=loss_fn)
        finally:
            self._streamed.finish()

    def accumulate(
        self, batches: Sequence[MicroBatch], version: int, seed: int, old_share: float, loss_fn: LossFn | None
    ) -> Tensor:
        """Forward and backward that leaves old_share * (waiting gradients) + (1 - old_share) * (this batch's)."""
        boundaries = self._boundaries(batches, borrow=old_share == 0)
        loss = self.executor.train(
            batches, version, boundaries, self._kept, seed=seed, old_share=old_share, loss_fn=loss_fn
        )
        self._kept.wait()
        return loss

    def apply(self, step: int, lr: float, grad_scale: float) -> None:
        """Update all blocks from kept gradients; gradients that streamed have been applied already."""
        self._version = step
        if self.buffers.kept:
            self._kept.apply(step, lr, grad_scale)

    def gradient_norms(self) -> Tensor:
        """L2 norm of every trainable parameter's gradient, fp32 [parameters] on CPU, in the model's order."""
        assert self.executor.gradients is not None
        norms = self.executor.gradients.norms.cpu()
        by_name = dict(zip(self._trainable_names(), norms, strict=True))
        return torch.stack([by_name[name] for name in self.model.parameter_names if name in by_name])

    def first_bad_gradient(self) -> str:
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

    def wait_for_updates(self, version: int) -> None:
        """Return once every block has seen `version` optimizer steps."""
        for layout in self.model.layouts:
            self.store.ledger.wait(layout.index, version)

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
        self.plan, self._needs = plan_memory(needs, self.plan.limits), needs
        self._updater.wait()
        self.buffers.close()
        self.buffers = self._new_buffers(torch.float32, True)
        self.executor.use_buffers(self.buffers)

    def guarded(self, work: Callable[[], T]) -> T:
        """Run device work; whatever fails, wait for what is in flight and forget the step."""
        try:
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

    def plan_micro_batch(self, batch_size: int, seq_len: int) -> int:
        """Rows per micro-batch for steps of `batch_size` rows."""
        working, idle = self._working_set(seq_len), self._idle_bytes(self.buffers.kept)
        fixed = self.plan.with_activations(())
        return choose_micro_batch(fixed, batch_size, seq_len, self._token_bytes(), working, idle)

    def device_bytes(self) -> int:
        """Peak device memory of this process; on CPU the planned bytes of the stand-in."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device) + self._context_bytes
        return self.plan.num_bytes("device")

    def close(self) -> None:
        """Stop the threads, then release memory; in this order."""
        self._updater.close()
        self.streams.synchronize()
        del self.executor
        self._offload.close()
        self.buffers.close()
        self.store.close()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)

    def _boundaries(self, batches: Sequence[MicroBatch], borrow: bool) -> Boundaries:
        shapes = [b.shape for b in batches]
        tokens = [rows * length for rows, length in shapes]
        working = self._working_set(max(length for _, length in shapes))
        idle = self._idle_bytes(borrow)
        fixed = self.plan.with_activations(())
        planned = plan_activations(fixed, tokens, self._token_bytes(), working, idle)
        self.plan = fixed.with_activations(planned.lines)
        if not planned.offloaded:
            return Boundaries(self.streams, {})
        sizes = boundary_sizes(planned.offloaded, tokens, self._token_bytes())
        buffers = [self.buffers.claim(block) for block in range(len(idle))]
        return Boundaries(self.streams, self._offload.regions(sizes, buffers))

    def _idle_bytes(self, borrow: bool) -> list[int]:
        """Bytes of each block's kept gradient buffer, which activations may use until its gradient comes."""
        layouts = self.model.layouts if borrow else ()
        lent = {b.owner for layout in layouts for b in layout.borrowed}  # the head writes there before backward begins
        return [0 if lay.index in lent else lay.num_trainable * self.buffers.dtype.itemsize for lay in layouts]

    def _working_set(self, seq_len: int) -> WorkingSet:
        if self.device.type != "cuda":
            return WorkingSet(0, 0, 0)  # the stand-in has no memory of its own for kernels
        if seq_len not in self._working:
            self._working[seq_len] = self.guarded(lambda: measure_working_set(self.executor, seq_len, self._version))
        return self._working[seq_len]

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
    overhead = context_bytes(target) + sum(b.nbytes for b in skeleton.buffers())
    needs = MemoryNeeds(model.layouts, dtype, dtype, keeps_gradients, memory.weight_slots, process_bytes(), overhead)
    plan = plan_memory(needs, limits)
    if target.type == "cuda":
        total = torch.cuda.get_device_properties(target).total_memory
        allowed = limits.device - context_bytes(target)
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(allowed, 1) / total), target)
    runtime = Runtime(model, plan, needs, optimizer, target, num_threads)
    try:
        runtime.load(weights, seed)
    except BaseException:
        runtime.close()
        raise
    return runtime


def _torch_dtype(dtype: ComputeDtype, device: torch.device) -> torch.dtype:
    if dtype is ComputeDtype.auto:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if dtype is ComputeDtype.bfloat16 else torch.float32
