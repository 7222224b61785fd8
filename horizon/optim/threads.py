"""How many host threads the optimizer may use: the cores this process is allowed, but one."""

from __future__ import annotations

import os
from pathlib import Path


def default_num_threads() -> int:
    """All cores but one, which stays for the thread that drives the device; at least 1."""
    return max(available_cores() - 1, 1)


def available_cores() -> int:
    """Cores by scheduling affinity and, where a container limits processor time, by its cgroup (at least 1)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(int(min(allowed, _cgroup_cores(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")))), 1)


def _cgroup_cores(root: Path, membership: Path) -> float:
    """The tightest processor quota (in cores) of this process's cgroup and those above it; inf without one."""
    limits = [float("inf")]
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "cpu" if controllers else root  # version 1 mounts each controller in a folder of its own
        here = base / path.lstrip("/")
        for folder in (here, *here.parents):
            if not folder.is_relative_to(base):
                break
            limits.append(_quota(folder))
    return min(limits)


def _quota(folder: Path) -> float:
    """Quota over period of one cgroup folder, of either version."""
    unified = _read(folder / "cpu.max").split()
    quota, period = unified or (_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))
    if quota in ("", "max") or int(quota) <= 0:
        return float("inf")
    return int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
