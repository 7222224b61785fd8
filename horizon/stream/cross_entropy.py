"""Next-token cross-entropy and its gradient in one kernel that reads the logits twice and writes the gradient once.

In torch the same takes an fp32 copy of the log-probabilities, a second one of their gradient, and five passes.
Everything is fp32 inside; only the gradient is rounded, to the logits' dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits of a row that one program holds at a time


@triton.jit  # type: ignore[untyped-decorator]
def _cross_entropy(logits, gradient, targets, losses, vocab, scale, ignored: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    logits += row * vocab
    gradient += row * vocab
    columns = tl.arange(0, block)
    if target == ignored:
        tl.store(losses + row, 0.0)
        for start in range(0, vocab, block):
            zeros = tl.zeros((block,), gradient.dtype.element_ty)
            tl.store(gradient + start + columns, zeros, mask=start + columns < vocab)
        return
    largest = tl.full((), -3e38, tl.float32)  # finite: a model may mask logits with -inf
    total = tl.zeros((), tl.float32)
    for start in range(0, vocab, block):
        x = tl.load(logits + start + columns, mask=start + columns < vocab, other=float("-inf")).to(tl.float32)
        above = tl.maximum(largest, tl.max(x))
        total = total * tl.exp(largest - above) + tl.sum(tl.exp(x - above))
        largest = above
    log_sum = largest + tl.log(total)
    tl.store(losses + row, (log_sum - tl.load(logits + target).to(tl.float32)))
    for start in range(0, vocab, block):
        column = start + columns
        x = tl.load(logits + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
        share = tl.exp(x - log_sum) - tl.where(column == target, 1.0, 0.0)
        tl.store(gradient + column, (share * scale).to(gradient.dtype.element_ty), mask=column < vocab)


def fused_cross_entropy(logits: Tensor, targets: Tensor, scale: float, ignored: int) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy times `scale`, and its gradient.

    Args:
        logits: [N, V] on a CUDA device, rows contiguous.
        targets: [N], `ignored` where a row counts nothing.

    Returns:
        the loss (fp32 scalar) and the gradient with respect to the logits ([N, V], of their dtype).
    """
    num_rows, vocab = logits.shape
    logits = logits.contiguous()
    gradient, losses = torch.empty_like(logits), torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    _cross_entropy[(num_rows,)](
        logits, gradient, targets.contiguous(), losses, vocab, scale, ignored=ignored, block=BLOCK, num_warps=16
    )
    return losses.sum() * scale, gradient


@triton.jit  # type: ignore[untyped-decorator]
def _losses(logits, targets, losses, vocab, ignored: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    logits += row * vocab
    columns = tl.arange(0, block)
    if target == ignored:
        tl.store(losses + row, 0.0)
        return
    largest = tl.full((), -3e38, tl.float32)  # finite: a model may mask logits with -inf
    total = tl.zeros((), tl.float32)
    for start in range(0, vocab, block):
        x = tl.load(logits + start + columns, mask=start + columns < vocab, other=float("-inf")).to(tl.float32)
        above = tl.maximum(largest, tl.max(x))
        total = total * tl.exp(largest - above) + tl.sum(tl.exp(x - above))
        largest = above
    tl.store(losses + row, (largest + tl.log(total) - tl.load(logits + target).to(tl.float32)))


def cross_entropies(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """The cross-entropy of each row of `logits` [N, V], fp32 [N]; 0 where the target is `ignored`. No gradient."""
    num_rows, vocab = logits.shape
    logits, losses = logits.contiguous(), torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    _losses[(num_rows,)](logits, targets.contiguous(), losses, vocab, ignored=ignored, block=BLOCK, num_warps=16)
    return losses
