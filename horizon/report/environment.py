"""What makes rows comparable: the machine, the commit, versions and the command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import psutil
import torch

import horizon
from horizon.plan.topology import Topology
from horizon.report.measurements import Run
from horizon.stream.pcie import pcie_link
from horizon.units import format_bytes

PACKAGES = ("torch", "numba", "numpy", "transformers")


def describe_run(command: Sequence[str], topology: Topology, seconds: float) -> Run:
    """The run that ends now."""
    return Run(
        machine=machine_name(),
        commit=commit(),
        versions={"horizon": horizon.__version__, "python": platform.python_version(), **_versions()},
        command=shlex.join(command),
        date=time.strftime("%Y-%m-%d %H:%M"),
        seconds=seconds,
        facts=facts(topology),
    )


def machine_name() -> str:
    """Processor, cores, memory, GPU."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    memory = format_bytes(psutil.virtual_memory().total)
    return f"{_processor()}, {len(os.sched_getaffinity(0))} CPUs, {memory}{gpu}"


def commit() -> str:
    """Of the checkout that runs, with a + where it was changed since; the version where there is none."""
    folder = Path(horizon.__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"], capture_output=True, text=True, check=True,
            cwd=folder,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return f"horizon {horizon.__version__}"
    return found.stdout.strip()


def facts(topology: Topology) -> dict[str, str]:
    """What else bears on the numbers."""
    distances = "; ".join(" ".join(map(str, node.distances.values())) for node in topology.nodes)
    found = {
        "kernel": platform.release(),
        "NUMA": str(topology),
        "NUMA distances": distances or "-",
        "huge pages": _chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
        "governor": _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "not told",
        "other work": f"load {os.getloadavg()[0]:.1f} in the last minute",
        "virtual": "yes" if "hypervisor" in _text("/proc/cpuinfo") else "no",
    }
    if torch.cuda.is_available():
        found["GPU link"] = str(pcie_link() or "not told")
    return found


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    names = [line.partition(":")[2].strip() for line in _text("/proc/cpuinfo").splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def _chosen(path: str) -> str:
    return _text(path).partition("[")[2].partition("]")[0] or "not told"


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
