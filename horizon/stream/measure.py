"""What a block at work takes on the device, measured on the real kernels with one and two rows.

Activations of a block grow with the tokens of a micro-batch; the slope and the base come from the allocator's own
count, so fused kernels, attention backends and their workspaces are what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from horizon.config.schema import Recompute
from horizon.plan.activations import WorkingSet
from horizon.stream.batch import MicroBatch, to_micro_batches

if TYPE_CHECKING:
    from horizon.stream.executor import Executor


KEEPING_TOKENS = 4096  # of a row whose kept bytes are counted: they grow with the tokens and nothing else
TOKENS = 16384  # enough that activations, not parameter gradients, make the peak


def measured_rows(seq_len: int, max_rows: int) -> int:
    """Rows that a measurement runs at most: no more than any micro-batch will have, and no more than it takes."""
    return min(max_rows, max(2, TOKENS // seq_len))


def measure_working_set(executor: Executor, seq_len: int, rows: int, version: int, kinds: Set[Recompute]) -> WorkingSet:
    """Peak device bytes of a block's recompute and backward, as a line in the micro-batch's tokens.

    Runs every kind of layer with `rows` rows of `seq_len` tokens and with half as many, and a chunk of the head, which
    does not grow with the micro-batch. Where the budget has no room for that, with a single row. On CPU the stand-in
    has no memory of its own for kernels: only what layers keep is counted, where they are to keep something.
    """
    selective, graph = _kept(executor, min(seq_len, KEEPING_TOKENS), version, kinds)
    if executor.device.type != "cuda":
        return WorkingSet(0, 0, 0, selective, graph)
    found = None
    with suppress(torch.cuda.OutOfMemoryError):
        found = _measure(executor, rows, seq_len, version)
    if found is None:  # only here, where the error no longer holds what the frames that it passed had allocated
        executor.reset()
        torch.cuda.empty_cache()
        found = _measure(executor, 1, seq_len, version)
    base, per_token, head = found
    return WorkingSet(base, per_token, head, selective, graph)


def _kept(executor: Executor, tokens: int, version: int, kinds: Set[Recompute]) -> tuple[int, int]:
    """Bytes per token of one layer's linear outputs, and of its graph, as far as `kinds` asks for them."""
    asked = [kind for kind in (Recompute.selective, Recompute.none) if kind in kinds]
    if not asked and executor.device.type != "cuda":
        return 0, 0
    sizes = executor.rehearse_keeping(sample_batch(executor, 1, tokens)[0], version, asked)
    per_token = {kind: -(-num_bytes // tokens) for kind, num_bytes in zip(asked, sizes, strict=True)}
    return per_token.get(Recompute.selective, 0), per_token.get(Recompute.none, 0)


def _measure(executor: Executor, rows: int, seq_len: int, version: int) -> tuple[int, int, int]:
    executor.rehearse_layers(sample_batch(executor, 1, seq_len), version)  # kernels compile, libraries take workspaces
    many = _peak(lambda: executor.rehearse_layers(sample_batch(executor, rows, seq_len), version))
    few, half = 0, rows // 2
    if half:
        few = _peak(lambda: executor.rehearse_layers(sample_batch(executor, half, seq_len), version))
    head = _peak(lambda: executor.rehearse_head(rows * seq_len, version))
    torch.cuda.empty_cache()
    per_token = max(0, many - few) // ((rows - half) * seq_len)
    return max(0, many - per_token * rows * seq_len), per_token, head


def sample_batch(executor: Executor, rows: int, seq_len: int) -> list[MicroBatch]:
    """A micro-batch of random tokens, all trained, on the device."""
    tokens = torch.randint(0, executor.vocab_size, (rows, seq_len), generator=torch.Generator().manual_seed(0))
    return to_micro_batches({"input_ids": tokens, "labels": tokens}, executor.device, executor.vocab_size)


def _peak(work: Callable[[], None]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
