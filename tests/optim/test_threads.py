import os

import pytest

from horizon.optim.threads import _cgroup_cores, available_cores, default_num_threads


@pytest.mark.parametrize("allowed, expected", [(1, 1), (2, 1), (16, 15)])
def test_all_cores_but_one_and_at_least_one(monkeypatch, allowed, expected):
    monkeypatch.setattr("horizon.optim.threads.available_cores", lambda: allowed)
    assert default_num_threads() == expected


@pytest.mark.parametrize("quota, expected", [(float("inf"), 8), (2.5, 2), (0.5, 1)])
def test_affinity_and_quota_limit_the_cores(monkeypatch, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr("horizon.optim.threads._cgroup_cores", lambda *_: quota)
    assert available_cores() == expected


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_tightest_quota_up_the_tree_counts_in_cgroup_version_2(tmp_path):
    write(tmp_path / "self", "0::/pod/container\n")
    write(tmp_path / "fs/pod/container/cpu.max", "max 100000\n")
    write(tmp_path / "fs/pod/cpu.max", "350000 100000\n")
    assert _cgroup_cores(tmp_path / "fs", tmp_path / "self") == 3.5


def test_a_container_that_sees_only_its_own_root_finds_its_quota(tmp_path):
    write(tmp_path / "self", "0::/host/path/that/is/not/mounted\n")
    write(tmp_path / "fs/cpu.max", "200000 100000\n")
    assert _cgroup_cores(tmp_path / "fs", tmp_path / "self") == 2


def test_cgroup_version_1(tmp_path):
    write(tmp_path / "self", "4:memory:/x\n3:cpu,cpuacct:/pod\n")
    write(tmp_path / "fs/cpu/pod/cpu.cfs_quota_us", "150000\n")
    write(tmp_path / "fs/cpu/pod/cpu.cfs_period_us", "100000\n")
    write(tmp_path / "fs/cpu/cpu.cfs_quota_us", "-1\n")
    write(tmp_path / "fs/cpu/cpu.cfs_period_us", "100000\n")
    assert _cgroup_cores(tmp_path / "fs", tmp_path / "self") == 1.5


def test_no_cgroup_means_no_limit(tmp_path):
    assert _cgroup_cores(tmp_path / "fs", tmp_path / "self") == float("inf")
