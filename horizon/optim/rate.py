"""What the machine can do, tried before the states are allocated, on memory that is given back at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import count

import torch

from horizon.config.schema import MasterFormat, Moments
from horizon.layout import PARAM_ALIGN, ParamSpec, place_block
from horizon.optim.adamw import AdamW
from horizon.optim.pace import Pace
from horizon.optim.states import UpdateStates
from horizon.optim.updater import Updater
from horizon.plan.cost import Rates, update_bytes
from horizon.plan.cxl import NO_CXL, CxlTier
from horizon.plan.states import states_of
from horizon.store.gradients import KeptGradients
from horizon.store.host import HostStore
from horizon.store.tiers import Nodes
from horizon.stream.streams import Streams
from horizon.stream.timing import measure_copies, measure_joins
from horizon.units import align_up

# 8 to 16 bytes each: more than a processor's cache holds, and for many cores long against waking their threads
PARAMETERS = {"cuda": 128 << 20, "cpu": 4 << 20}
SWEEPS = 3  # updates of it all, the best of which counts: the first one takes its pages
CHUNKS_A_THREAD = 4


@lru_cache(maxsize=8)
def measure_rates(
    device: torch.device, num_threads: int, grad_dtype: torch.dtype, optimizer: AdamW, cxl: CxlTier = NO_CXL
) -> Rates:
    """Rates of copies and updates, each with nothing else going on; measured once per process."""
    streams = Streams.on(device)
    up, down, within = measure_copies(streams)
    joins = measure_joins(streams) if grad_dtype is torch.float32 else math.inf
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Rates(
        up_bytes_per_s=up,
        down_bytes_per_s=down,
        device_bytes_per_s=within,
        updates_per_s=measure_update_rate(PARAMETERS[device.type], num_threads, grad_dtype, optimizer),
        overlaps=device.type == "cuda",
        joins_per_s=joins,
        cxl_bytes_per_s=cxl_bytes_per_s(cxl, num_threads, grad_dtype, optimizer),
    )


def cxl_bytes_per_s(cxl: CxlTier, num_threads: int, grad_dtype: torch.dtype, optimizer: AdamW) -> float:
    """Bytes that updates read and write in a second with all states on the tier; inf without one."""
    if cxl.bytes_per_s is not None or not cxl.num_bytes:
        return cxl.bytes_per_s or math.inf
    size = update_bytes(states_of(MasterFormat(optimizer.master), Moments(optimizer.moments)), grad_dtype)
    num_parameters = min(PARAMETERS["cuda"], int(cxl.num_bytes / (2 * size)))
    return size * measure_update_rate(num_parameters, num_threads, grad_dtype, optimizer, cxl.nodes)


def measure_update_rate(
    num_parameters: int, num_threads: int, grad_dtype: torch.dtype, optimizer: AdamW, nodes: tuple[int, ...] = ()
) -> float:
    """Parameters per second, with nothing else using the host's memory; all states on `nodes` where some are given."""
    times = update_seconds(num_parameters, num_threads, grad_dtype, optimizer, lambda *_: nodes)
    return num_parameters / min(times)


def update_seconds(
    num_parameters: int,
    num_threads: int,
    grad_dtype: torch.dtype,
    optimizer: AdamW,
    nodes: Nodes,
    pace: Pace | None = None,
    sweeps: int = SWEEPS,
) -> list[float]:
    """Seconds of updates of one block, one after the other, with nothing else using the host's memory.

    Args:
        nodes, pace: where its states are, as `HostStore` and `Updater` take them.
    """
    with _one_block(num_parameters, grad_dtype, optimizer, nodes) as update:
        return update(num_threads, sweeps, pace)


def update_rates(
    num_parameters: int, threads: Sequence[int], grad_dtype: torch.dtype, optimizer: AdamW
) -> dict[int, float]:
    """Parameters per second by threads, one number of them after the other on the same states."""
    with _one_block(num_parameters, grad_dtype, optimizer, lambda *_: ()) as update:
        update(threads[-1], 1, None)  # takes the pages
        return {num: num_parameters / min(update(num, SWEEPS, None)) for num in threads}


def _sweep_seconds(updater: Updater, step: int) -> float:
    started = time.perf_counter()
    updater.submit(step, lr=1e-5, grad_scale=1.0)
    updater.wait()
    return time.perf_counter() - started


@contextmanager
def _one_block(
    num_parameters: int, grad_dtype: torch.dtype, optimizer: AdamW, nodes: Nodes
) -> Iterator[Callable[[int, int, Pace | None], list[float]]]:
    """A block that can be updated, by so many threads so many times; gives the seconds of each."""
    layout = place_block(0, "rate", [ParamSpec("rate", "rate", (num_parameters,))])
    store = HostStore(
        [layout], pin=False, pin_residual=False, moments=Moments(optimizer.moments),
        master=MasterFormat(optimizer.master), nodes=nodes,
    )  # fmt: skip
    buffers = KeptGradients([layout], grad_dtype, pin=False, nodes=nodes)
    buffers.claim(0).fill_(1)  # reading pages that nobody wrote would cost nothing

    def states(block: int) -> UpdateStates:
        return UpdateStates.of_tensors(**store.states(block), grads=buffers.claim(block))

    steps = count(1)

    def update(num_threads: int, sweeps: int, pace: Pace | None) -> list[float]:
        chunk = align_up(-(-num_parameters // (CHUNKS_A_THREAD * num_threads)), PARAM_ALIGN)
        updater = Updater([layout], states, store.ledger, optimizer, num_threads, lambda block: None, chunk, pace=pace)
        try:
            return [_sweep_seconds(updater, next(steps)) for _ in range(sweeps)]
        finally:
            updater.close()

    try:
        yield update
    finally:
        buffers.close()
        store.close()
