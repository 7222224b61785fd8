"""`horizon bench tiers`: what every tier of this machine gives, test by test."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import psutil
import torch

from horizon.bench.disk import PLACE as DISK
from horizon.bench.disk import disk
from horizon.bench.link import link, within
from horizon.bench.memory import Effort, bandwidth, latency, loaded_latency
from horizon.bench.nvme import nvme
from horizon.bench.places import Place, find_places, find_processors, simulated_place
from horizon.bench.policies import Shape, policies
from horizon.bench.update import update
from horizon.errors import HorizonError
from horizon.optim.threads import available_cores
from horizon.plan.topology import Topology, read_topology
from horizon.report.environment import describe_run
from horizon.report.measurements import Measurements, Row, Run, Skipped
from horizon.store.numa import bindable
from horizon.stream.streams import Streams
from horizon.units import GIB, KIB, MIB

Found: TypeAlias = Row | Skipped
Watch: TypeAlias = Callable[[str, Iterator[Found]], Iterable[Found]]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured; the names of what follows each test."""

    memory: Effort
    link_sizes: tuple[int, ...]
    disk_bytes: int
    depths: tuple[int, ...]
    disk_blocks: tuple[int, ...]
    disk_seconds: float
    nvme_bytes: int
    parameters: tuple[int, ...]
    shape: Shape
    gpu_shape: Shape  # a step of the other would be over before a GPU's kernels are launched
    repeats: int


