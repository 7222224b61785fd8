import mmap

import pytest
import torch

from horizon.cgroups import MemoryGroup
from horizon.config.schema import MemoryConfig
from horizon.errors import ConfigError
from horizon.plan import machine
from horizon.plan.machine import memory_limits, process_bytes, resolve_device
from horizon.plan.memory import Limits
from horizon.units import GIB, MIB

CPU = torch.device("cpu")


@pytest.fixture(params=[0, 1, 2])
def gpus(request, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    return request.param


def test_auto_is_the_first_gpu_else_the_cpu(gpus):
    assert resolve_device("auto") == (torch.device("cuda", 0) if gpus else CPU)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:1", "cuda:7"])
def test_a_gpu_is_there_or_refused(gpus, name):
    index = int(name.partition(":")[2] or 0)
    if index < gpus:
        assert resolve_device(name) == torch.device("cuda", index)
        return
    with pytest.raises(ConfigError, match=rf"device='{name}' is not available here: {gpus} CUDA devices; use device="):
        resolve_device(name)


def test_the_cpu_is_always_there(gpus):
    assert resolve_device("cpu") == CPU


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "CPU0"])
def test_what_is_no_device_is_refused(name):
    with pytest.raises(ConfigError, match=rf"device='{name}' is no device; expected auto, cpu, cuda or cuda:<index>"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["mps", "meta", "xpu"])
def test_other_kinds_of_devices_are_refused(name):
    with pytest.raises(ConfigError, match=f"device='{name}' is not available here"):
        resolve_device(name)


def test_the_tighter_of_system_and_cgroup_counts(monkeypatch):
    monkeypatch.setattr(machine, "cgroup_room", lambda: 5 * MIB)
    assert machine.available_host_bytes() == 5 * MIB
    monkeypatch.setattr(machine, "cgroup_room", lambda: machine.NO_LIMIT)
    assert 0 < machine.available_host_bytes() < 1 << 50


def test_a_budget_of_the_cgroup_is_its_room_whatever_the_system_says(monkeypatch):
    monkeypatch.setattr(machine, "available_host_bytes", lambda: 1 * GIB)
    monkeypatch.setattr(machine, "process_bytes", lambda: 2 * GIB)
    monkeypatch.setattr(machine, "memory_groups", lambda: [MemoryGroup(100 * GIB, 30 * GIB), MemoryGroup(90 * GIB, 10)])
    assert memory_limits(MemoryConfig(host_budget="cgroup"), CPU).host == pytest.approx(0.98 * 72 * GIB, abs=1)
    monkeypatch.setattr(machine, "memory_groups", list)
    with pytest.raises(ConfigError, match=r"memory\.host_budget=cgroup, but no cgroup limits"):
        memory_limits(MemoryConfig(host_budget="cgroup"), CPU)


def test_budgets_count_what_the_process_uses_already(monkeypatch):
    monkeypatch.setattr(machine, "available_host_bytes", lambda: 7 * GIB)
    monkeypatch.setattr(machine, "process_bytes", lambda: 1 * GIB)
    assert memory_limits(MemoryConfig(), CPU).host == 8 * GIB - 256 * MIB
    assert memory_limits(MemoryConfig(host_budget="3GiB"), CPU).host == 3 * GIB
    assert memory_limits(MemoryConfig(host_budget="3GiB", device_budget="100MB"), CPU) == Limits(3 * GIB, 100_000_000)


def test_of_much_memory_a_fiftieth_is_left_to_the_kernel(monkeypatch):
    monkeypatch.setattr(machine, "available_host_bytes", lambda: 199 * GIB)
    monkeypatch.setattr(machine, "process_bytes", lambda: 1 * GIB)
    assert memory_limits(MemoryConfig(), CPU).host == 196 * GIB
    assert memory_limits(MemoryConfig(host_budget="200GiB"), CPU).host == 200 * GIB


@pytest.mark.parametrize("key", ["host_budget", "device_budget"])
@pytest.mark.parametrize("value", ["lots", "0", "-1GiB", ""])
def test_a_budget_that_is_no_size_is_refused_by_its_key(key, value):
    with pytest.raises(ConfigError, match=f"memory.{key}='{value}' is not a size"):
        memory_limits(MemoryConfig(**{key: value}), CPU)


def test_process_bytes_follow_what_is_touched():
    before = process_bytes()
    with mmap.mmap(-1, 64 * MIB) as block:  # a tensor may come from memory that the C library has kept
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        assert 48 * MIB < process_bytes() - before < 96 * MIB


@pytest.mark.gpu
def test_the_devices_auto_budget_leaves_a_margin(monkeypatch):
    device = resolve_device("auto")
    machine.prepare_device(device)
    _, total = torch.cuda.mem_get_info(device)
    limit = memory_limits(MemoryConfig(), device).device
    assert 0 < limit <= total - machine.DEVICE_MARGIN
    assert memory_limits(MemoryConfig(device_budget="2GiB"), device).device == 2 * GIB
