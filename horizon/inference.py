"""Forward passes that train nothing: losses and logits of the weights as they are, dropout off."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from horizon.runtime import Runtime
from horizon.stream.batch import MicroBatch, num_trained_tokens
from horizon.stream.head import LossFn
from horizon.stream.scores import TokenScores
from horizon.zo.runtime import ZerothOrderRuntime


def mean_loss(runtime: Runtime | ZerothOrderRuntime, batches: Sequence[MicroBatch], loss_fn: LossFn | None) -> float:
    """The mean loss over the trained tokens of all batches."""
    executor = runtime.executor
    losses = runtime.guarded(lambda: [*map(float, executor.evaluate(batches, runtime.version, loss_fn))])
    weights = [1 if loss_fn is None else b.num_tokens for b in batches]
    return sum(loss * w for loss, w in zip(losses, weights, strict=True)) / num_trained_tokens(batches)


def scores(runtime: Runtime | ZerothOrderRuntime, batches: Sequence[MicroBatch]) -> list[TokenScores]:
    """How well the labels of each batch are predicted, on the CPU."""
    executor = runtime.executor
    return runtime.guarded(lambda: [found.cpu() for found in executor.score(batches, runtime.version)])


def last_logits(runtime: Runtime | ZerothOrderRuntime, batches: Sequence[MicroBatch]) -> Tensor:
    """Logits after each row's last position, fp32 [rows, vocabulary] on the CPU."""
    executor = runtime.executor
    logits = runtime.guarded(lambda: [x.cpu() for x in executor.last_logits(batches, runtime.version)])
    return torch.cat(logits).float()
