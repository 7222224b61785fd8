import pytest
import torch

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


@pytest.mark.parametrize(
    ("files", "room"),
    [
        ({"memory.max": "1000\n", "memory.current": "400\n"}, 600),
        ({"memory.max": "1000", "memory.current": "1400"}, 0),
        ({"memory/memory.limit_in_bytes": "900", "memory/memory.usage_in_bytes": "100"}, 800),
        ({"memory.max": "max\n", "memory.current": "400\n"}, 1 << 62),
        ({"memory.max": "1000"}, 1 << 62),  # half a file system says nothing
        ({}, 1 << 62),
    ],
    ids=["v2", "v2 over its limit", "v1", "v2 without a limit", "v2 without usage", "no cgroup"],
)
def test_room_below_a_cgroups_limit(tmp_path, files, room):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine._cgroup_room(tmp_path) == room


def test_the_tighter_of_system_and_cgroup_counts(monkeypatch):
    monkeypatch.setattr(machine, "_cgroup_room", lambda: 5 * MIB)
    assert machine.available_host_bytes() == 5 * MIB
    monkeypatch.setattr(machine, "_cgroup_room", lambda: 1 << 62)
    assert 0 < machine.available_host_bytes() < 1 << 50


def test_budgets_count_what_the_process_uses_already(monkeypatch):
    monkeypatch.setattr(machine, "available_host_bytes", lambda: 7 * GIB)
    monkeypatch.setattr(machine, "process_bytes", lambda: 1 * GIB)
    assert memory_limits(MemoryConfig(), CPU).host == 8 * GIB
    assert memory_limits(MemoryConfig(host_budget="3GiB"), CPU).host == 3 * GIB
    assert memory_limits(MemoryConfig(host_budget="3GiB", device_budget="100MB"), CPU) == Limits(3 * GIB, 100_000_000)


@pytest.mark.parametrize("key", ["host_budget", "device_budget"])
@pytest.mark.parametrize("value", ["lots", "0", "-1GiB", ""])
def test_a_budget_that_is_no_size_is_refused_by_its_key(key, value):
    with pytest.raises(ConfigError, match=f"memory.{key}='{value}' is not a size"):
        memory_limits(MemoryConfig(**{key: value}), CPU)


def test_process_bytes_follow_what_is_touched():
    before = process_bytes()
    block = torch.ones(16 * MIB)  # 64 MiB of fp32, too large for memory that was freed before
    assert 48 * MIB < process_bytes() - before < 96 * MIB
    del block


@pytest.mark.gpu
def test_the_devices_auto_budget_leaves_a_margin(monkeypatch):
    device = resolve_device("auto")
    machine.prepare_device(device)
    _, total = torch.cuda.mem_get_info(device)
    limit = memory_limits(MemoryConfig(), device).device
    assert 0 < limit <= total - machine.DEVICE_MARGIN
    assert memory_limits(MemoryConfig(device_budget="2GiB"), device).device == 2 * GIB
