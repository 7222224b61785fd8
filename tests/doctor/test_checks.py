"""Each check with faked facts: what it says, how bad that is, and what the command's exit code makes of it."""

import json
import resource
from types import SimpleNamespace

import pytest
import torch

from horizon.commands import doctor as command
from horizon.doctor import checks, device, host
from horizon.doctor.checks import run_checks
from horizon.doctor.finding import Status, fail, ok, warn
from horizon.errors import BudgetError, ConfigError
from horizon.plan.topology import Node, Topology
from horizon.stream.pcie import PcieLink
from horizon.units import GIB, MIB


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command with these checks; gives exit code and what it printed."""

    def run(findings, *arguments):
        monkeypatch.setattr(checks, "CHECKS", [lambda finding=finding: finding for finding in findings])
        code = command.run(list(arguments))
        printed = capsys.readouterr()
        assert printed.err == ""
        return code, printed.out

    return run


FINE, POOR, BAD = ok("disk", "fine"), warn("cores", "two", "buy more"), fail("gpu", "broken", "mend it")


@pytest.mark.parametrize(
    ("findings", "code"), [([FINE], 0), ([FINE, POOR, None], 0), ([FINE, BAD], 1), ([BAD, POOR], 1), ([], 0)]
)
def test_only_what_fails_makes_the_exit_code(run, findings, code):
    assert run(findings)[0] == code
    found, out = run(findings, "--json")
    assert found == code
    answer = json.loads(out)
    assert answer["ok"] is (code == 0) and answer["machine"] is None
    assert [check["name"] for check in answer["checks"]] == [f.name for f in findings if f]


def test_each_line_has_status_name_what_was_found_and_the_fix(run):
    _, out = run([FINE, BAD])
    assert out.splitlines() == [
        "ok    disk            fine",
        "fail  gpu             broken",
        "                      -> mend it",
    ]


def test_a_check_that_breaks_fails_and_the_others_are_made(run):
    def check_link():
        raise RuntimeError("driver\nfell over")

    found = run_checks([check_link, lambda: FINE])
    assert [f.status for f in found] == [Status.fail, Status.ok]
    assert found[0].name == "link" and "RuntimeError: driver fell over" in found[0].found


def test_an_unknown_argument_is_refused():
    with pytest.raises(ConfigError, match=r"takes no '--mesure'; expected --measure or --json"):
        command.run(["--mesure"])


def test_measuring_keeps_the_facts_and_prints_them(run, monkeypatch):
    from horizon.forecast import here
    from tests.forecast.conftest import machine

    monkeypatch.setattr(here, "measure", lambda seconds, updates: machine())
    assert checks.check_facts().status is Status.warn
    _, out = run([FINE], "--measure", "--json")
    assert json.loads(out)["machine"]["host_bytes"] == 64 * GIB
    assert checks.check_facts().status is Status.ok


# ---- the checks


def test_all_checks_of_this_machine_say_something_and_warnings_say_what_to_do():
    found = run_checks(checks.CHECKS)
    assert {f.name for f in found} >= {"versions", "gpu", "host memory", "numa", "huge pages", "memlock", "disk"}
    for finding in found:
        assert finding.found and bool(finding.fix) is (finding.status is not Status.ok)
    assert torch.__version__.partition("+")[0] in found[0].found


@pytest.mark.parametrize(
    ("available", "total", "status"),
    [(3 * GIB, 100 * GIB, "warn"), (50 * GIB, 100 * GIB, "ok"), (3 * GIB, 4 * GIB, "ok")],
)
def test_little_host_memory_is_a_warning(monkeypatch, available, total, status):
    monkeypatch.setattr(host, "available_host_bytes", lambda: available)
    monkeypatch.setattr(host, "host_memory_bytes", lambda: total)
    assert host.check_memory().status == status


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("always [madvise] never\n", "ok"),
        ("[always] madvise never", "ok"),
        ("always madvise [never]", "warn"),
        (None, "warn"),
    ],
)
def test_huge_pages(monkeypatch, tmp_path, text, status):
    if text is not None:
        (tmp_path / "enabled").write_text(text)
    monkeypatch.setattr(host, "HUGE_PAGES", tmp_path / "enabled")
    assert host.check_huge_pages().status == status


@pytest.mark.parametrize(
    ("limit", "gpu", "registers", "status", "word"),
    [
        (8 * MIB, True, True, "ok", "does not keep to"),
        (8 * MIB, True, False, "warn", "may keep to it"),
        (64 * MIB, True, True, "warn", "may keep to it"),
        (8 * MIB, False, False, "ok", "without a GPU nothing is"),
        (resource.RLIM_INFINITY, True, False, "ok", "no limit"),
        (1 << 50, True, False, "ok", "no limit"),
    ],
)
def test_a_limit_on_locked_memory_matters_where_cuda_keeps_to_it(monkeypatch, limit, gpu, registers, status, word):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limit, limit))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(host, "registers", lambda: registers)
    found = host.check_memlock()
    assert found.status == status and word in found.found


@pytest.mark.parametrize(
    ("cores", "machine", "fix"), [(2, 2, "use a machine with more"), (2, 8, "other 6"), (4, 8, "")]
)
def test_few_cores_have_a_fix_that_this_machine_allows(monkeypatch, cores, machine, fix):
    monkeypatch.setattr(host, "available_cores", lambda: cores)
    monkeypatch.setattr(host.os, "cpu_count", lambda: machine)
    found = host.check_cores()
    assert found.status == ("warn" if fix else "ok") and fix in found.fix


def test_numa_nodes_without_cores_are_told_and_whether_one_may_be_chosen(monkeypatch):
    nodes = Topology((Node(0, tuple(range(8)), GIB, GIB), Node(1, (), GIB, GIB)))
    monkeypatch.setattr(host, "read_topology", lambda: nodes)
    monkeypatch.setattr(host, "bindable", lambda: True)
    assert host.check_numa() == ok("numa", "2 nodes; memory only: node1")
    monkeypatch.setattr(host, "bindable", lambda: False)
    found = host.check_numa()
    assert found.status is Status.warn and "may not choose" in found.found and "SYS_NICE" in found.fix
    monkeypatch.setattr(host, "read_topology", lambda: Topology(nodes.nodes[:1]))
    assert host.check_numa() == ok("numa", "1 node")


def test_a_disk_without_direct_io_and_one_that_is_full_are_warnings(monkeypatch, tmp_path):
    monkeypatch.setattr(host.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100 * GIB))
    monkeypatch.setattr(host, "_takes_direct_io", lambda folder: False)
    assert host.check_disk().status is Status.warn and "refused" in host.check_disk().found
    monkeypatch.setattr(host, "_takes_direct_io", lambda folder: True)
    assert host.check_disk().status is Status.ok
    monkeypatch.setattr(host.shutil, "disk_usage", lambda folder: SimpleNamespace(free=GIB))
    assert host.check_disk().status is Status.warn


def test_the_check_of_direct_io_leaves_no_file(tmp_path):
    host._takes_direct_io(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_torch_cannot_use_fails(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "_nvml_gpus", lambda: (["NVIDIA H200"], "570.1"))
    assert device.check_gpu().status is Status.fail
    monkeypatch.setattr(device, "_nvml_gpus", lambda: ([], None))
    assert device.check_gpu().status is Status.warn
    assert (device.check_link(), device.check_registration(), device.check_free_device()) == (None, None, None)


@pytest.fixture
def gpu(monkeypatch):
    """A machine with one, as far as torch tells."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=GIB, uuid="1-2")
    )
    monkeypatch.setattr(device, "_nvml_gpus", lambda: (["NVIDIA H200"], "570.1"))


