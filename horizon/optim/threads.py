"""How many host threads the optimizer may use: the cores this process is allowed, but one."""

from __future__ import annotations

import os
from pathlib import Path

from horizon.cgroups import MEMBERSHIP, ROOT, group_folders, read


def default_num_threads() -> int:
    """All cores but one, which stays for the thread that drives the device; at least 1."""
    return max(available_cores() - 1, 1)


def available_cores() -> int:
    """Cores by scheduling affinity and, where a container limits processor time, by its cgroup (at least 1)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(int(min(allowed, _cgroup_cores(ROOT, MEMBERSHIP))), 1)


def _cgroup_cores(root: Path, membership: Path) -> float:
    """The tightest processor quota (in cores) of this process's cgroup and those above it; inf without one."""
    return min(map(_quota, group_folders("cpu", root, membership)), default=float("inf"))


def _quota(folder: Path) -> float:
    """Quota over period of one cgroup folder, of either version."""
    unified = read(folder / "cpu.max").split()
    quota, period = unified or (read(folder / "cpu.cfs_quota_us"), read(folder / "cpu.cfs_period_us"))
    if quota in ("", "max") or int(quota) <= 0:
        return float("inf")
    return int(quota) / int(period)
