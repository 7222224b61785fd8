"""The GPU's link to the host, as NVIDIA's management library and the kernel know it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DEVICES = Path("/sys/bus/pci/devices")
LANE_GB_S = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}  # of each generation, 10^9 bytes/s each way


@dataclass(frozen=True, slots=True)
class PcieLink:
    """A link that device and slot agree on."""

    generation: int  # the best of both: an idle link may rest at a lower one
    lanes: int
    most_lanes: int  # that the card has
    node: int | None  # the NUMA node next to it, where there are several

    @property
    def gb_per_s(self) -> float:
        """What its lanes carry each way; 0 of a generation that is not known."""
        return LANE_GB_S.get(self.generation, 0.0) * self.lanes

    def __str__(self) -> str:
        next_to = "" if self.node is None else f", next to NUMA node {self.node}"
        return f"PCIe generation {self.generation}, {self.lanes} lanes{next_to}"


@contextmanager
def nvml() -> Iterator[Any]:
    """The library; None where there is no driver."""
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


def pcie_link(devices: Path = DEVICES) -> PcieLink | None:
    """Of torch's first GPU; None where the driver does not say."""
    with nvml() as library:
        if library is None:
            return None
        # numbers are others where some GPUs are hidden
        uuid = "GPU-" + str(torch.cuda.get_device_properties(0).uuid).removeprefix("GPU-")
        try:
            handle = library.nvmlDeviceGetHandleByUUID(uuid)
            return PcieLink(
                generation=int(library.nvmlDeviceGetMaxPcieLinkGeneration(handle)),
                lanes=int(library.nvmlDeviceGetCurrPcieLinkWidth(handle)),
                most_lanes=int(library.nvmlDeviceGetMaxPcieLinkWidth(handle)),
                node=_node(str(library.nvmlDeviceGetPciInfo(handle).busId), devices),
            )
        except library.NVMLError:
            return None


def _node(bus: str, devices: Path) -> int | None:
    """The kernel names a device `0000:3b:00.0` that the driver calls `00000000:3B:00.0`."""
    try:
        node = int((devices / bus[-12:].lower() / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None