def test_a_gpu_that_this_build_has_no_kernels_for_fails(gpu, monkeypatch):
    class Broken:
        def add_(self, value):
            raise RuntimeError("CUDA error: no kernel image is available\nCompile with")

    real = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device: Broken())
    found = device.check_gpu()
    assert found.status is Status.fail and found.found.endswith(
        "does not compute: CUDA error: no kernel image is available"
    )
    monkeypatch.setattr(torch, "ones", lambda *size, device: real(*size))
    assert device.check_gpu().status is Status.ok and "driver 570.1" in device.check_gpu().found


@pytest.mark.parametrize(
    ("link", "rates", "pinned", "status", "word"),
    [
        (PcieLink(5, 16, 16, 1), (55e9, 54e9), True, "ok", "generation 5, 16 lanes, next to NUMA node 1: 55.0"),
        (PcieLink(5, 8, 16, None), (27e9, 27e9), True, "warn", "the card has 16"),
        (PcieLink(4, 16, 16, None), (25e9, 9e9), True, "warn", "9.0 GB/s down from pinned memory, of 32"),
        (PcieLink(4, 16, 16, None), (9e9, 9e9), False, "ok", "from pageable memory"),
        (None, (25e9, 25e9), True, "ok", "25.0 GB/s up"),
    ],
)
def test_the_link_is_judged_by_what_it_could_carry(gpu, monkeypatch, link, rates, pinned, status, word):
    monkeypatch.setattr(device, "Streams", type("S", (), {"on": staticmethod(lambda device: None)}))
    monkeypatch.setattr(device, "measure_copies", lambda streams: (*rates, 0.0))
    monkeypatch.setattr(device, "registers", lambda: pinned)
    monkeypatch.setattr(device, "pcie_link", lambda: link)
    found = device.check_link()
    assert found.status == status and word in found.found


@pytest.mark.parametrize("taken", [True, False])
def test_memory_that_cuda_does_not_take_is_a_warning(gpu, monkeypatch, taken):
    closed = []
    arena = SimpleNamespace(pinned=taken, close=lambda: closed.append(1))
    monkeypatch.setattr(device, "Arena", lambda sizes, purpose, pin: arena)
    found = device.check_registration()
    assert found.status == ("ok" if taken else "warn") and closed == [1]
    assert ("registers host memory" if taken else "refuses to register 64 MiB") in found.found


def test_memory_that_the_system_refuses_is_a_failure(gpu, monkeypatch):
    def refused(*args, **kwargs):
        raise BudgetError("the system refuses 64 MiB")

    monkeypatch.setattr(device, "Arena", refused)
    (found,) = run_checks([device.check_registration])
    assert found.status is Status.fail and "the system refuses 64 MiB" in found.found
