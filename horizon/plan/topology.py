"""The machine's NUMA nodes as the kernel shows them in sysfs: CPUs, memory, distances.

A node that has memory and no CPUs is a CXL candidate: expanders, and far memory of other kinds, look like that. Pure
reading; nothing is bound here (`horizon.store.numa`). Needs the standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from horizon.errors import ConfigError
from horizon.units import KIB, format_bytes

SYSFS = Path("/sys/devices/system/node")


@dataclass(frozen=True, slots=True)
class Node:
    """One NUMA node that is online."""

    id: int
    cpus: tuple[int, ...]
    total_bytes: int
    free_bytes: int  # unused, or page cache, which the kernel gives up
    distances: Mapping[int, int] = field(default_factory=dict)  # to each online node; 10: itself

    @property
    def memory_only(self) -> bool:
        """Memory that no CPU is next to."""
        return self.total_bytes > 0 and not self.cpus

    def __str__(self) -> str:
        cpus = f"{len(self.cpus)} CPU{'s' * (len(self.cpus) != 1)}" if self.cpus else "no CPUs"
        return f"node {self.id} ({cpus}, {format_bytes(self.total_bytes)})"


@dataclass(frozen=True, slots=True)
class Topology:
    """All nodes that are online, by number."""

    nodes: tuple[Node, ...]

    def __str__(self) -> str:
        return ", ".join(map(str, self.nodes)) if self.nodes else "no NUMA nodes (the kernel shows none)"

    def free_bytes(self, nodes: Iterable[int]) -> int:
        """Room on these nodes together."""
        return sum(node.free_bytes for node in self.nodes if node.id in set(nodes))

    def with_memory(self) -> frozenset[int]:
        """Nodes that have any."""
        return frozenset(node.id for node in self.nodes if node.total_bytes)

    def dram_nodes(self, cxl_nodes: Sequence[int] = ()) -> tuple[int, ...]:
        """Nodes whose memory is the dram tier: with CPUs, and not given to the cxl tier."""
        return tuple(n.id for n in self.nodes if n.cpus and n.total_bytes and n.id not in cxl_nodes)

    def cxl_nodes(self, wanted: str | Sequence[int]) -> tuple[int, ...]:
        """Nodes of the cxl tier: the memory-only ones for `auto`, else those of the list.

        A node with CPUs may be named, too: memory of another socket is the usual stand-in for an expander.

        Raises:
            ConfigError: there is none, or one named is absent or has no memory; says what was found.
        """
        if wanted == "auto":
            found = tuple(node.id for node in self.nodes if node.memory_only)
            if not found:
                raise ConfigError(
                    f"memory.cxl_nodes=auto: no memory-only NUMA node is online here, found {self}; name nodes "
                    "(memory.cxl_nodes=[1]), study policies with memory.cxl_simulated.size, or use memory.policy=dram"
                )
            return found
        if isinstance(wanted, str) or not wanted or not all(isinstance(node, int) for node in wanted):
            raise ConfigError(f"memory.cxl_nodes={wanted!r}: expected auto or a list of NUMA nodes, such as [2,3]")
        absent = [node for node in wanted if node not in self.with_memory()]
        if absent:
            raise ConfigError(
                f"memory.cxl_nodes={list(wanted)}: node {absent[0]} is not online or has no memory, found {self}; "
                "name nodes that have"
            )
        if not self.dram_nodes(wanted):
            raise ConfigError(
                f"memory.cxl_nodes={list(wanted)} leaves no node with CPUs for DRAM, found {self}; name fewer"
            )
        return tuple(sorted(set(wanted)))


def read_topology(root: Path = SYSFS) -> Topology:
    """The nodes below `root`; none where the kernel was built without NUMA."""
    online = parse_list(_read(root / "online"))
    return Topology(tuple(_read_node(root / f"node{number}", number, online) for number in online))


def _read_node(folder: Path, number: int, online: Sequence[int]) -> Node:
    sizes = {key: int(kib) * KIB for key, kib in re.findall(r"(\S+):\s+(\d+) kB", _read(folder / "meminfo"))}
    distances = [int(word) for word in _read(folder / "distance").split()]
    return Node(
        number,
        parse_list(_read(folder / "cpulist")),
        sizes.get("MemTotal", 0),
        sum(sizes.get(key, 0) for key in ("MemFree", "Active(file)", "Inactive(file)")),
        dict(zip(online, distances, strict=False)),  # the kernel lists online nodes only
    )


def parse_list(text: str) -> tuple[int, ...]:
    """The numbers of a kernel list such as `0-2,5`."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        if part.strip():
            first, _, last = part.partition("-")
            numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
