"""What a block at work takes on the device, measured on the real kernels with one and two rows.

Activations of a block grow with the tokens of a micro-batch; the slope and the base come from the allocator's own
count, so fused kernels, attention backends and their workspaces are what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from horizon.plan.memory import WorkingSet
from horizon.stream.batch import MicroBatch, to_micro_batches

if TYPE_CHECKING:
    from horizon.stream.executor import Executor


def measure_working_set(executor: Executor, seq_len: int, version: int) -> WorkingSet:
    """Peak device bytes of a block's recompute and backward, as a line in the micro-batch's tokens.

    Runs every kind of layer once with 1 and once with 2 rows of `seq_len` tokens; CUDA only.
    """
    peaks = [_peak(lambda rows=rows: executor.rehearse(_batch(executor, rows, seq_len), version)) for rows in (1, 2)]
    per_token = max(0, peaks[1] - peaks[0]) // seq_len
    return WorkingSet(base=max(0, peaks[0] - per_token * seq_len), per_token=per_token)


def _batch(executor: Executor, rows: int, seq_len: int) -> list[MicroBatch]:
    tokens = torch.randint(0, executor.vocab_size, (rows, seq_len), generator=torch.Generator().manual_seed(0))
    return to_micro_batches({"input_ids": tokens, "labels": tokens}, executor.device, executor.vocab_size)


def _peak(work: Callable[[], None]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
