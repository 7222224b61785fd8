"""The running parts of a zeroth-order engine: built in order, used together, released in reverse.

    skeleton -> blocks -> plan -> masters -> slots and copies -> executor

It offers the engine what `horizon.runtime.Runtime` does, but gradients: there are none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from horizon.config.schema import ComputeDtype, Kernels, MemoryConfig
from horizon.errors import BatchError, ConfigError, HorizonError
from horizon.models.adapters import saved_config
from horizon.models.blocks import BlockModel
from horizon.models.kernels import choose_kernels
from horizon.plan.machine import (
    context_bytes,
    framework_bytes,
    host_overhead,
    lift_device_limit,
    limit_device,
    memory_limits,
    prepare_device,
    resolve_device,
)
from horizon.plan.memory import WEIGHT_SLOTS, MemoryPlan
from horizon.records import StepResult
from horizon.report.recording import Recording, record_steps
from horizon.stream.batch import MicroBatch, num_trained_tokens
from horizon.stream.guard import guard
from horizon.stream.head import LossFn, chunk_tokens
from horizon.stream.streams import Streams
from horizon.zo.copies import Copies
from horizon.zo.estimator import (
    History,
    StepRecord,
    are_finite,
    mean_loss,
    projected_gradients,
)
from horizon.zo.executor import ForwardExecutor
from horizon.zo.masters import Masters, states_of
from horizon.zo.measure import check_eps, measure_working_set
from horizon.zo.perturb import make_perturber
from horizon.zo.plan import (
    HEAD_CHUNK_BYTES,
    WorkingSet,
    ZerothOrderNeeds,
    choose_rows,
    least_traffic,
    plan_memory,
    refuse_what_has_no_use,
    with_activations,
)
from horizon.zo.relu import fuse_relu
from horizon.zo.replay import Beginning, ReplayLog, ReplayWriter, check_log, fingerprint, read_log
from horizon.zo.settings import ZerothOrder
from horizon.zo.slots import MasterSlots

T = TypeVar("T")
Write = Callable[[str, Tensor], None]
FLUSH_EVERY = 256  # steps of a log that one pass over the weights applies


@dataclass(frozen=True, slots=True)
class ZerothOrderOutcome:
    """What a step's losses gave."""

    loss: float
    projected_gradients: tuple[float, ...]
    applied: tuple[()] | None = ()  # None: a loss is not finite

    def result(self, num_tokens: int, seconds: float) -> StepResult:
        """What the caller of a step is told."""
        return StepResult(
            self.loss, math.nan, num_tokens, seconds, skipped=self.applied is None,
            projected_gradients=self.projected_gradients,
        )  # fmt: skip


