"""The loss of a forward pass alone: cross-entropy in chunks of tokens, or any function of the logits.

Nothing is differentiated, so a loss may be accuracy, F1 or a reward. Sums are in double: a step lives from the small
difference between two losses.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from horizon.errors import BatchError
from horizon.models.blocks import BlockModel, Params
from horizon.stream.batch import IGNORED, MicroBatch
from horizon.stream.head import LossFn, chunks


class HeadLosses:
    """The head block's loss of one micro-batch, without gradients.

    Args:
        chunk: tokens whose logits exist at once; a loss of the caller's gets all of a micro-batch's.
    """

    def __init__(self, model: BlockModel, chunk: int, device: torch.device):
        self._model, self.chunk = model, chunk
        self._cross_entropies = _cross_entropies(device)

    def loss(self, params: Params, hidden: Tensor, batch: MicroBatch, loss_fn: LossFn | None) -> Tensor:
        """The summed cross-entropy, or `loss_fn`'s value: a double on the device.

        Args:
            params: of the head block.
            hidden: [B, T, H], the last layer's output.

        Raises:
            BatchError: `loss_fn` gave something else than one number.
        """
        if loss_fn is not None:
            return _as_scalar(loss_fn(self._model.logits(params, hidden), batch.batch), hidden.device)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for _, states, targets in chunks(hidden, batch.targets, self.chunk):
            logits = self._model.logits(params, states)
            total += self._cross_entropies(logits.view(-1, logits.shape[-1]), targets.reshape(-1)).sum(
                dtype=total.dtype
            )
        return total


def share_of(batch: MicroBatch, loss_fn: LossFn | None) -> int:
    """What a micro-batch's loss is multiplied by before all are divided by the step's trained tokens."""
    return 1 if loss_fn is None else batch.num_tokens


def _cross_entropies(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    if device.type == "cpu":
        return lambda logits, targets: F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="none")
    from horizon.stream.cross_entropy import cross_entropies  # needs triton

    return lambda logits, targets: cross_entropies(logits, targets, IGNORED)


def _as_scalar(value: Any, device: torch.device) -> Tensor:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.detach().reshape(()).to(device, torch.float64)
    if isinstance(value, Real):
        return torch.tensor(float(value), dtype=torch.float64, device=device)
    found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise BatchError(f"loss_fn must return one number, got {found}")
