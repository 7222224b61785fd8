"""Checks of the GPU and its link to the host. Without a GPU they say so once and leave the rest out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from horizon.doctor.finding import Finding, fail, ok, warn
from horizon.errors import HorizonError
from horizon.store.arena import Arena
from horizon.stream.streams import Streams
from horizon.stream.timing import measure_copies
from horizon.units import GIB, MIB, format_bytes

REGISTERED = 64 * MIB
LINK_GB_S = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}  # a lane of each PCIe generation, 10^9 bytes/s
REACHED = 0.7  # of what the link's lanes carry, that copies should reach


def check_gpu() -> Finding:
    """Whether torch can compute on a GPU, and with which driver."""
    names, driver = _nvml_gpus()
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        found = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, {format_bytes(total)}"
        return ok("gpu", f"{found}, driver {driver or 'unknown'}, CUDA {torch.version.cuda}")
    if names:
        return fail(
            "gpu",
            f"the driver ({driver}) has {names[0]}, but torch {torch.__version__} cannot use it",
            "install a CUDA build of torch that this driver supports, or a newer driver",
        )
    return warn("gpu", "none: models train on the CPU", "for models beyond a few hundred million parameters, use a GPU")


def check_link() -> Finding | None:
    """Generation and width of the link, and what copies reach."""
    if not torch.cuda.is_available():
        return None
    up, down, _ = measure_copies(Streams.on(torch.device("cuda", 0)))
    measured = f"{up / 1e9:.1f} GB/s up, {down / 1e9:.1f} GB/s down from pinned memory"
    link = _link()
    if link is None:
        return ok("link", measured)
    generation, width, most_width = link
    found = f"PCIe generation {generation}, {width} lanes: {measured}"
    if width < most_width:
        return warn("link", f"{found}; the card has {most_width} lanes", "move the card to a slot with all its lanes")
    if min(up, down) < REACHED * 1e9 * LINK_GB_S.get(generation, 0.0) * width:
        return warn("link", found, "stop what else copies or uses the host's memory; check the card's NUMA node")
    return ok("link", found)


def check_registration() -> Finding | None:
    """Whether host memory can be registered with CUDA, without which copies wait for the CPU."""
    if not torch.cuda.is_available():
        return None
    try:
        Arena([REGISTERED], "horizon doctor", pin=True).close()
    except HorizonError as error:
        return fail("registration", str(error), "raise ulimit -l, or the container's memlock limit")
    return ok("registration", f"CUDA takes {format_bytes(REGISTERED)} of host memory")


def check_free_device() -> Finding | None:
    """Whether others hold much of the device."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info(0)
    found = f"{format_bytes(free)} of {format_bytes(total)} free"
    if total - free > 4 * GIB:
        return warn("device memory", found, "stop the other processes on the device (nvidia-smi lists them)")
    return ok("device memory", found)


@contextmanager
def _nvml() -> Iterator[Any]:
    """NVIDIA's management library; None where there is no driver."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pynvml  # here: its older name warns when imported
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _nvml_gpus() -> tuple[list[str], str | None]:
    """Names of the GPUs that the driver has, and its version."""
    with _nvml() as nvml:
        if nvml is None:
            return [], None
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        return [str(nvml.nvmlDeviceGetName(h)) for h in handles], str(nvml.nvmlSystemGetDriverVersion())


def _link() -> tuple[int, int, int] | None:
    """(generation, lanes, lanes that the card has); None where the driver does not say."""
    with _nvml() as nvml:
        if nvml is None:
            return None
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(0)
            return (
                int(nvml.nvmlDeviceGetCurrPcieLinkGeneration(handle)),
                int(nvml.nvmlDeviceGetCurrPcieLinkWidth(handle)),
                int(nvml.nvmlDeviceGetMaxPcieLinkWidth(handle)),
            )
        except nvml.NVMLError:
            return None
