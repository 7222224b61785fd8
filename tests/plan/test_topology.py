import pytest
from hypothesis import given
from hypothesis import strategies as st

from horizon.errors import ConfigError
from horizon.plan.topology import Topology, parse_list, read_topology
from horizon.units import GIB, KIB

TWO_SOCKETS = {0: ("0-3,8-11", 64), 1: ("4-7,12-15", 64), 2: ("", 128), 3: ("", 256)}


def tree(root, nodes, online=None):
    """A sysfs tree of `nodes`, of which those of the list `online` are online."""
    online = online if online is not None else ",".join(map(str, nodes))
    (root / "online").write_text(online + "\n")
    for number, (cpus, gib) in nodes.items():
        folder = root / f"node{number}"
        folder.mkdir()
        (folder / "cpulist").write_text(cpus + "\n")
        (folder / "distance").write_text(" ".join("10" if n == number else "21" for n in nodes) + "\n")
        kib, free = gib * GIB // KIB, gib * GIB // KIB // 2
        (folder / "meminfo").write_text(
            f"Node {number} MemTotal:       {kib} kB\nNode {number} MemFree:        {free} kB\n"
            f"Node {number} Inactive(file): 1000 kB\nNode {number} Active(file): 24 kB\n"
        )
    return root


def test_two_sockets_and_two_expanders(tmp_path):
    topology = read_topology(tree(tmp_path, TWO_SOCKETS))
    assert [node.id for node in topology.nodes if node.memory_only] == [2, 3]
    assert topology.nodes[1].cpus == (4, 5, 6, 7, 12, 13, 14, 15)
    assert topology.nodes[3].total_bytes == 256 * GIB
    assert topology.free_bytes([2, 3]) == 192 * GIB + 2 * 1024 * KIB
    assert topology.nodes[2].distances == {0: 21, 1: 21, 2: 10, 3: 21}
    assert topology.cxl_nodes("auto") == (2, 3)
    assert topology.dram_nodes((2, 3)) == (0, 1)
    assert str(topology) == (
        "node 0 (8 CPUs, 64 GiB), node 1 (8 CPUs, 64 GiB), node 2 (no CPUs, 128 GiB), node 3 (no CPUs, 256 GiB)"
    )


def test_a_node_that_is_offline_is_not_there(tmp_path):
    topology = read_topology(tree(tmp_path, TWO_SOCKETS, "0,3"))
    assert topology.cxl_nodes("auto") == (3,)
    with pytest.raises(ConfigError, match=r"\[2\]: node 2 is not online or has no memory, found node 0 .*node 3 \("):
        topology.cxl_nodes([2])


def test_a_node_without_memory_is_no_candidate(tmp_path):
    topology = read_topology(tree(tmp_path, {0: ("0", 8), 1: ("1", 0), 2: ("", 0)}))
    assert topology.dram_nodes() == (0,)
    with pytest.raises(ConfigError, match=r"no memory-only NUMA node is online here, found node 0 \(1 CPU, 8 GiB\)"):
        topology.cxl_nodes("auto")
    with pytest.raises(ConfigError, match="node 1 is not online or has no memory"):
        topology.cxl_nodes([1])


def test_a_kernel_without_numa(tmp_path):
    topology = read_topology(tmp_path / "none")
    assert topology == Topology(())
    with pytest.raises(ConfigError, match=r"found no NUMA nodes \(the kernel shows none\); .*memory\.cxl_simulated"):
        topology.cxl_nodes("auto")
    with pytest.raises(ConfigError, match="found no NUMA nodes"):
        topology.cxl_nodes([0])


def test_the_other_socket_may_stand_in_but_some_dram_must_be_left(tmp_path):
    topology = read_topology(tree(tmp_path, TWO_SOCKETS))
    assert topology.cxl_nodes([3, 1, 1]) == (1, 3)
    assert topology.dram_nodes((1, 3)) == (0,)
    with pytest.raises(ConfigError, match=r"\[0, 1\] leaves no node with CPUs for DRAM, found node 0"):
        topology.cxl_nodes([0, 1])


@pytest.mark.parametrize("wanted", ["all", [], ["2"], [1.5]])
def test_what_names_no_nodes_is_refused(tmp_path, wanted):
    with pytest.raises(ConfigError, match=r"memory\.cxl_nodes=.*expected auto or a list of NUMA nodes"):
        read_topology(tree(tmp_path, TWO_SOCKETS)).cxl_nodes(wanted)


@given(st.sets(st.integers(0, 300)))
def test_kernel_lists_are_read(numbers):
    runs, text = sorted(numbers), ""
    while runs:
        end = next((i for i in range(1, len(runs)) if runs[i] != runs[0] + i), len(runs))
        text += f",{runs[0]}-{runs[end - 1]}" if end > 1 else f",{runs[0]}"
        runs = runs[end:]
    assert parse_list(text[1:] + "\n") == tuple(sorted(numbers))
