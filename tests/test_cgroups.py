import pytest

from horizon.cgroups import memory_groups


def room(tmp_path, membership, files):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "membership").write_text(membership)
    found = memory_groups(tmp_path, tmp_path / "membership")
    return min((group.room for group in found), default=None)


V2, V1 = "0::/\n", "4:memory:/\n"


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        (V2, {"memory.max": "1000\n", "memory.current": "400\n"}, 600),
        (V2, {"memory.max": "1000", "memory.current": "1400"}, 0),
        (V1, {"memory/memory.limit_in_bytes": "900", "memory/memory.usage_in_bytes": "100"}, 800),
        (V2, {"memory.max": "max\n", "memory.current": "400\n"}, None),
        (V2, {"memory.max": "1000"}, None),
        (V2, {}, None),
    ],
    ids=["v2", "v2 over its limit", "v1", "v2 without a limit", "v2 without usage", "no cgroup"],
)
def test_room_below_a_cgroups_limit(tmp_path, membership, files, expected):
    assert room(tmp_path, membership, files) == expected


def group(limit, used, folder="", cache=0):
    stat = {f"{folder}memory.stat": f"anon 5\ninactive_file {cache}\n"} if cache else {}
    return {f"{folder}memory.max": str(limit), f"{folder}memory.current": str(used)} | stat


def test_the_tightest_of_nested_groups_counts(tmp_path):
    files = group("max", 500) | group(1000, 500, "slice/") | group(2000, 300, "slice/job/")
    assert room(tmp_path, "0::/slice/job\n", files) == 500


def test_cache_that_the_kernel_gives_up_first_is_room(tmp_path):
    assert room(tmp_path, V2, group(1000, 900, cache=600)) == 700


def test_a_container_that_is_told_the_hosts_path_finds_its_own_group_at_the_root(tmp_path):
    assert room(tmp_path, "0::/kubepods/pod1/abc\n", group(1000, 100)) == 900


def test_of_both_versions_side_by_side_the_one_that_controls_memory_counts(tmp_path):
    files = {"memory/job/memory.limit_in_bytes": "700", "memory/job/memory.usage_in_bytes": "100"}
    assert room(tmp_path, "4:memory:/job\n1:cpu:/other\n0::/\n", files) == 600
