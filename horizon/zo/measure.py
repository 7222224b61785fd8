"""What is found out about a model before its first step: the memory of a block at work, and whether eps moves it."""

from __future__ import annotations

import torch

from horizon.errors import ConfigError
from horizon.stream.batch import to_micro_batches
from horizon.zo.executor import ForwardExecutor
from horizon.zo.masters import Masters
from horizon.zo.plan import WorkingSet
from horizon.zo.settings import ZerothOrder

TOKENS = 16384  # enough that activations make the peak
SAMPLE = 4096  # elements of a parameter that are looked at


def measure_working_set(executor: ForwardExecutor, seq_len: int, rows: int) -> WorkingSet:
    """Peak device bytes of a block at work, as a line in the micro-batch's tokens; on CPU nothing.

    Walks the model with one row and with `rows` rows, no more than it takes to tell; the head's chunk, which does not
    grow with the micro-batch, is part of both.
    """
    if executor.device.type != "cuda":
        return WorkingSet()
    rows = min(rows, max(1, TOKENS // seq_len))
    _peak(executor, 1, seq_len)  # kernels compile, libraries take their workspaces
    one = _peak(executor, 1, seq_len)
    try:
        many = _peak(executor, rows, seq_len) if rows > 1 else None
    except torch.cuda.OutOfMemoryError:  # the budget has no room for that many
        executor.reset()
        torch.cuda.empty_cache()
        many = None
    if many is None:
        return WorkingSet(0, -(-one // seq_len), one)
    per_token = max(0, many - one) // ((rows - 1) * seq_len)
    return WorkingSet(max(0, one - per_token * seq_len), per_token, one)


def _peak(executor: ForwardExecutor, rows: int, seq_len: int) -> int:
    tokens = torch.randint(0, executor.vocab_size, (rows, seq_len), generator=torch.Generator().manual_seed(0))
    (batch,) = to_micro_batches({"input_ids": tokens, "labels": tokens}, executor.device, executor.vocab_size)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    executor.rehearse(batch)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def check_eps(masters: Masters, settings: ZerothOrder, dtype: torch.dtype) -> None:
    """Refuse an eps so small that most weights, perturbed by it, round back to what they were.

    Looks at the first elements of each trained parameter, weighed by its size.

    Raises:
        ConfigError: naming zo.eps.
    """
    moved = total = 0.0
    for layout in masters.layouts:
        for param in layout.trainable:
            span = slice(param.offset, min(param.end, param.offset + SAMPLE))
            weights = masters.read_elements(layout.index, span)
            changed = (weights + settings.eps).to(dtype) != weights.to(dtype)
            moved += float(changed.float().mean()) * param.spec.numel
            total += param.spec.numel
    if moved < total / 2:
        raise ConfigError(
            f"zo.eps={settings.eps} moves {moved / total:.0%} of the weights: to {str(dtype).removeprefix('torch.')}, "
            "which blocks compute in, the others are the same with and without it; expected more, such as 1e-3"
        )
