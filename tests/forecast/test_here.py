"""This machine's facts: kept per machine, whole or not at all, measured again where they are damaged."""

import os
import threading

import pytest

from horizon.building import build_parts
from horizon.config.compose import dump_machine, load_machine
from horizon.config.schema import MemoryConfig, Moments
from horizon.doctor.host import check_cores
from horizon.forecast import here
from horizon.plan.facts import read_facts
from tests.forecast.conftest import SMALL, machine

SETTINGS = {
    "optimizer": None, "max_grad_norm": 1.0, "device": "cpu", "compute_dtype": "auto", "kernels": "auto", "seed": 0,
    "freeze": (), "on_nonfinite": "stop", "clip": "exact", "revision": None, "trust_remote_code": False,
    "self_check": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def measured(monkeypatch):
    """Counts measurements, each of which finds a machine with one more core."""
    calls = []

    def measure(seconds, updates):
        calls.append((seconds, updates))
        found = machine()
        found.host.cores = len(calls)
        return found

    monkeypatch.setattr(here, "measure", measure)
    return calls


def test_what_was_measured_is_kept_and_read_again(measured):
    assert here.this_machine().source.startswith("a quick measurement; horizon doctor --measure")
    assert not here.cache_file().exists()  # a quick one is not kept
    kept = here.measure_and_keep()
    assert here.this_machine() == kept and kept.cores == 2 and kept.source == str(here.cache_file())
    assert measured == [(here.QUICK_S, False), (here.FULL_S, True)]
    assert here.measure_and_keep().cores == here.this_machine().cores == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "\x00" * 40,
        lambda text: "a: [1, 2",
        lambda text: "- 1\n",
        lambda text: text.replace("cores:", "corse:"),
        lambda text: text.replace("bandwidth_gb_s: 100", "bandwidth_gb_s: -3"),
        lambda text: text.replace("64GiB", "lots"),
    ],
    ids=["cut", "empty", "zeros", "no yaml", "a list", "a wrong key", "a negative number", "no size"],
)
def test_a_damaged_file_is_measured_again_and_said(measured, caplog, damage):
    here.measure_and_keep()
    path = here.cache_file()
    path.write_text(damage(path.read_text()))
    assert here.this_machine().source.startswith("a quick measurement")
    assert "measured again, for what was kept cannot be read" in caplog.text
    assert here.measure_and_keep() == here.this_machine()  # and it is whole again


def test_two_writers_leave_the_file_of_one(tmp_path):
    machines = [machine(host=f"{size}GiB") for size in range(1, 9)]
    path = tmp_path / "horizon" / "machine.yaml"
    threads = [threading.Thread(target=lambda m=m: [here.keep(m, path) for _ in range(20)]) for m in machines]
    for thread in threads:
        thread.start()
    seen = set()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            seen.add(load_machine(str(path)).host.memory)  # never half a file
    for thread in threads:
        thread.join()
    assert seen <= {m.host.memory for m in machines}
    assert [entry.name for entry in path.parent.iterdir()] == ["machine.yaml"]


def test_where_nothing_can_be_written_it_is_still_measured(measured, monkeypatch, caplog, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert here.measure_and_keep().source == "measured now"
    assert "not kept" in caplog.text


def test_the_key_follows_hardware_and_versions_and_not_the_name_of_the_machine(monkeypatch):
    key = here.identity()
    monkeypatch.setattr(os, "uname", lambda: None)
    monkeypatch.setenv("HOSTNAME", "another")
    assert here.identity() == key
    for name, value in (("available_cores", lambda: 999), ("_cpu_name", lambda: "another"), ("__version__", "9.9")):
        with monkeypatch.context() as patch:
            patch.setattr(here, name, value)
            assert here.identity() != key


def test_this_machine_can_really_be_measured(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(here, "default_num_threads", lambda: 3)
    monkeypatch.setattr(here, "PARAMETERS", {"cpu": 1 << 18, "cuda": 1 << 18})
    found = here.measure(0.05, updates=True)
    assert set(found.updates_g_s) == set(Moments)
    assert set(found.updates_by_threads_g_s) == {1, 2, 3}  # parts of three, of which a quarter is none
    facts = read_facts(found, "here")
    assert facts.host_bytes > 1 << 28 and facts.host_bytes_per_s > 1e8 and facts.host_flops_per_s > 1e8
    assert all(rate > 1e5 for rate in facts.updates_per_s.values())
    disk = facts.tiers["nvme"]  # of the folder that it runs in, which is as it was
    assert disk.num_bytes > 1 << 20 and min(disk.read_bytes_per_s, disk.write_bytes_per_s) > 1e5
    assert list(tmp_path.iterdir()) == []


def test_where_no_file_can_be_made_there_is_no_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(here, "probe_disk", lambda folder, engine: None)
    assert here._disk_tier(tmp_path) == {}


def test_a_machine_file_comes_back_as_it_was_written(tmp_path):
    written = machine()
    written.updates_g_s = {"float32": 5.0}
    written.updates_by_threads_g_s = {1: 2.0, 2: 4.0}
    (tmp_path / "my.yaml").write_text(dump_machine(written))
    assert load_machine(str(tmp_path / "my.yaml")) == written


def test_training_has_the_threads_that_were_measured_unless_it_names_some(monkeypatch):
    def threads(**memory):
        seen = []
        monkeypatch.setattr("horizon.building.build_runtime", lambda *_, memory, **others: seen.append(memory))
        build_parts(SMALL, memory=MemoryConfig(**memory), lora=None, **SETTINGS)
        return seen[0].update_threads

    assert here.measured_threads() is threads() is None  # all cores but one, then
    file = machine()
    here.keep(file, here.cache_file())
    assert here.measured_threads() is threads() is None  # kept before threads were measured
    file.updates_by_threads_g_s = {1: 1.0, 5: 2.0, 8: 2.01}
    here.keep(file, here.cache_file())
    assert here.measured_threads() == threads() == 5
    assert threads(update_threads=7) == 7
    assert "5 of them for the optimizer (as fast as any, within 3%)" in check_cores().found
