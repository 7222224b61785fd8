"""Binding on the real node 0 of this machine; `tests/numa` proves several nodes in a virtual machine."""

import ctypes
import mmap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from horizon.errors import BudgetError, ConfigError
from horizon.plan.topology import Node, Topology, read_topology
from horizon.store import numa
from horizon.store.arena import HUGE_PAGE, Arena
from horizon.units import GIB, KIB, MIB

pytestmark = pytest.mark.skipif(not read_topology().nodes, reason="the kernel shows no NUMA nodes")
NODE = read_topology().nodes[0].id if read_topology().nodes else 0


@pytest.fixture
def mapping():
    space = mmap.mmap(-1, 4 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    yield ctypes.addressof(ctypes.c_char.from_buffer(space)), space


def test_pages_have_no_node_before_they_are_touched_and_then_the_bound_one(mapping):
    address, space = mapping
    numa.bind(address, len(space), [NODE], "test")
    assert numa.locate([address, address + MIB]) == [-2, -2]
    space[:] = bytes(len(space))
    assert numa.verify(address, len(space), [NODE], "test") == {NODE: len(numa.sample(address, len(space)))}


def test_pages_elsewhere_are_counted_by_place(mapping):
    address, space = mapping
    space[: 2 * MIB] = bytes(2 * MIB)
    message = rf"of \d+ pages of exp_avg that were looked up \d+ nowhere, expected NUMA node {NODE} \(node 0 \(\d+ CPU"
    with pytest.raises(BudgetError, match=message):
        numa.verify(address, len(space), [NODE], "exp_avg")
    with pytest.raises(BudgetError, match=rf"nowhere, \d+ on node {NODE}, expected NUMA nodes 7, 8"):
        numa.verify(address, len(space), [7, 8], "exp_avg")


def test_an_absent_node_is_refused_with_what_there_is_also_beside_a_present_one(mapping):
    for nodes in ([1023], [NODE, 1023], [5000], [-1]):
        with pytest.raises(ConfigError, match=r"test cannot lie on NUMA node -?\d+, found node 0 \(\d+ CPU"):
            numa.bind(mapping[0], 4 * MIB, nodes, "test")


def test_what_has_no_room_is_refused_before_the_kernel_kills_for_it(mapping):
    with pytest.raises(BudgetError, match=r"exp_avg needs 1024 TiB on NUMA node 0 but .* is free there"):
        numa.bind(mapping[0], 1 << 50, [NODE], "exp_avg")


def test_a_system_call_that_fails_is_told_with_the_remedy(mapping):
    with pytest.raises(ConfigError, match=r"the system refuses mbind \(Invalid argument\).*memory\.policy=dram"):
        numa.bind(mapping[0] + 1, 4096, [NODE], "test")  # not the start of a page
    with pytest.raises(ConfigError, match=r"refuses move_pages"):
        numa._call("move_pages", numa._numbers().move_pages, -1, 1, None, None, None, 0)


def test_a_machine_whose_system_calls_are_not_known_is_refused(mapping, monkeypatch):
    monkeypatch.setattr(numa.platform, "machine", lambda: "riscv64")
    with pytest.raises(ConfigError, match=r"on riscv64 \(known: x86_64, aarch64\); use memory\.policy=dram"):
        numa.bind(mapping[0], 4096, [NODE], "test")


def test_the_mode_and_the_mask_follow_the_nodes(monkeypatch):
    calls = []
    nodes = tuple(Node(n, (), GIB, GIB) for n in (0, 3, 70))
    monkeypatch.setattr(numa, "read_topology", lambda: Topology(nodes))
    monkeypatch.setattr(numa, "_call", lambda name, number, *arguments: calls.append(arguments))
    numa.bind(0, 4096, [70], "test")
    numa.bind(0, 4096, [0, 3, 70], "test")
    masks = [sum(word << 64 * i for i, word in enumerate(call[3])) for call in calls]
    assert [call[2] for call in calls] == [numa.MPOL_BIND, numa.MPOL_INTERLEAVE]
    assert masks == [1 << 70, 1 | 1 << 3 | 1 << 70]


@given(st.integers(1, 1 << 42))
def test_samples_are_pages_of_the_mapping_spread_over_all_of_it(num_bytes):
    pages = [address // mmap.PAGESIZE for address in numa.sample(0, num_bytes)]
    last = (num_bytes - 1) // mmap.PAGESIZE
    assert (pages[0], pages[-1]) == (0, last)
    assert pages == sorted(set(pages)) and len(pages) <= numa.SAMPLES
    if last >= 16 * numa.SAMPLES:
        for part in range(8):
            assert sum(part * last <= 8 * page < (part + 1) * last for page in pages) >= numa.SAMPLES // 16


def test_samples_do_not_beat_with_the_turns_of_interleaving():
    for turns in (2, 3, 4, 8):
        for unit in (4 * KIB, 2 * MIB):
            seen = [address // unit % turns for address in numa.sample(0, 64 * GIB)]
            assert min(seen.count(turn) for turn in range(turns)) >= numa.SAMPLES // turns // 2


def test_an_arena_is_bound_touched_looked_up_and_then_registered(monkeypatch):
    order = []
    bind, verify = numa.bind, numa.verify

    def see_bind(address, *arguments):
        assert set(numa.locate([address])) == {-2}
        order.append("bind")
        bind(address, *arguments)

    def see_verify(*arguments):
        order.append("verify")
        return verify(*arguments)

    monkeypatch.setattr(numa, "bind", see_bind)
    monkeypatch.setattr(numa, "verify", see_verify)
    monkeypatch.setattr(Arena, "_register", lambda self, purpose: order.append("register"))
    space = Arena([5000, HUGE_PAGE], "test", True, [NODE])
    assert order == ["bind", "verify", "register"]
    assert not any(bool(region.any()) for region in space.regions)
    space.close()
    Arena([5000], "test", False).close()
    assert len(order) == 3  # no nodes: the kernel decides, and nothing is looked up


def test_an_arena_on_an_absent_node_gives_back_what_it_took():
    with pytest.raises(ConfigError, match=r"weights cannot lie on NUMA node 1023"):
        Arena([HUGE_PAGE], "weights", False, [1023])
    assert torch.equal(Arena([4], "test", False, [NODE]).regions[0], torch.zeros(4, dtype=torch.uint8))
