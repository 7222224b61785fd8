"""What this machine has to give: host memory under cgroup limits, device memory, this process's own use."""

from __future__ import annotations

import os

import psutil
import torch

from horizon.cgroups import memory_groups
from horizon.config.schema import ComputeDtype, MemoryConfig
from horizon.errors import ConfigError
from horizon.plan.cxl import NO_CXL, CxlTier
from horizon.plan.memory import Limits
from horizon.plan.topology import read_topology
from horizon.units import GIB, MIB, parse_bytes

TYPICAL_CONTEXT = 640 * MIB  # where it cannot be measured, because it existed before Horizon looked
ALLOCATOR_SLACK = 384 * MIB
LIBRARIES = (
    640 * MIB
)  # host memory that CUDA's libraries and compiled kernels take during the first steps (seen: 0.7 GiB)
HOST_MARGIN, HOST_MARGIN_SHARE = 256 * MIB, 0.02  # left to the kernel with a budget that it names
DISK_MARGIN = GIB  # left on the file system with memory.nvme_budget=auto
NO_LIMIT = 1 << 62  # version 1 writes about this where there is none
DEVICE_MARGIN = GIB // 2  # left for other users of the device and the allocator's rounding, with budget auto


def resolve_device(name: str) -> torch.device:
    """The device meant by `auto`, `cpu`, `cuda` or `cuda:1`.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} is no device; expected auto, cpu, cuda or cuda:<index>") from error
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index or 0
    if device.type != "cuda" or index >= count:
        raise ConfigError(f"device={name!r} is not available here: {count} CUDA devices; use device=cpu or auto")
    return torch.device("cuda", index)


def resolve_dtype(dtype: ComputeDtype, device: torch.device) -> torch.dtype:
    """What blocks compute in on `device`."""
    if dtype is ComputeDtype.auto:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if dtype is ComputeDtype.bfloat16 else torch.float32


def pins(device: torch.device) -> bool:
    """Whether what crosses the link to `device` should be registered with CUDA."""
    return device.type == "cuda"


_contexts: dict[int, int] = {}  # by device index: bytes of this process's CUDA context


def prepare_device(device: torch.device) -> None:
    """Create the CUDA context and measure it, with an allocator that does not fragment where it can be set."""
    if device.type != "cuda" or device.index in _contexts:
        return
    fresh = not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    before = _used_bytes(device) if fresh else None
    if hasattr(torch._C, "_accelerator_setAllocatorSettings"):  # also later: what is allocated from now on
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    torch.cuda.set_device(device)  # registering host memory makes a context on the current device
    # A backward, because autograd's own thread needs its context, too.
    torch.ones(1, device=device, requires_grad=True).sum().backward()  # type: ignore[no-untyped-call]
    after = _used_bytes(device)
    if before is None or after is None:
        _contexts[device.index] = TYPICAL_CONTEXT
    else:
        _contexts[device.index] = max(0, after - before - torch.cuda.memory_reserved(device))


def _used_bytes(device: torch.device) -> int | None:
    """Device memory in use by anyone, as NVML says, without creating a context; None where NVML is not available."""
    try:
        return int(torch.cuda.device_memory_used(device))
    except (ImportError, ModuleNotFoundError, RuntimeError, AssertionError):
        return None


def process_bytes() -> int:
    """Resident host memory of this process."""
    return int(psutil.Process().memory_info().rss)


def host_overhead(device: torch.device) -> int:
    """Host memory that goes to no state: what this process uses now, and what the device's libraries will add."""
    return process_bytes() + (LIBRARIES if device.type == "cuda" else 0)


def available_host_bytes() -> int:
    """Host memory this process may still take, the tighter of the system's and its cgroups'."""
    return min(int(psutil.virtual_memory().available), cgroup_room())


def host_memory_bytes() -> int:
    """All host memory of this machine, or what its cgroups let this process have of it."""
    limits = [group.limit for group in memory_groups()]
    return min([int(psutil.virtual_memory().total), *limits])


def cgroup_room() -> int:
    """Bytes below the tightest limit of this process's cgroups; huge without a limit."""
    return min((group.room for group in memory_groups()), default=NO_LIMIT)


