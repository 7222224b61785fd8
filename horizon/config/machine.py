"""A machine as a file: what `horizon plan machine=FILE` reads and `horizon doctor --measure` writes.

Plain dataclasses, as `horizon.config.schema`; `horizon.plan.facts` turns them into bytes and seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class DeviceFile:
    """A GPU and its link to the host."""

    name: str
    memory: str  # such as 80GiB: all of it, as the driver reports it
    matmul_tflops: float  # bf16, sustained over seconds
    bandwidth_gb_s: float  # of its memory, 10^9 bytes read and written a second
    up_gb_s: float  # host to device, from pinned memory
    down_gb_s: float  # device to host


@dataclass(kw_only=True, slots=True)
class HostFile:
    """The machine around it."""

    memory: str  # such as 125GiB
    cores: int
    bandwidth_gb_s: float  # of its memory, 10^9 bytes read and written a second by all cores
    matmul_tflops: float  # fp32, by all cores


@dataclass(kw_only=True, slots=True)
class TierFile:
    """A further place for states."""

    memory: str
    read_gb_s: float
    write_gb_s: float


@dataclass(kw_only=True, slots=True)
class MachineFile:
    """One machine."""

    name: str
    host: HostFile
    device: DeviceFile | None = None  # None: no GPU
    updates_g_s: dict[str, float] = field(default_factory=dict)  # 10^9 parameters a second, by optim.moments
    updates_by_threads_g_s: dict[int, float] = field(default_factory=dict)  # the same with fp32 moments, by threads
    tiers: dict[str, TierFile] = field(default_factory=dict)  # by name: cxl, nvme
