"""Placement on several nodes, by horizon's own code and the kernel's word, in a virtual machine (`make test-numa`).

Two nodes with a CPU each, two with memory only. It proves where pages are, never how fast they are.
"""

import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.numa.initrd import initrd

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(600)]

HERE = Path(__file__).parent
KERNELS = Path(__file__).parents[2] / "build" / "numa" / "boot", Path("/boot")
PAGES = (24 << 20) // 4096
MIB = {0: 512, 1: 256, 2: 192, 3: 256}
COMMAND = [
    "qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", str(sum(MIB.values())),
    "-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio",
    *(word for node, mib in MIB.items() for word in (
        "-object", f"memory-backend-ram,id=m{node},size={mib}M",
        "-numa", f"node,nodeid={node},memdev=m{node}" + (f",cpus={node}" if node < 2 else ""))),
    *(word for a, b, distance in ((0, 1, 21), (0, 2, 40), (1, 2, 50), (0, 3, 50), (1, 3, 40), (2, 3, 60))
      for word in ("-numa", f"dist,src={a},dst={b},val={distance}")),
]  # fmt: skip


def find_kernel():
    kernels = [path for folder in KERNELS for path in sorted(folder.glob("vmlinuz*")) if os.access(path, os.R_OK)]
    return kernels[-1] if kernels else None


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What the virtual machine printed."""
    if platform.machine() != "x86_64":
        pytest.skip("the virtual machine runs this machine's interpreter, and is an x86_64 one")
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("needs QEMU: apt-get install qemu-system-x86 (make test-numa does, as root)")
    kernel = find_kernel()
    if kernel is None:
        pytest.skip("needs a readable kernel in build/numa/boot or /boot (make test-numa fetches one)")
    disk = tmp_path_factory.mktemp("numa") / "initrd.gz"
    disk.write_bytes(initrd(HERE / "proof.py", ["json", "traceback", "horizon.store.numa"]))
    boot = ["-kernel", str(kernel), "-initrd", str(disk), "-append", "console=ttyS0 loglevel=1 panic=-1"]
    done = subprocess.run([*COMMAND, *boot], capture_output=True, text=True, timeout=500, stdin=subprocess.DEVNULL)
    rows = [json.loads(line.split("PROOF ")[1]) for line in done.stdout.splitlines() if "PROOF {" in line]
    assert "PROOF-END" in done.stdout and "Traceback" not in done.stdout, done.stdout[-4000:] + done.stderr
    for row in rows:
        print(row)
    return rows


def one(told, what):
    (row,) = [row for row in told if row["what"] == what]
    return row


def placed(told, nodes):
    return [row for row in told if row["what"] == "placed" and row["nodes"] == nodes]


def test_the_memory_only_nodes_are_found(told):
    row = one(told, "topology")
    assert (row["cpus"], row["auto"], row["dram"]) == ([1, 1, 0, 0], [2, 3], [0, 1])
    assert row["distances"] == [[10, 21, 40, 50], [21, 10, 50, 40], [40, 50, 10, 60], [50, 40, 60, 10]]


def test_without_binding_nothing_lies_on_the_memory_only_nodes(told):
    rows = placed(told, [])
    assert len(rows) == 2
    for row in rows:
        assert set(row["pages"]) <= {"0", "1"}
        assert "expected NUMA node 2" in row["wrong"]


@pytest.mark.parametrize("node", range(4))
def test_every_page_is_on_the_one_node_that_was_asked_for(told, node):
    rows = placed(told, [node])
    assert [row["pages"] for row in rows] == [{str(node): PAGES}] * 2
    assert [row["wrong"] for row in rows] == [None] * 2


@pytest.mark.parametrize("nodes", [[2, 3], [0, 1, 2, 3]], ids=["striped over cxl", "interleaved over all"])
def test_pages_take_turns_over_several_nodes(told, nodes):
    small, huge = placed(told, nodes)
    for row, unit in ((small, 1), (huge, 512)):
        assert set(row["pages"]) == set(map(str, nodes))
        assert sum(row["pages"].values()) == PAGES
        assert all(abs(count - PAGES / len(nodes)) <= unit for count in row["pages"].values()), row
        assert row["wrong"] is None


def test_an_absent_node_and_one_without_room_are_refused(told):
    assert "ConfigError: weights cannot lie on NUMA node 9, found node 0 (1 CPU, " in one(told, "absent")["wrong"]
    assert "BudgetError: weights needs 1 GiB on NUMA node 2 but " in one(told, "no room")["wrong"]


def test_pages_elsewhere_are_seen(told):
    assert " on node 3, expected NUMA node 2 (node 0 (1 CPU, " in one(told, "other node")["wrong"]
    row = one(told, "spilled")
    assert set(row["pages"]) > {"2", "3"}
    assert " on node 0, expected NUMA nodes 2, 3 " in row["wrong"]
