"""What this machine can do: measured once, kept in a file per machine, measured again when asked or when it changes.

The file is a machine file like any other (`horizon.config.machine`), so it can be taken along to plan for this machine
elsewhere.
"""

from __future__ import annotations

import logging
import platform
import shutil
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

from horizon import __version__
from horizon.config.machine import DeviceFile, HostFile, MachineFile, TierFile
from horizon.config.schema import Moments, NvmeEngine
from horizon.errors import BudgetError, ConfigError
from horizon.forecast.kept import kept_folder, key_of, write_kept
from horizon.optim.adamw import AdamW
from horizon.optim.rate import PARAMETERS, measure_update_rate, update_rates
from horizon.optim.threads import available_cores, default_num_threads
from horizon.plan.facts import MachineFacts, fewest_threads, read_facts
from horizon.plan.machine import host_memory_bytes
from horizon.store.speed import probe_disk
from horizon.stream.streams import Streams
from horizon.stream.timing import measure_copies
from horizon.units import GIB, MIB

logger = logging.getLogger(__name__)

SWEPT = 64 * MIB  # elements of fp32 that one sweep over host memory adds: more than a cache holds
PARTS = 4  # numbers of threads that updates are measured with
BY_THREADS = 32 << 20  # parameters of these updates at most: more than a cache holds, and done within seconds
QUICK_S, FULL_S = 0.3, 5.0  # that products run for; a GPU's clocks fall within the longer


def identity() -> str:
    """What makes this machine and its software another one, as a short key; its name and its load do not."""
    parts = [_cpu_name(), str(available_cores()), platform.machine(), __version__, torch.__version__]
    parts.append(metadata.version("numba"))
    if torch.cuda.is_available():
        parts += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        parts.append(str(torch.version.cuda))
    return key_of(parts)


def cache_file() -> Path:
    """Where this machine's facts are kept."""
    return kept_folder() / f"machine-{identity()}.yaml"


def this_machine() -> MachineFacts:
    """The facts of this machine: those kept, or a quick measurement, which is not."""
    path = cache_file()
    kept = read_kept(path)
    if kept is not None:
        return kept
    return read_facts(
        measure(QUICK_S, updates=False), "a quick measurement; horizon doctor --measure makes a better one"
    )


def measured_threads() -> int | None:
    """Threads that the optimizer is to have by what was measured and kept; None: nothing was."""
    kept = read_kept(cache_file())
    return kept.update_threads if kept is not None and kept.updates_by_threads else None


def read_kept(path: Path) -> MachineFacts | None:
    """What the file says, or None where there is none or it is damaged, which the log then says."""
    if not path.exists():
        return None
    try:
        from horizon.config.compose import load_machine  # here: it loads Hydra, which engines do without

        return read_facts(load_machine(str(path)), str(path))
    except ConfigError as error:
        logger.warning("measured again, for what was kept cannot be read: %s", error)
        return None


def measure_and_keep() -> MachineFacts:
    """Measure all there is to measure, for some time, and keep it."""
    path, machine = cache_file(), measure(FULL_S, updates=True)
    try:
        keep(machine, path)
    except OSError as error:
        logger.warning("not kept: %s", error)
        return read_facts(machine, "measured now")
    return read_facts(machine, str(path))


def keep(machine: MachineFile, path: Path) -> None:
    """Write the file as a whole or not at all.

    Raises:
        OSError: the folder cannot be written to.
    """
    from horizon.config.compose import dump_machine  # as above

    write_kept(path, f"# measured by horizon {__version__} on {time.strftime('%Y-%m-%d')}\n{dump_machine(machine)}")


def measure(seconds: float, updates: bool) -> MachineFile:
    """Measure this machine.

    Args:
        seconds: that products run for.
        updates: the optimizer's update, too, in each format of the moments; compiles it, which takes a while. And the
            disk of the folder that the process runs in.

    Raises:
        BudgetError: the device has no room for it.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else None
    cpu = torch.device("cpu")
    host = HostFile(
        memory=f"{host_memory_bytes() / GIB:.1f}GiB",
        cores=available_cores(),
        bandwidth_gb_s=_rounded(_host_bytes_per_s() / 1e9),
        matmul_tflops=_rounded(_flops_per_s(cpu, torch.float32, 1024, min(seconds, 1.0)) / 1e12),
    )
    by_threads = _rates_by_threads(device or cpu) if updates else {}
    rates = _update_rates(device or cpu, fewest_threads(by_threads)) if updates else {}
    try:
        found = None if device is None else _measure_device(device, seconds)
    except torch.cuda.OutOfMemoryError as error:
        raise BudgetError("the device has no room to be measured; stop what uses it, or use machine=FILE") from error
    name = _cpu_name() if device is None else torch.cuda.get_device_name(device)
    return MachineFile(
        name=f"{name}, {host.cores} cores, {host.memory}",
        host=host,
        device=found,
        updates_g_s={str(moments): _rounded(rate / 1e9) for moments, rate in rates.items()},
        updates_by_threads_g_s={threads: _rounded(rate / 1e9) for threads, rate in by_threads.items()},
        tiers=_disk_tier(Path.cwd()) if updates else {},
    )


def _measure_device(device: torch.device, seconds: float) -> DeviceFile:
    up, down, within = measure_copies(Streams.on(device))
    found = DeviceFile(
        name=torch.cuda.get_device_name(device),
        memory=f"{torch.cuda.get_device_properties(device).total_memory / GIB:.1f}GiB",
        matmul_tflops=_rounded(_flops_per_s(device, torch.bfloat16, 8192, seconds) / 1e12),
        bandwidth_gb_s=_rounded(within / 1e9),
        up_gb_s=_rounded(up / 1e9),
        down_gb_s=_rounded(down / 1e9),
    )
    torch.cuda.empty_cache()
    return found


def _disk_tier(folder: Path) -> dict[str, TierFile]:
    """The nvme tier that states in `folder` would be; none where nothing can be written there."""
    free, rates = shutil.disk_usage(folder).free, probe_disk(str(folder), NvmeEngine.auto)
    if rates is None or not free:
        return {}
    read, write = _rounded(rates.read / 1e9), _rounded(rates.write / 1e9)
    return {"nvme": TierFile(memory=f"{free / GIB:.1f}GiB", read_gb_s=read, write_gb_s=write)}


def _rates_by_threads(device: torch.device) -> dict[int, float]:
    """Of updates with fp32 moments by parts of all threads that leave a core to the thread that drives the device."""
    most = default_num_threads()
    threads = sorted({max(1, most * part // PARTS) for part in range(1, PARTS + 1)})
    return update_rates(min(PARAMETERS[device.type], BY_THREADS), threads, _gradients(device), AdamW())


def _update_rates(device: torch.device, threads: int) -> dict[Moments, float]:
    size = PARAMETERS[device.type]
    return {m: measure_update_rate(size, threads, _gradients(device), AdamW(moments=m)) for m in Moments}


def _gradients(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _host_bytes_per_s() -> float:
    one, other = torch.zeros(SWEPT // 4), torch.zeros(SWEPT // 4)
    return 3 * one.nbytes / min(_seconds(lambda: one.add_(other)) for _ in range(5))


def _flops_per_s(device: torch.device, dtype: torch.dtype, size: int, seconds: float) -> float:
    """Of square products, in the last half of `seconds`."""
    one, other = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(one)

    def products(times: int) -> None:
        for _ in range(times):
            torch.mm(one, other, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    products(2)
    times = max(1, round(seconds / 2 / max(_seconds(lambda: products(2)) / 2, 1e-6)))
    products(times)
    return 2 * size**3 * times / _seconds(lambda: products(times))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
