"""Where an engine would run, and what it may have there."""

import pytest
import torch

from horizon.config.schema import ComputeDtype, Kernels, MemoryConfig
from horizon.errors import ConfigError
from horizon.forecast import machine as module
from horizon.forecast.machine import SYSTEM_BYTES, target_of
from horizon.plan.facts import read_facts
from horizon.plan.machine import DEVICE_MARGIN
from horizon.plan.memory import Limits
from horizon.units import GIB
from tests.forecast.conftest import machine


def elsewhere(device="auto", host="64GiB"):
    return target_of(read_facts(machine(host=host), "a test"), device, here=False)


def test_elsewhere_all_memory_is_free_but_for_the_systems():
    assert elsewhere().limits(MemoryConfig()) == Limits(64 * GIB - SYSTEM_BYTES, 16 * GIB - DEVICE_MARGIN)
    assert elsewhere(host="3GiB").limits(MemoryConfig()).host == 3 * GIB // 2
    given = MemoryConfig(host_budget="7GiB", device_budget="5GiB")
    assert elsewhere().limits(given) == Limits(7 * GIB, 5 * GIB)
    assert elsewhere(device="cpu").limits(MemoryConfig()).device == 64 * GIB - SYSTEM_BYTES


def test_here_it_is_what_nobody_else_uses(monkeypatch):
    monkeypatch.setattr(module, "resolve_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(module, "memory_limits", lambda memory, device, cxl: Limits(9 * GIB, 0))
    monkeypatch.setattr(module, "free_device_bytes", lambda device: 11 * GIB)
    here = target_of(read_facts(machine(), "a test"), "auto", here=True)
    assert here.limits(MemoryConfig()) == Limits(9 * GIB, 11 * GIB - DEVICE_MARGIN)
    monkeypatch.setattr(module, "free_device_bytes", lambda device: None)
    assert here.limits(MemoryConfig()).device == 16 * GIB - DEVICE_MARGIN


def test_the_device_is_the_machines():
    assert elsewhere().device.type == "cuda" and elsewhere(device="cpu").device.type == "cpu"
    without = read_facts(machine(device=""), "a test")
    assert target_of(without, "auto", here=False).device.type == "cpu"
    with pytest.raises(ConfigError, match="device='cuda', but the machine 'test' has no GPU"):
        target_of(without, "cuda", here=False)
    with pytest.raises(ConfigError, match="device='cuda:1', but the machine 'test' has one GPU"):
        elsewhere(device="cuda:1")


def test_a_gpu_elsewhere_has_fused_kernels_and_computes_in_bf16():
    assert elsewhere().fused(Kernels.auto) and not elsewhere().fused(Kernels.torch)
    assert elsewhere().dtype(ComputeDtype.auto) is torch.bfloat16
    on_cpu = elsewhere(device="cpu")
    assert not on_cpu.fused(Kernels.auto) and on_cpu.dtype(ComputeDtype.auto) is torch.float32
    with pytest.raises(ConfigError, match="kernels=liger needs a CUDA device"):
        on_cpu.fused(Kernels.liger)
    assert elsewhere().host_overhead > on_cpu.host_overhead > 0 == on_cpu.device_overhead