def _host_limit(host_budget: str) -> int:
    """Bytes that the process may have, those that it uses already included."""
    if host_budget == "auto":
        return _less_margin(available_host_bytes() + process_bytes())
    if host_budget != "cgroup":
        return parse_bytes(host_budget, "memory.host_budget")
    if cgroup_room() >= NO_LIMIT:
        raise ConfigError(
            "memory.host_budget=cgroup, but no cgroup limits this process's memory; use auto or a size such as 100GiB"
        )
    return _less_margin(cgroup_room() + process_bytes())


def _less_margin(num_bytes: int) -> int:
    """What is left when the kernel has taken what no process is charged with: page tables, pinned pages' lists."""
    return max(0, num_bytes - max(HOST_MARGIN, int(num_bytes * HOST_MARGIN_SHARE)))


def _dram_of(available: int, cxl: CxlTier) -> int:
    """What of the available memory is the dram tier's."""
    if cxl.dram_nodes:
        available = min(available, read_topology().free_bytes(cxl.dram_nodes) + process_bytes())
    return max(0, available - cxl.num_bytes) if cxl.simulated else available


def memory_limits(memory: MemoryConfig, device: torch.device, cxl: CxlTier = NO_CXL) -> Limits:
    """Budgets in bytes; `auto` is what is available now, this process's own use included, and no other tier's.

    Raises:
        ConfigError: a budget is no size, or memory.nvme_dir no folder that can be written to.
    """
    host, nvme = _host_limit(memory.host_budget), nvme_bytes(memory)
    if memory.host_budget == "auto":
        host = _dram_of(host, cxl)
    if memory.device_budget != "auto":
        return Limits(host, parse_bytes(memory.device_budget, "memory.device_budget"), nvme=nvme, cxl=cxl)
    if device.type == "cpu":
        return Limits(host, _dram_of(available_host_bytes() + process_bytes(), cxl), nvme=nvme, cxl=cxl)
    free, total = torch.cuda.mem_get_info(device)
    return Limits(host, min(total, free + context_bytes(device)) - DEVICE_MARGIN, nvme=nvme, cxl=cxl)


def nvme_bytes(memory: MemoryConfig) -> int:
    """Bytes that states on nvme may take; 0 without a folder.

    Raises:
        ConfigError: memory.nvme_dir is no folder that can be written to, or a budget has no folder.
    """
    folder, budget = memory.nvme_dir, memory.nvme_budget
    if folder is None:
        if budget != "auto":
            raise ConfigError(f"memory.nvme_budget={budget} without memory.nvme_dir; set the folder it is meant for")
        return 0
    if not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        raise ConfigError(f"memory.nvme_dir={folder} is not a folder that can be written to; create it, or set another")
    if budget != "auto":
        return parse_bytes(budget, "memory.nvme_budget")
    found = os.statvfs(folder)
    return max(0, found.f_bavail * found.f_frsize - DISK_MARGIN)


def free_device_bytes(device: torch.device) -> int | None:
    """Device memory that no other process uses, learnt without a CUDA context; None where NVML is not available."""
    own = TYPICAL_CONTEXT if torch.cuda.is_initialized() else 0  # type: ignore[no-untyped-call]
    used = _used_bytes(device)
    total = int(torch.cuda.get_device_properties(device).total_memory)
    return None if used is None else min(total, total - used + own)


def context_bytes(device: torch.device) -> int:
    """Device memory that this process holds outside of torch's allocator: the CUDA context; 0 on CPU."""
    return _contexts.get(device.index, 0) if device.type == "cuda" else 0


def limit_device(device: torch.device, num_bytes: int) -> None:
    """Have torch's allocator keep to the budget, the CUDA context included."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        allowed = max(num_bytes - context_bytes(device), 1)
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), device)


def lift_device_limit(device: torch.device) -> None:
    """Undo `limit_device`, and give back what the allocator keeps."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def framework_bytes(device: torch.device) -> int:
    """Device memory that goes to no block: the CUDA context, and what the allocator loses to rounding; 0 on CPU."""
    return context_bytes(device) + ALLOCATOR_SLACK if device.type == "cuda" else 0
