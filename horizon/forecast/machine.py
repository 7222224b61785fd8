"""The machine that a forecast is for: this one, or one that a file describes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from horizon.config.schema import ComputeDtype, Kernels, MemoryConfig, NvmeEngine, Policy
from horizon.errors import ConfigError
from horizon.models.kernels import choose_kernels
from horizon.optim.device import can_update
from horizon.plan.cost import DiskRates
from horizon.plan.cxl import CxlTier, read_cxl, wants_cxl
from horizon.plan.estimate import typical_process
from horizon.plan.facts import MachineFacts
from horizon.plan.machine import (
    ALLOCATOR_SLACK,
    DEVICE_MARGIN,
    TYPICAL_CONTEXT,
    free_device_bytes,
    memory_limits,
    nvme_bytes,
    resolve_device,
    resolve_dtype,
)
from horizon.plan.memory import Limits
from horizon.plan.topology import Topology, read_topology
from horizon.store.speed import SAMPLE, probe_disk
from horizon.units import GIB, parse_bytes

SYSTEM_BYTES = 2 * GIB  # of a machine's memory that a run does not get, where nobody can look: the system's own


@dataclass(frozen=True, slots=True)
class Target:
    """Where an engine would run."""

    facts: MachineFacts
    device: torch.device
    here: bool  # on this machine, whose memory is looked at; else all of it is free
    host_overhead: int  # host bytes of a training process that go to no state

    @property
    def on_gpu(self) -> bool:
        """Blocks compute on a GPU."""
        return self.device.type == "cuda"

    @property
    def device_overhead(self) -> int:
        """Device bytes that go to no block."""
        return TYPICAL_CONTEXT + ALLOCATOR_SLACK if self.on_gpu else 0

    @property
    def can_update(self) -> bool:
        """Whether blocks in device memory can be updated there."""
        return can_update(self.device) if self.here else True

    def cxl(self, memory: MemoryConfig) -> CxlTier:
        """The cxl tier that the settings ask for: of nodes found here, or as a machine file describes it.

        Raises:
            ConfigError: the machine does not have it.
        """
        if self.here:
            return read_cxl(memory, read_topology())
        if not wants_cxl(memory) or memory.cxl_simulated.size is not None:
            return read_cxl(memory, Topology(()))
        if "cxl" not in self.facts.tiers or memory.cxl_nodes != "auto":
            raise ConfigError(
                f"memory.policy={memory.policy} on {self.facts.name!r}, whose file describes no NUMA nodes: leave "
                "memory.cxl_nodes at auto and give the file a tier cxl"
            )
        size = self.facts.tiers["cxl"].num_bytes
        if memory.cxl_budget != "auto":
            size = parse_bytes(memory.cxl_budget, "memory.cxl_budget")
        policy = memory.policy
        return CxlTier(size, interleaved=policy is Policy.interleave, boundaries=policy is Policy.cxl_aware)

    @property
    def has_cxl(self) -> bool:
        """Whether the machine has memory for a cxl tier, stand-ins apart."""
        try:
            return self.cxl(MemoryConfig(policy=Policy.cxl_aware)).num_bytes > 0
        except ConfigError:
            return False

    def limits(self, memory: MemoryConfig) -> Limits:
        """Budgets in bytes, `auto` filled in."""
        cxl = self.cxl(memory)
        if self.here and not self.on_gpu:
            return memory_limits(memory, self.device, cxl)
        host = max(self.facts.host_bytes - SYSTEM_BYTES, self.facts.host_bytes // 2)
        if self.here:
            host = memory_limits(memory, torch.device("cpu"), cxl).host
        elif memory.host_budget != "auto":
            host = parse_bytes(memory.host_budget, "memory.host_budget")
        return Limits(host, self._device_limit(memory, host), nvme=self._nvme_limit(memory), cxl=cxl)

    def _nvme_limit(self, memory: MemoryConfig) -> int:
        if self.here:
            return nvme_bytes(memory)
        if memory.nvme_dir is not None and memory.nvme_budget != "auto":
            return parse_bytes(memory.nvme_budget, "memory.nvme_budget")
        disk = self.facts.tiers.get("nvme")
        return 0 if memory.nvme_dir is None or disk is None else disk.num_bytes

    def disk(self, memory: MemoryConfig) -> DiskRates | None:
        """The speed of states on nvme: tried in the folder here, or as a machine file has it; None: not known."""
        if self.here and memory.nvme_dir is not None:
            return probe_disk(memory.nvme_dir, NvmeEngine(memory.nvme_engine), min(SAMPLE, self._nvme_limit(memory)))
        disk = None if self.here else self.facts.tiers.get("nvme")
        return None if disk is None else DiskRates(disk.read_bytes_per_s, disk.write_bytes_per_s)

    def _device_limit(self, memory: MemoryConfig, host: int) -> int:
        if memory.device_budget != "auto":
            return parse_bytes(memory.device_budget, "memory.device_budget")
        if not self.on_gpu or self.facts.device is None:
            return host
        free = free_device_bytes(self.device) if self.here else None
        return (self.facts.device.num_bytes if free is None else free) - DEVICE_MARGIN

    def dtype(self, compute_dtype: ComputeDtype) -> torch.dtype:
        """What blocks would compute in."""
        return resolve_dtype(compute_dtype, self.device)

    def fused(self, kernels: Kernels) -> bool:
        """Whether Liger's kernels would run; a machine elsewhere has them where it has a GPU.

        Raises:
            ConfigError: they were asked for and cannot run.
        """
        if not self.here and self.on_gpu:
            return kernels is not Kernels.torch
        return choose_kernels(kernels, self.device) is Kernels.liger


def target_of(facts: MachineFacts, device: str, here: bool, host_overhead: int | None = None) -> Target:
    """Where an engine with this `device` setting would run.

    Args:
        host_overhead: of the process that would train; None: of a typical one.

    Raises:
        ConfigError: the machine has no such device.
    """
    place = resolve_device(device) if here else _elsewhere(facts, device)
    return Target(facts, place, here, typical_process(place.type == "cuda") if host_overhead is None else host_overhead)


def _elsewhere(facts: MachineFacts, device: str) -> torch.device:
    if device == "cpu" or (device == "auto" and facts.device is None):
        return torch.device("cpu")
    if facts.device is None or device not in ("auto", "cuda", "cuda:0"):
        found = "no GPU" if facts.device is None else "one GPU"
        raise ConfigError(f"device={device!r}, but the machine {facts.name!r} has {found}; use device=auto")
    return torch.device("cuda", 0)