class ZerothOrderRuntime:
    """See `build_zeroth_order`; the engine is its only user."""

    keeps_gradients = False

    def __init__(self, model: BlockModel, plan: MemoryPlan, needs: ZerothOrderNeeds, device: torch.device):
        self.model, self.plan, self.device, self.settings = model, plan, device, needs.settings
        self._needs, self._fixed = needs, plan
        self._working: dict[int, WorkingSet] = {}  # by tokens of a row
        self._failure: BaseException | None = None
        self._log: ReplayWriter | None = None
        self.beginning = Beginning("", (), needs.settings)
        self.history = History(needs.settings)
        self.records: list[StepRecord] = []
        with ExitStack() as release:  # in reverse, and all of it whatever fails
            release.callback(lift_device_limit, device)
            limit_device(device, plan.limits.device)
            self.store = Masters(model.layouts, needs.settings, pin=device.type == "cuda")
            release.callback(self.store.close)
            self.streams = Streams.on(device)
            slots = MasterSlots(self.streams, self.store, needs.num_slots, self._make_slot)
            copies = Copies(self.streams, model.layouts, needs.compute_dtype)
            chunk = chunk_tokens(model.vocab_size, HEAD_CHUNK_BYTES)
            self.executor = ForwardExecutor(
                model, slots, copies, make_perturber(model.layouts, needs.settings, device), self.history,
                self.streams, chunk, needs.settings.writeback_every,
            )  # fmt: skip
            release.callback(delattr, self, "executor")  # its slots
            release.callback(self.streams.synchronize)
            release.callback(self._close_log)
            self._release = release.pop_all()

    def _make_slot(self, num_elements: int) -> tuple[Tensor, ...]:
        return tuple(self.streams.empty(num_elements, dtype=state.dtype) for state in states_of(self.settings))

    @property
    def version(self) -> int:
        """Steps so far."""
        return self.history.version

    # ---- a step

    def run_step(
        self, batches: Sequence[MicroBatch], lr: float, seed: int, loss_fn: LossFn | None
    ) -> ZerothOrderOutcome:
        """A whole step: two forward passes a query. Its update is applied when blocks come up next.

        Args:
            seed: of dropout masks, which do not exist here.

        Raises:
            BatchError: `loss_fn` gave no number; names the step.
        """
        step = self.version + 1
        self._plan_step([batch.shape for batch in batches])
        try:
            sums = self.executor.losses(batches, self.settings.queries, loss_fn).tolist()
        except BatchError as error:
            raise BatchError(f"step {step}: {error}") from error
        losses = [total / num_trained_tokens(batches) for total in sums]
        projected = projected_gradients(losses, self.settings.eps)
        if not are_finite(losses):
            return ZerothOrderOutcome(mean_loss(losses), projected, applied=None)
        self._append(StepRecord(step, self.settings.seed, projected, lr))
        return ZerothOrderOutcome(mean_loss(losses), projected)

    def _append(self, record: StepRecord) -> None:
        """Have the weights see a step, measured just now or read from a log."""
        self.history.forget(min(self.store.versions))
        self.history.append(record)
        self.records.append(record)
        if self._log is not None:
            self._log.write(record)

    @property
    def log(self) -> ReplayLog:
        """See `Engine.replay_log`."""
        return ReplayLog(self.beginning, self.records)

    def log_steps(self, path: Path, model: str) -> None:
        """See `Engine.log_steps`."""
        self._close_log()
        self._log = ReplayWriter(path, ReplayLog(replace(self.beginning, model=model), self.records).text())

    def replay(self, path: Path) -> int:
        """See `Engine.replay`."""
        if self.version:
            raise HorizonError(f"replay after {self.version} steps: a log is replayed before any step is taken")
        log = read_log(path)
        check_log(log, self.beginning, path)
        for record in log.records:
            self._append(record)
            if record.step % FLUSH_EVERY == 0:
                self.wait_for_updates()
        self.wait_for_updates()
        return len(log.records)

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def explain_non_finite(self, loss: float, batches: Sequence[MicroBatch]) -> str:
        """Where a loss went wrong: at the weights themselves, or only beside them."""
        block = self.guarded(lambda: self.executor.first_non_finite(batches))
        if block is None:
            return (
                f"the loss is {loss}, though every block's output at the unperturbed weights is finite; look at "
                f"loss_fn and labels, or lower zo.eps={self.settings.eps}"
            )
        return f"the loss is {loss}; block {self.model.layouts[block].name!r} is the first whose output is not finite"

    def abandon_saves(self) -> None:
        """Nothing is being saved: the log is written as steps are taken."""

    def wait_for_updates(self) -> None:
        """Return once the host's weights have seen every step."""
        if min(self.store.versions) < self.version:
            self.guarded(self.executor.flush)

    def fail(self, error: BaseException) -> None:
        """The weights are of no use any more: whatever is asked next raises `error`."""
        self._failure = self._failure or error

    def raise_if_failed(self) -> None:
        """Raise what `fail` was given, if it was."""
        if self._failure is not None:
            raise self._failure

    def guarded(self, work: Callable[[], T]) -> T:
        """Run device work; whatever fails, forget it (`horizon.stream.guard`)."""
        return guard(self.streams, self.executor, self.plan.limits, work)

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
        working = self._working_set(seq_len, rows or batch_size)
        queries, size = self.settings.queries, self._token_bytes
        rows = rows or choose_rows(self._fixed, batch_size, seq_len, queries, size, working)
        shapes = [(min(rows, batch_size - i), seq_len) for i in range(0, batch_size, rows)]
        self.plan = with_activations(self._fixed, shapes, queries, size, working)
        return rows

    def device_bytes(self) -> int:
        """Peak device memory of this process; on CPU the planned bytes of the stand-in."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device) + context_bytes(self.device)
        return self.plan.num_bytes("device")

    def close(self) -> None:
        """Release memory. Idempotent."""
        self._release.close()

    @property
    def _token_bytes(self) -> int:
        return self.model.hidden_size * self._needs.compute_dtype.itemsize

    def _working_set(self, seq_len: int, rows: int) -> WorkingSet:
        if seq_len not in self._working:
            self._working[seq_len] = self.guarded(lambda: measure_working_set(self.executor, seq_len, rows))
        return self._working[seq_len]

    def _plan_step(self, shapes: Sequence[tuple[int, int]]) -> None:
        """The plan with this step's activations."""
        rows, seq_len = max(shapes, key=lambda shape: shape[0] * shape[1])
        working = self._working_set(seq_len, rows)
        self.plan = with_activations(self._fixed, shapes, self.settings.queries, self._token_bytes, working)


