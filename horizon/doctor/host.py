"""Checks of the host: memory and its limits, huge pages, cores, the optimizer's kernel, the disk in this folder."""

from __future__ import annotations

import contextlib
import importlib.util
import mmap
import os
import resource
import shutil
import tempfile
from pathlib import Path

import torch

from horizon.doctor.device import REGISTERED, registers
from horizon.doctor.finding import Finding, ok, warn
from horizon.forecast.here import measured_threads
from horizon.optim.threads import available_cores, default_num_threads
from horizon.plan.facts import AS_FAST
from horizon.plan.machine import available_host_bytes, host_memory_bytes
from horizon.plan.topology import read_topology
from horizon.store.numa import bindable
from horizon.units import GIB, format_bytes

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
CPU_FLAGS = Path("/proc/cpuinfo")
BLOCK = 4096  # bytes that direct I/O is aligned to
FEW_CORES = 4  # with fewer, the optimizer has one or two
LITTLE = 8 * GIB  # of host memory or disk: enough for small models only


def check_memory() -> Finding:
    """Host memory that a run may take now."""
    available, total = available_host_bytes(), host_memory_bytes()
    found = f"{format_bytes(available)} of {format_bytes(total)} available"
    if available < min(LITTLE, total // 2):
        return warn("host memory", found, "stop other processes, or raise the container's limit")
    return ok("host memory", found)


def check_cores() -> Finding:
    """Cores that this process is allowed."""
    cores, others = available_cores(), (os.cpu_count() or 0) - available_cores()
    threads, why = measured_threads(), f"as fast as any, within {AS_FAST:.0%}"
    if threads is None:
        threads, why = default_num_threads(), "all but one"
        why += "; horizon doctor --measure may find fewer as fast" if threads > 1 else ""
    found = f"{cores} cores, {threads} of them for the optimizer ({why})"
    if cores < FEW_CORES:
        more = f"allow the process the machine's other {others}" if others > 0 else "use a machine with more cores"
        return warn("cores", found, f"{more}: the optimizer's update runs on them")
    return ok("cores", found)


def check_numa() -> Finding:
    """NUMA nodes, which of them have memory only, and whether pages can be put on one of them."""
    nodes = read_topology().nodes
    if not nodes:
        return ok("numa", "the kernel tells of no nodes")
    bare = [f"node{node.id}" for node in nodes if node.memory_only]
    without = f"; memory only: {', '.join(bare)}" if bare else ""
    found = f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}{without}"
    if len(nodes) > 1 and not bindable():
        fix = "give the container the capability SYS_NICE; until then states lie where the kernel puts them"
        return warn("numa", f"{found}; this process may not choose among them", fix)
    return ok("numa", found)


def check_huge_pages() -> Finding:
    """Whether states can lie on huge pages."""
    text = _read(HUGE_PAGES)
    chosen = text.partition("[")[2].partition("]")[0]
    if chosen in ("always", "madvise"):
        return ok("huge pages", f"transparent huge pages: {chosen}")
    fix = f"echo madvise > {HUGE_PAGES} (as root): states then take fewer page table entries"
    return warn("huge pages", f"transparent huge pages: {chosen or 'not known to this kernel'}", fix)


def check_memlock() -> Finding:
    """The limit on locked memory, which registration with CUDA may count against."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY or limit >= host_memory_bytes():
        return ok("memlock", "no limit below the host's memory")
    found = f"at most {format_bytes(limit)} may be locked"
    if not torch.cuda.is_available():
        return ok("memlock", f"{found}; without a GPU nothing is")
    if limit < REGISTERED and registers():
        return ok("memlock", f"{found}, which CUDA does not keep to: it registers {format_bytes(REGISTERED)}")
    return warn("memlock", f"{found}, and CUDA may keep to it", "ulimit -l unlimited, or the container's memlock limit")


def check_update_kernel() -> Finding:
    """Which code updates parameters on the host, and why."""
    flags = next((line for line in _read(CPU_FLAGS).splitlines() if line.startswith(("flags", "Features"))), "").split()
    isa = next((name for name in ("avx512f", "avx2", "asimd") if name in flags), "no wide vectors")
    try:
        import numba

        import horizon.optim.kernel  # noqa: F401  # as an update would
    except (ImportError, OSError) as error:  # OSError: llvmlite's library does not load
        fix = "reinstall numba; until then updates are about ten times slower"
        return warn("update kernel", f"torch's own operations, because numba cannot be imported: {error}", fix)
    found = f"numba {numba.__version__}, for a CPU with {isa}"
    if isa == "no wide vectors":
        return warn("update kernel", found, "use a CPU with AVX2, AVX-512 or ASIMD")
    return ok("update kernel", found)


def check_fused_kernels() -> Finding | None:
    """Triton updates blocks in device memory, Liger fuses layers' small kernels; both are for a GPU."""
    if not torch.cuda.is_available():
        return None
    missing = [name for name in ("triton", "liger_kernel") if importlib.util.find_spec(name) is None]
    if missing:
        fix = "pip install 'horizon[gpu]'"
        return warn("fused kernels", f"missing: {', '.join(missing)}", fix)
    return ok("fused kernels", "triton and liger_kernel are installed")


def check_disk() -> Finding:
    """Free space here, and whether the file system takes direct I/O."""
    folder = Path.cwd()
    try:
        free = shutil.disk_usage(folder).free
        direct = _takes_direct_io(folder)
    except OSError as error:
        return warn("disk", f"nothing can be written here: {error.strerror}", "start from a folder that can be written")
    found = f"{format_bytes(free)} free here, direct I/O {'works' if direct else 'is refused'}"
    if free < LITTLE:
        return warn("disk", found, "free some space, or start from a folder on another disk")
    if not direct:
        return warn("disk", found, "start from a folder on a local disk (ext4, xfs): states on disk need it")
    return ok("disk", found)


def _takes_direct_io(folder: Path) -> bool:
    """Whether a block can be written past the page cache.

    Raises:
        OSError: the folder cannot be written to.
    """
    handle, name = tempfile.mkstemp(dir=folder, prefix=".horizon-doctor-")
    os.close(handle)
    try:
        direct = os.open(name, os.O_WRONLY | getattr(os, "O_DIRECT", 0))
        with mmap.mmap(-1, BLOCK) as block, contextlib.closing(os.fdopen(direct, "wb", buffering=0)) as file:
            file.write(block)
        return hasattr(os, "O_DIRECT")
    except OSError:
        return False
    finally:
        os.unlink(name)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
