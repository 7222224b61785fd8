"""What a machine can do, in bytes and seconds, wherever it was learnt: measured here, or read from a machine file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from horizon.config.machine import DeviceFile, MachineFile
from horizon.config.schema import Moments
from horizon.config.values import choice
from horizon.errors import ConfigError
from horizon.units import parse_bytes

# Bytes that an update of one parameter reads and writes: both halves, both moments, the gradient.
UPDATE_BYTES = {Moments.float32: 26.0, Moments.bfloat16: 18.0, Moments.int8: 14.25}
# 8-bit codes cost arithmetic: their update is about as fast as that of bf16 moments, whatever memory would allow.
SLOWEST = Moments.bfloat16
AS_FAST = 0.03  # of the best rate: threads that add less are better left to others
THREADS_GAIN = 0.4  # an update's rate grows with this power of its threads (measured with 4 to 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """A GPU and its link to the host."""

    name: str
    num_bytes: int
    flops_per_s: float  # of bf16 products
    bytes_per_s: float
    up_bytes_per_s: float  # host to device
    down_bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TierFacts:
    """A further place for states."""

    num_bytes: int
    read_bytes_per_s: float
    write_bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """One machine."""

    name: str
    source: str  # where the numbers are from, in words
    device: DeviceFacts | None
    host_bytes: int
    host_bytes_per_s: float
    host_flops_per_s: float  # of fp32 products
    cores: int
    updates_per_s: Mapping[Moments, float]  # parameters, by as many threads as the optimizer has by default
    updates_by_threads: Mapping[int, float] = field(default_factory=dict)  # the same with fp32 moments, where measured
    tiers: Mapping[str, TierFacts]

    @property
    def update_threads(self) -> int:
        """Threads that the optimizer has by default: as few as are as fast as any; not measured: all cores but one."""
        return fewest_threads(self.updates_by_threads) if self.updates_by_threads else max(self.cores - 1, 1)

    def update_rate(self, moments: Moments, threads: int | None) -> float:
        """Parameters a second, by so many threads; None: the default."""
        default, rates = self.update_threads, self.updates_by_threads
        threads = threads or default
        if threads in rates:
            share = rates[threads] / rates[default]
        else:
            share = float(min(1.0, threads / default) ** THREADS_GAIN)
        return self.updates_per_s[moments] * share


def fewest_threads(rates: Mapping[int, float]) -> int:
    """Of the numbers of threads that were measured, the smallest that is as fast as any."""
    least = (1 - AS_FAST) * max(rates.values())
    return min(threads for threads, rate in rates.items() if rate >= least)


def read_facts(file: MachineFile, source: str) -> MachineFacts:
    """The facts of a machine file.

    Raises:
        ConfigError: a number is not positive, or a size is none; names the key.
    """
    given = {choice(Moments, name, "updates_g_s"): rate for name, rate in file.updates_g_s.items()}
    _check_positive("updates_g_s", {str(name): rate for name, rate in given.items()})
    by_threads = {threads: rate * 1e9 for threads, rate in file.updates_by_threads_g_s.items()}
    _check_positive("updates_by_threads_g_s", {str(threads): rate for threads, rate in by_threads.items()})
    _check_positive("updates_by_threads_g_s, threads", {str(threads): threads for threads in by_threads})
    host = file.host
    _check_positive("host", {key: getattr(host, key) for key in ("cores", "bandwidth_gb_s", "matmul_tflops")})
    tiers = {}
    for name, tier in file.tiers.items():
        _check_positive(f"tiers.{name}", {key: getattr(tier, key) for key in ("read_gb_s", "write_gb_s")})
        size = parse_bytes(tier.memory, f"tiers.{name}.memory")
        read, write = tier.read_gb_s * 1e9, tier.write_gb_s * 1e9
        tiers[name] = TierFacts(num_bytes=size, read_bytes_per_s=read, write_bytes_per_s=write)
    return MachineFacts(
        name=file.name,
        source=source,
        device=None if file.device is None else _device(file.device),
        host_bytes=parse_bytes(host.memory, "host.memory"),
        host_bytes_per_s=host.bandwidth_gb_s * 1e9,
        host_flops_per_s=host.matmul_tflops * 1e12,
        cores=host.cores,
        updates_per_s=_updates(host.bandwidth_gb_s * 1e9, {name: rate * 1e9 for name, rate in given.items()}),
        updates_by_threads=by_threads,
        tiers=tiers,
    )


def _device(device: DeviceFile) -> DeviceFacts:
    rates = ("matmul_tflops", "bandwidth_gb_s", "up_gb_s", "down_gb_s")
    _check_positive("device", {key: getattr(device, key) for key in rates})
    return DeviceFacts(
        name=device.name,
        num_bytes=parse_bytes(device.memory, "device.memory"),
        flops_per_s=device.matmul_tflops * 1e12,
        bytes_per_s=device.bandwidth_gb_s * 1e9,
        up_bytes_per_s=device.up_gb_s * 1e9,
        down_bytes_per_s=device.down_gb_s * 1e9,
    )


def _updates(bytes_per_s: float, given: Mapping[Moments, float]) -> dict[Moments, float]:
    """By format; those that are not given from the host's bandwidth, which bounds them."""
    bound = {moments: bytes_per_s / num_bytes for moments, num_bytes in UPDATE_BYTES.items()}
    bound[Moments.int8] = bound[SLOWEST]
    return bound | dict(given)


def _check_positive(where: str, numbers: Mapping[str, float]) -> None:
    for key, value in numbers.items():
        if not value > 0:
            raise ConfigError(f"{where}.{key}={value} of the machine must be positive")
