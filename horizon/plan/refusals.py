"""Settings that cannot work, or not with each other: refused by name before anything is allocated."""

from __future__ import annotations

from horizon.config.schema import Clip, MemoryConfig
from horizon.errors import ConfigError
from horizon.plan.memory import MemoryNeeds


def check_memory(memory: MemoryConfig) -> None:
    """Raise a ConfigError where the settings cannot work anywhere."""
    if memory.weight_slots is not None and memory.weight_slots < 1:
        raise ConfigError(f"memory.weight_slots must be >= 1 (2 overlaps copy and compute), got {memory.weight_slots}")
    if memory.update_threads is not None and memory.update_threads < 1:
        raise ConfigError(f"memory.update_threads must be >= 1, got {memory.update_threads}")


def check_speculation(needs: MemoryNeeds, clip: Clip) -> None:
    """Raise a ConfigError where states or gradients are on nvme and updates could be taken back."""
    if clip is Clip.speculative and (needs.on_nvme or needs.grads_on_nvme):
        raise ConfigError(
            "clip=speculative takes updates back, which would bring states on nvme over the disk twice; set "
            "optim.clip=exact or lagged, or keep states in dram (memory.policy=dram)"
        )
