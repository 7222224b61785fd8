"""Each check with faked facts: what it says, how bad that is, and what the command's exit code makes of it."""

import json
import resource
from types import SimpleNamespace

import pytest
import torch

from horizon.commands import doctor as command
from horizon.doctor import checks, device, host
from horizon.doctor.checks import run_checks
from horizon.doctor.finding import Finding, Status, fail, ok, warn
from horizon.errors import BudgetError, ConfigError
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
    ("limit", "gpu", "status"),
    [(64 * MIB, True, "warn"), (64 * MIB, False, "ok"), (resource.RLIM_INFINITY, True, "ok"), (1 << 50, True, "ok")],
)
def test_a_limit_on_locked_memory_matters_with_a_gpu(monkeypatch, limit, gpu, status):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limit, limit))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert host.check_memlock().status == status


def test_numa_nodes_without_cores_are_told(monkeypatch, tmp_path):
    for name, cores in (("node0", "0-7\n"), ("node1", "\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cpulist").write_text(cores)
    monkeypatch.setattr(host, "NODES", tmp_path)
    assert host.check_numa() == ok("numa", "2 nodes; memory only: node1")


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


@pytest.mark.parametrize(
    ("link", "rates", "status", "word"),
    [
        ((5, 16, 16), (55e9, 54e9), "ok", "generation 5, 16 lanes"),
        ((5, 8, 16), (27e9, 27e9), "warn", "the card has 16 lanes"),
        ((4, 16, 16), (25e9, 9e9), "warn", "9.0 GB/s down"),
        (None, (25e9, 25e9), "ok", "25.0 GB/s up"),
    ],
)
def test_the_link_is_judged_by_what_it_could_carry(monkeypatch, link, rates, status, word):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "Streams", type("S", (), {"on": staticmethod(lambda device: None)}))
    monkeypatch.setattr(device, "measure_copies", lambda streams: (*rates, 0.0))
    monkeypatch.setattr(device, "_link", lambda: link)
    found = device.check_link()
    assert found.status == status and word in found.found


def test_memory_that_cannot_be_registered_fails(monkeypatch):
    def refused(*args, **kwargs):
        raise BudgetError("CUDA refuses")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "Arena", refused)
    assert device.check_registration() == Finding(
        "registration", Status.fail, "CUDA refuses", "raise ulimit -l, or the container's memlock limit"
    )
