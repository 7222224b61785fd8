"""The running parts of an engine whose weights stay as they are: weights on their tiers, and slots to compute in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch

from horizon.checkpoint.hf_import import load_weights
from horizon.config.schema import ComputeDtype, Kernels, MasterFormat, MemoryConfig
from horizon.models.blocks import BlockModel
from horizon.models.kernels import choose_kernels
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
from horizon.plan.memory import WEIGHT_SLOTS, MemoryNeeds, MemoryPlan, plan_memory
from horizon.plan.placement import read_policy, unknown_activations
from horizon.plan.refusals import check_memory
from horizon.store.cxl import find_cxl
from horizon.store.host import HostStore
from horizon.stream.forward import ForwardPasses, Visits
from horizon.stream.guard import guard
from horizon.stream.head import HEAD_CHUNK_BYTES, HeadLoss, chunk_bytes, chunk_tokens
from horizon.stream.slots import WeightSlots
from horizon.stream.streams import Streams

T = TypeVar("T")


class FrozenExecutor(ForwardPasses):
    """Runs blocks on the device, forward only."""

    def __init__(self, model: BlockModel, weights: WeightSlots, streams: Streams, head_chunk: int):
        super().__init__(model, HeadLoss(model, head_chunk))
        self._weights, self._streams = weights, streams

    def visits(self, version: int, blocks: Sequence[int] | None = None) -> Visits:
        """All blocks in order, or only `blocks`; loading begins at once."""
        return self._weights.visits(range(self._model.head + 1) if blocks is None else blocks, version)

    def reset(self) -> None:
        """After a failed pass: wait for what is in flight, then forget it."""
        self._streams.synchronize()
        self._weights.reset()


class FrozenRuntime:
    """See `build_frozen`; the engine is its only user."""

    version = 0  # steps that the weights have seen

    def __init__(
        self, model: BlockModel, plan: MemoryPlan, needs: MemoryNeeds, device: torch.device, memory: MemoryConfig
    ):
        self.model, self.plan, self.device = model, plan, device
        with ExitStack() as release:  # in reverse, and all of it whatever fails
            release.callback(lift_device_limit, device)
            limit_device(device, plan.limits.device)
            self.store = HostStore(
                model.layouts, pins(device), needs.compute_dtype is torch.float32, device, needs.in_hbm,
                master=needs.master, placed=needs.placed, nvme_dir=memory.nvme_dir, nvme_engine=memory.nvme_engine,
                nodes=needs.nodes,
            )  # fmt: skip
            release.callback(self.store.close)
            self.streams = Streams.on(device)
            head_chunk = chunk_tokens(model.vocab_size, chunk_bytes(HEAD_CHUNK_BYTES, plan.limits.device))
            slots = WeightSlots(self.streams, self.store, needs.weight_slots, needs.compute_dtype)
            self.executor = FrozenExecutor(model, slots, self.streams, head_chunk)
            release.callback(delattr, self, "executor")  # its slots
            release.callback(self.streams.synchronize)
            self._release = release.pop_all()

    def guarded(self, work: Callable[[], T]) -> T:
        """Run device work; whatever fails, forget it (`horizon.stream.guard`)."""
        return guard(self.streams, self.executor, self.plan.limits, work)

    def raise_if_failed(self) -> None:
        """Raise the first failure of any thread, if there was one."""
        self.store.ledger.raise_if_failed()

    def device_bytes(self) -> int:
        """Peak device memory of this process; on CPU the planned bytes of the stand-in."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device) + context_bytes(self.device)
        return self.plan.num_bytes("device")

    def close(self) -> None:
        """Release memory. Idempotent."""
        self._release.close()


def build_frozen(
    skeleton: Any, weights: Any, *, memory: MemoryConfig, device: str, compute_dtype: ComputeDtype, kernels: Kernels,
    seed: int,
) -> FrozenRuntime:  # fmt: skip
    """Plan, allocate and load a model of which nothing is trained.

    The host keeps what blocks compute with and nothing else: 2 bytes a parameter in bfloat16, 4 in float32.

    Args:
        weights: as `load_weights` takes them.

    Raises:
        HorizonError: by kind; nothing stays allocated.
    """
    check_memory(memory)
    target = resolve_device(device)
    dtype = resolve_dtype(compute_dtype, target)
    model = BlockModel(skeleton, fused=choose_kernels(kernels, target) is Kernels.liger, trains=False)
    prepare_device(target)
    model.to(target)
    cxl = find_cxl(memory)
    limits = memory_limits(memory, target, cxl)
    overhead = framework_bytes(target) + sum(b.nbytes for b in skeleton.buffers())
    master = MasterFormat.split if dtype is torch.float32 else MasterFormat.bf16_stochastic
    needs = MemoryNeeds(
        model.layouts, dtype, dtype, False, memory.weight_slots or WEIGHT_SLOTS, host_overhead(target), overhead,
        master=master, cxl=cxl,
    )  # fmt: skip
    placer = read_policy(memory, target, True, model.num_blocks)  # nothing is updated: any block may be in HBM
    needs = placer.place(needs, limits, unknown_activations(limits))
    runtime = FrozenRuntime(model, plan_memory(needs, limits), needs, target, memory)
    try:
        load_weights(weights, skeleton, runtime.store.write_master, target, seed)
    except BaseException:
        runtime.close()
        raise
    return runtime