FULL = Plan(
    memory=Effort(
        size=GIB, caches=4, latency_sizes=(32 * KIB, 256 * KIB, 2 * MIB, 16 * MIB, 64 * MIB, 256 * MIB), loads=400_000,
        blocks=(4 * KIB, 64 * KIB, MIB, 16 * MIB), pauses=(100_000, 10_000, 3000, 1000, 300, 0), repeats=7,
    ),
    link_sizes=(MIB, 16 * MIB, 256 * MIB), disk_bytes=GIB, depths=(1, 2, 4, 8, 16, 32),
    disk_blocks=(4 * KIB, 64 * KIB, MIB, 16 * MIB), disk_seconds=0.6, nvme_bytes=GIB,
    parameters=(1_000_000, 4_000_000, 16_000_000, 64_000_000, 200_000_000),
    shape=Shape(hidden_size=512, num_layers=8, vocab_size=8192, rows=4, seq_len=128, steps=6),
    gpu_shape=Shape(hidden_size=1024, num_layers=16, vocab_size=32_768, rows=8, seq_len=1024, steps=10), repeats=5,
)  # fmt: skip
QUICK = Plan(
    memory=Effort(
        size=256 * MIB, caches=4, latency_sizes=(32 * KIB, 2 * MIB), loads=100_000,
        blocks=(4 * KIB, MIB), pauses=(10_000, 1000, 0), repeats=3,
    ),
    link_sizes=(16 * MIB, 256 * MIB), disk_bytes=128 * MIB, depths=(1, 8), disk_blocks=(64 * KIB, 16 * MIB),
    disk_seconds=0.3, nvme_bytes=256 * MIB, parameters=(1_000_000, 16_000_000),
    shape=Shape(hidden_size=512, num_layers=6, vocab_size=4096, rows=2, seq_len=32, steps=3),
    gpu_shape=Shape(hidden_size=1024, num_layers=8, vocab_size=32_768, rows=4, seq_len=1024, steps=5), repeats=3,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Options:
    """What the command was asked for."""

    plan: Plan
    disk_folder: Path
    simulated_gb_per_s: float | None  # None: a quarter of DRAM where no memory-only node is; 0: no stand-in
    command: Sequence[str]


SIMULATED_SHARE = 0.25  # of what updates in DRAM reach: about what AdamW out of cache was seen to lose on CXL


def measure_tiers(options: Options, watch: Watch) -> Measurements:
    """Measure everything that this machine has; `watch` passes on what each test finds, and may tell of it."""
    started, topology = time.perf_counter(), read_topology()
    run, bound = _describe(options, topology), bindable()
    places = find_places(topology, bound)
    rows: list[Row] = []
    skipped: list[Skipped] = []
    if not any(place.cxl for place in places):
        far = any(node.memory_only for node in topology.nodes)
        reason = "this process may not choose NUMA nodes" if far and not bound else "no memory-only NUMA node here"
        skipped.append(Skipped(test="cxl", place="cxl", reason=f"{reason}, found {topology}"))
    for test, place, measured in _tests(options, places, rows):
        try:
            for one in watch(f"{test}: {place}", measured):
                if isinstance(one, Skipped):
                    skipped.append(one)
                else:
                    rows.append(one)
        except HorizonError as error:
            skipped.append(Skipped(test=test, place=place, reason=str(error)))
    run = dataclasses.replace(run, seconds=time.perf_counter() - started)
    return Measurements(run, tuple(rows), tuple(skipped))


def _describe(options: Options, topology: Topology) -> Run:
    """The run that begins now: the machine's other work is seen before ours makes some."""
    run = describe_run(options.command, topology, 0.0)
    return dataclasses.replace(run, facts=run.facts | {"disk": _file_system(options.disk_folder)})


def _file_system(folder: Path) -> str:
    """What the disk that is measured is: `ext4 on /dev/nvme0n1`."""
    parents = {str(folder.resolve()), *map(str, folder.resolve().parents)}
    mounts = [mount for mount in psutil.disk_partitions(all=True) if mount.mountpoint in parents]
    if not mounts:
        return "not told"
    mount = max(mounts, key=lambda one: len(one.mountpoint))
    return f"{mount.fstype} on {mount.device}"


def _tests(
    options: Options, places: Sequence[Place], rows: Sequence[Row]
) -> Iterator[tuple[str, str, Iterator[Found]]]:
    """(test, place, its rows), each begun when it is asked for; `rows`: those so far."""
    plan, topology, on_gpu = options.plan, read_topology(), torch.cuda.is_available()
    for processors in find_processors(topology):
        threads = _threads(len(processors.cpus))
        for place in places:
            yield "latency", place.name, latency(place, processors, plan.memory)
            yield "bandwidth", place.name, bandwidth(place, processors, plan.memory, threads)
            if len(processors.cpus) > 1:
                yield "loaded latency", place.name, loaded_latency(place, processors, plan.memory)
            else:
                alone = "the load needs another processor than the one that waits for it"
                yield "loaded latency", place.name, _skipped("loaded latency", place.name, alone)
    if on_gpu:
        streams = Streams.on(torch.device("cuda", torch.cuda.current_device()))
        for place in places:
            yield "link", place.name, link(place, streams, plan.link_sizes, plan.repeats)
        yield "hbm", "hbm", within(streams, plan.link_sizes[-1], plan.repeats)
    else:
        yield "link", "hbm", _skipped("link", "hbm", "no CUDA device here")
    yield (
        "disk", DISK,
        disk(options.disk_folder, plan.disk_bytes, plan.depths, plan.disk_blocks, plan.repeats, plan.disk_seconds),
    )  # fmt: skip
    yield "nvme", DISK, nvme(options.disk_folder, plan.nvme_bytes, plan.repeats)
    threads = _threads(available_cores())
    for place in places:
        yield "adamw", place.name, update(place, places[0], plan.parameters, threads, plan.repeats)
    simulated = _simulated_gb_per_s(options.simulated_gb_per_s, places, rows)
    if simulated:
        place = simulated_place(simulated)
        yield "adamw", place.name, update(place, places[0], plan.parameters, threads, plan.repeats)
    shape = plan.gpu_shape if on_gpu else plan.shape
    yield "step", "each policy", policies(shape, simulated, options.disk_folder)


def _skipped(test: str, place: str, reason: str) -> Iterator[Found]:
    yield Skipped(test=test, place=place, reason=reason)


def _simulated_gb_per_s(wanted: float | None, places: Sequence[Place], rows: Sequence[Row]) -> float:
    """Of a stand-in for the cxl tier; 0: none."""
    if wanted is not None:
        return wanted
    updates = [row for row in rows if row.test == "adamw"]
    if any(place.cxl for place in places) or not updates:
        return 0.0
    largest = max(row.settings["parameters"] for row in updates)
    reached = max(row.also["gb_per_s"] for row in updates if row.settings["parameters"] == largest)
    return round(SIMULATED_SHARE * reached, 1)


def _threads(num_cpus: int) -> list[int]:
    """1, 2, 4 ... and all of them."""
    return sorted({num_cpus, *(1 << i for i in range(num_cpus.bit_length()) if 1 << i <= num_cpus)})
