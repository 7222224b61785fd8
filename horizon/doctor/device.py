"""Checks of the GPU and its link to the host. Without a GPU they say so once and leave the rest out."""

from __future__ import annotations

import torch

from horizon.doctor.finding import Finding, fail, ok, warn
from horizon.store.arena import Arena
from horizon.stream.pcie import nvml, pcie_link
from horizon.stream.streams import Streams
from horizon.stream.timing import measure_copies
from horizon.units import GIB, MIB, format_bytes

REGISTERED = 64 * MIB
REACHED = 0.7  # of what the link's lanes carry, that copies should reach


def check_gpu() -> Finding:
    """Whether torch can compute on a GPU, and with which driver."""
    names, driver = _nvml_gpus()
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        found = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, {format_bytes(total)}"
        found += f", driver {driver or 'unknown'}, CUDA {torch.version.cuda}"
        try:
            torch.ones(1, device="cuda").add_(1).item()
        except RuntimeError as error:  # such as a GPU that this build has no kernels for
            said = str(error).strip().partition("\n")[0]
            return fail("gpu", f"{found}; it does not compute: {said}", "install a build of torch for this GPU")
        return ok("gpu", found)
    if names:
        return fail(
            "gpu",
            f"the driver ({driver}) has {names[0]}, but torch {torch.__version__} cannot use it",
            "install a CUDA build of torch that this driver supports, or a newer driver",
        )
    return warn("gpu", "none: models train on the CPU", "for models beyond a few hundred million parameters, use a GPU")


def registers() -> bool:
    """Whether CUDA takes host memory."""
    arena = Arena([REGISTERED], "horizon doctor", pin=True)
    try:
        return arena.pinned
    finally:
        arena.close()


def check_registration() -> Finding | None:
    """Whether host memory can be registered with CUDA, without which the host waits for its copies."""
    if not torch.cuda.is_available():
        return None
    if registers():
        return ok("registration", f"CUDA registers host memory ({format_bytes(REGISTERED)} tried)")
    fix = "raise ulimit -l, or the container's memlock limit: until then the host waits for its copies"
    return warn("registration", f"CUDA refuses to register {format_bytes(REGISTERED)} of host memory", fix)


def check_link() -> Finding | None:
    """Generation and width of the link, and what copies reach."""
    if not torch.cuda.is_available():
        return None
    up, down, _ = measure_copies(Streams.on(torch.device("cuda", 0)))
    memory = "pinned" if registers() else "pageable"
    measured = f"{up / 1e9:.1f} GB/s up, {down / 1e9:.1f} GB/s down from {memory} memory"
    link = pcie_link()
    if link is None:
        return ok("link", f"{measured}; the driver tells nothing of the link itself")
    found = f"{link}: {measured}"
    if link.lanes < link.most_lanes:
        return warn("link", f"{found}; the card has {link.most_lanes}", "move the card to a slot with all its lanes")
    if memory == "pinned" and min(up, down) < REACHED * 1e9 * link.gb_per_s:
        found += f", of {link.gb_per_s:.0f} that it carries"
        return warn("link", found, "stop what else copies or uses the host's memory; check the card's NUMA node")
    return ok("link", found)


def check_free_device() -> Finding | None:
    """Whether others hold much of the device."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info(0)
    found = f"{format_bytes(free)} of {format_bytes(total)} free"
    if total - free > 4 * GIB:
        return warn("device memory", found, "stop the other processes on the device (nvidia-smi lists them)")
    return ok("device memory", found)


def _nvml_gpus() -> tuple[list[str], str | None]:
    """Names of the GPUs that the driver has, and its version."""
    with nvml() as library:
        if library is None:
            return [], None
        handles = [library.nvmlDeviceGetHandleByIndex(i) for i in range(library.nvmlDeviceGetCount())]
        return [str(library.nvmlDeviceGetName(h)) for h in handles], str(library.nvmlSystemGetDriverVersion())