def of_zeroth_order(runtime: Any, what: str) -> ZerothOrderRuntime:
    """The runtime, or a HorizonError where it is not of zeroth order, which `what` needs."""
    if not isinstance(runtime, ZerothOrderRuntime):
        raise HorizonError(f"{what} needs an engine with horizon.ZerothOrder as its optimizer")
    return runtime


def require_gradients(runtime: T | ZerothOrderRuntime, what: str) -> T:
    """The runtime, or a HorizonError where it computes no gradients, which `what` needs."""
    if isinstance(runtime, ZerothOrderRuntime):
        raise HorizonError(f"{what}: zeroth-order steps compute no gradients; use step, or AdamW as the optimizer")
    return runtime


def build_zeroth_order(
    skeleton: Any,
    load: Callable[[Write, torch.device], None],
    *,
    settings: ZerothOrder,
    memory: MemoryConfig,
    device: str,
    compute_dtype: ComputeDtype,
    freeze: Sequence[str],
    kernels: Kernels,
) -> ZerothOrderRuntime:
    """Plan, allocate and load an engine's parts.

    Args:
        load: called once with (write, device): calls `write(name, tensor)` for every parameter.

    Raises:
        HorizonError: by kind; nothing stays allocated.
    """
    refuse_what_has_no_use(memory)
    target = resolve_device(device)
    dtype = settings.compute_dtype(compute_dtype, target)
    model = BlockModel(skeleton, freeze, choose_kernels(kernels, target) is Kernels.liger)
    prepare_device(target)
    model.to(target)
    if target.type == "cuda":
        fuse_relu(model)
    overhead = framework_bytes(target) + sum(b.nbytes for b in skeleton.buffers())
    slots = memory.weight_slots or WEIGHT_SLOTS
    needs = ZerothOrderNeeds(model.layouts, settings, dtype, slots, host_overhead(target), overhead)
    plan = plan_memory(needs, memory_limits(memory, target))
    runtime = ZerothOrderRuntime(model, plan, needs, target)
    try:
        load(runtime.store.write_master, target)
        check_eps(runtime.store, settings, dtype)
        found = fingerprint(runtime.store)
        runtime.beginning = Beginning(found, tuple(freeze), settings, adapter=saved_config(skeleton))
    except BaseException:
        runtime.close()
        raise
    return runtime
