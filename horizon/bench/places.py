"""Where `horizon bench tiers` measures: the machine's memories, and the processors that look at them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from horizon.errors import BudgetError
from horizon.plan.cxl import CxlTier
from horizon.plan.machine import available_host_bytes
from horizon.plan.topology import Topology
from horizon.units import format_bytes, parse_bytes

CPUS = Path("/sys/devices/system/cpu")
TAKEN = 0.8  # of the memory that is available: more is not asked for


@dataclass(frozen=True, slots=True)
class Place:
    """A memory: its name in rows, and the NUMA nodes to bind to (none: where the kernel puts pages)."""

    name: str
    nodes: tuple[int, ...] = ()
    cxl: bool = False
    bytes_per_s: float | None = None  # of a stand-in

    @property
    def simulated(self) -> bool:
        """It is ordinary memory, slowed down."""
        return self.bytes_per_s is not None


ONLY = "dram node 0"  # also where memory is not bound: rows of such a machine compare with those of others


@dataclass(frozen=True, slots=True)
class Processors:
    """CPUs that are next to one memory."""

    name: str
    cpus: tuple[int, ...]


def find_places(topology: Topology, bindable: bool) -> list[Place]:
    """One for each node with memory, and one for all memory-only nodes together."""
    if not bindable:
        return [Place(ONLY)]
    with_memory = [node for node in topology.nodes if node.total_bytes]
    places = [Place(f"{'cxl' if n.memory_only else 'dram'} node {n.id}", (n.id,), n.memory_only) for n in with_memory]
    far = tuple(node.id for node in with_memory if node.memory_only)
    if len(far) > 1:
        places.append(Place(f"cxl nodes {'+'.join(map(str, far))}", far, True))
    return places


def simulated_place(gb_per_s: float) -> Place:
    """A stand-in for a cxl tier of that bandwidth."""
    return Place(CxlTier(bytes_per_s=gb_per_s * 1e9).name, cxl=True, bytes_per_s=gb_per_s * 1e9)


def find_processors(topology: Topology) -> list[Processors]:
    """Those that this process may use, by node."""
    allowed = os.sched_getaffinity(0)
    found = [Processors(f"node {n.id}", tuple(sorted(allowed & set(n.cpus)))) for n in topology.nodes]
    return [one for one in found if one.cpus] or [Processors("node 0", tuple(sorted(allowed)))]


def last_cache_bytes(cpus: Sequence[int], root: Path = CPUS) -> int:
    """What the last caches of these processors hold together; 0 where the kernel does not tell."""
    found: dict[tuple[int, str], int] = {}
    for folder in (folder for cpu in cpus for folder in (root / f"cpu{cpu}" / "cache").glob("index*")):
        with suppress(OSError):
            level, size, sharing = (
                (folder / name).read_text().strip() for name in ("level", "size", "shared_cpu_list")
            )
            found[int(level), sharing] = parse_bytes(size, "cache")
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last)


def require_room(num_bytes: int, place: Place) -> None:
    """Raise a BudgetError where measuring would take memory that is not there: touching it would end the process."""
    available = available_host_bytes()
    if num_bytes > TAKEN * available:
        raise BudgetError(
            f"measuring {place.name} takes {format_bytes(num_bytes)} of memory, {format_bytes(available)} are "
            "available; free some, or use --quick"
        )


def together(cpus: Sequence[int], works: Sequence[Callable[[], object]]) -> float:
    """Seconds that the works take, each on a thread of its own on these CPUs, from a common start to the last end.

    Raises:
        BaseException: that of the first work that failed.
    """
    errors: list[BaseException] = []
    ready = threading.Barrier(len(works) + 1)

    def run(work: Callable[[], object], cpu: int) -> None:
        try:
            os.sched_setaffinity(0, {cpu})  # of this thread alone
            ready.wait()
            work()
        except BaseException as error:
            errors.append(error)
            ready.abort()

    threads = [threading.Thread(target=run, args=(w, cpus[i % len(cpus)])) for i, w in enumerate(works)]
    for thread in threads:
        thread.start()
    started = time.perf_counter()
    try:
        with suppress(threading.BrokenBarrierError):  # of which `errors` says why
            ready.wait()
        started = time.perf_counter()
    finally:  # interrupted or not, nobody uses the memory any more
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return time.perf_counter() - started
