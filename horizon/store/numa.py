"""Which NUMA nodes a mapping's pages lie on: asked of the kernel before the pages exist, and looked up afterwards.

Raw system calls through ctypes, no libnuma. The order of a region's life, which `horizon.store.arena` keeps:

    mmap -> huge pages -> bind -> first touch by many threads -> verify -> cudaHostRegister

A policy governs pages that come into being after it, so binding comes before the first touch; registering pins pages
where they are, so looking comes before it. Needs the standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import platform
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from horizon.errors import BudgetError, ConfigError, HorizonError
from horizon.plan.topology import read_topology
from horizon.units import format_bytes

log = logging.getLogger(__name__)

MPOL_BIND, MPOL_INTERLEAVE = 2, 3
MAX_NODE = 1024  # bits of the mask handed to the kernel: its own limit on any distribution
BITS = 8 * ctypes.sizeof(ctypes.c_ulong)
SAMPLES = 512  # pages of a mapping that are looked up
STRIDE = 0x9E3779B1  # its multiples are spread over 32 bits: samples do not beat with the turns of interleaving


class Calls(NamedTuple):
    """Numbers of the system calls; x86: asm/unistd_64.h, arm: asm-generic/unistd.h."""

    mbind: int
    move_pages: int


CALLS = {"x86_64": Calls(mbind=237, move_pages=279), "aarch64": Calls(mbind=235, move_pages=239)}


def bind(address: int, num_bytes: int, nodes: Sequence[int], purpose: str) -> None:
    """Have pages that are not there yet come from `nodes`: from the only one, or from several in turn.

    With one node the kernel takes no page from elsewhere; with several it does where one is full, which `verify` sees.

    Args:
        address: of a page.
        purpose: named in errors.

    Raises:
        BudgetError: the nodes have no room. (A bound mapping without room would end in the kernel's OOM killer.)
        ConfigError: the system has no such node, or does not bind.
    """
    topology = read_topology()
    absent = [node for node in nodes if node not in topology.with_memory()]  # the kernel ignores it beside others
    if absent:
        raise ConfigError(f"{purpose} cannot lie on NUMA {_name(absent)}, found {topology}; set memory.cxl_nodes")
    free = topology.free_bytes(nodes)
    if free < num_bytes:
        raise BudgetError(
            f"{purpose} needs {format_bytes(num_bytes)} on NUMA {_name(nodes)} but {format_bytes(free)} is free there; "
            "free memory on it, or name more nodes in memory.cxl_nodes"
        )
    mask = (ctypes.c_ulong * (MAX_NODE // BITS))()
    for node in nodes:
        mask[node // BITS] |= 1 << node % BITS
    mode = MPOL_BIND if len(nodes) == 1 else MPOL_INTERLEAVE
    _call("mbind", _numbers().mbind, address, num_bytes, mode, mask, MAX_NODE + 1, 0)


def bindable() -> bool:
    """Whether this process may choose nodes; a warning where the system has several and refuses."""
    nodes = sorted(read_topology().with_memory())
    if len(nodes) < 2:
        return False
    space = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        bind(ctypes.addressof(ctypes.c_char.from_buffer(space)), len(space), nodes, "a page")
    except HorizonError as error:
        log.warning("memory is not bound to NUMA nodes: %s", error)
        return False
    return True


def locate(addresses: Sequence[int]) -> list[int]:
    """The node of the page at each address; a negative errno where there is none (-2: not touched yet).

    Raises:
        ConfigError: the system does not tell.
    """
    num = len(addresses)
    pages, status = (ctypes.c_void_p * num)(*addresses), (ctypes.c_int * num)()
    _call("move_pages", _numbers().move_pages, 0, num, pages, None, status, 0)
    return list(status)


def verify(address: int, num_bytes: int, nodes: Sequence[int], purpose: str) -> dict[int, int]:
    """Look up a sample of a touched mapping's pages; gives the number of samples on each node.

    Raises:
        BudgetError: some lie elsewhere; says how many and where.
        ConfigError: the system does not tell.
    """
    found = Counter(locate(sample(address, num_bytes)))
    stray = {node: count for node, count in found.items() if node not in nodes}
    if stray:
        where = ", ".join(f"{n} on node {node}" if node >= 0 else f"{n} nowhere" for node, n in sorted(stray.items()))
        raise BudgetError(
            f"of {found.total()} pages of {purpose} that were looked up {where}, expected NUMA {_name(nodes)} "
            f"({read_topology()}); free memory there, or name other nodes in memory.cxl_nodes"
        )
    return dict(found)


def sample(address: int, num_bytes: int) -> list[int]:
    """Addresses of at most `SAMPLES` pages spread over a mapping, the first and the last among them."""
    num_pages = -(-num_bytes // mmap.PAGESIZE)
    if num_pages <= SAMPLES:
        return [address + page * mmap.PAGESIZE for page in range(num_pages)]
    bounds = [i * num_pages // SAMPLES for i in range(SAMPLES + 1)]
    some = [low + (high - low) * (i * STRIDE % 2**32) // 2**32 for i, (low, high) in enumerate(pairwise(bounds))]
    return [address + page * mmap.PAGESIZE for page in [*some[:-1], num_pages - 1]]


def _numbers() -> Calls:
    try:
        return CALLS[platform.machine()]
    except KeyError:
        raise ConfigError(
            f"memory cannot be bound to NUMA nodes on {platform.machine()} (known: {', '.join(CALLS)}); "
            "use memory.policy=dram"
        ) from None


def _call(name: str, number: int, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]  # ints would be cut to 32 bits
    if libc.syscall(ctypes.c_long(number), *words) >= 0:
        return
    code = ctypes.get_errno()
    advice = {
        errno.EPERM: "a container needs the capability SYS_NICE (docker run --cap-add SYS_NICE)",
        errno.ENOSYS: "the kernel was built without NUMA",
    }.get(code, f"the nodes are {read_topology()}")
    raise ConfigError(f"the system refuses {name} ({os.strerror(code)}): {advice}; or use memory.policy=dram")


def _name(nodes: Sequence[int]) -> str:
    return f"node{'s' * (len(nodes) != 1)} {', '.join(map(str, nodes))}"
