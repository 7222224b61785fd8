"""The head's loss: logits in token chunks, each chunk's backward at once, so all logits never exist together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from horizon.errors import BatchError
from horizon.stream.batch import IGNORED, MicroBatch
from horizon.stream.gradients import GradientSlots
from horizon.units import MIB

if TYPE_CHECKING:
    from horizon.models.blocks import BlockModel, Params

HEAD_CHUNK_BYTES = 2048 * MIB  # logits and their gradient in bf16, or logits in fp32, that exist at once
LEAST_CHUNK_BYTES = 256 * MIB
BF16_COPIES = 3  # of the logits that are scored: themselves, and in fp32

LossFn = Callable[[Tensor, Mapping[str, Tensor]], Tensor | float]  # (logits [B, T, V], batch) -> a number


def chunk_bytes(most: int, device_limit: int) -> int:
    """Bytes of logits that exist at once: an eighth of a small device, where `most` would leave no room for slots."""
    return min(most, max(device_limit // 8, LEAST_CHUNK_BYTES))


def chunk_tokens(vocab_size: int, chunk_bytes: int) -> int:
    """Tokens whose fp32 logits take about `chunk_bytes`; at least 64."""
    return max(64, chunk_bytes // (4 * vocab_size))


def chunks(hidden: Tensor, targets: Tensor, num_tokens: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(span of flattened tokens, hidden states, targets) in pieces of at most `num_tokens` tokens."""
    total = targets.numel()
    if total <= num_tokens:
        yield slice(0, total), hidden, targets
        return
    flat_hidden, flat_targets = hidden.flatten(0, 1), targets.flatten()
    for start in range(0, total, num_tokens):
        span = slice(start, min(start + num_tokens, total))
        yield span, flat_hidden[span].unsqueeze(0), flat_targets[span]


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed next-token cross-entropy in fp32; targets are already shifted, IGNORED ones count nothing."""
    # The conversion inside log_softmax saves an fp32 copy of the logits and of their gradient.
    log_probs = F.log_softmax(logits.view(-1, logits.shape[-1]), dim=-1, dtype=torch.float32)
    return F.nll_loss(log_probs, targets.reshape(-1), ignore_index=IGNORED, reduction="sum")


@dataclass(frozen=True, slots=True)
class TokenScores:
    """How well a model predicts the labels of one batch, each [rows, tokens], at the labels' own positions."""

    log_likelihoods: Tensor  # fp32: of the label, given the tokens before it; 0 where there is none
    correct: Tensor  # bool: no token was likelier
    trained: Tensor  # bool: there is a label

    def cpu(self) -> TokenScores:
        """The same on the CPU."""
        return TokenScores(self.log_likelihoods.cpu(), self.correct.cpu(), self.trained.cpu())


def token_scores(model: BlockModel, params: Params, hidden: Tensor, batch: MicroBatch, chunk: int) -> TokenScores:
    """Scores of one micro-batch, on its device.

    Args:
        params: the head block's parameters.
        hidden: [B, T, H], the last layer's output.
        chunk: tokens whose logits a step's head holds at once; of as many bytes there are fewer here, with fp32 copies.
    """
    likelihoods = torch.zeros(batch.targets.shape, dtype=torch.float32, device=hidden.device)
    correct = torch.zeros(batch.targets.shape, dtype=torch.bool, device=hidden.device)
    for span, states, targets in chunks(hidden, batch.targets, max(1, chunk // BF16_COPIES)):
        logits = model.logits(params, states).view(targets.numel(), -1)
        labels, trained = targets.reshape(-1).clamp_min(0), targets.reshape(-1) != IGNORED
        log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        found = log_probs.gather(1, labels[:, None])[:, 0]
        likelihoods.view(-1)[span] = found.where(trained, 0.0)
        correct.view(-1)[span] = (logits.argmax(-1) == labels) & trained
    # What position t predicts is the label of t + 1.
    shifted = (F.pad(values[:, :-1], (1, 0)) for values in (likelihoods, correct, batch.targets != IGNORED))
    return TokenScores(*shifted)


def custom_loss(loss_fn: LossFn, logits: Tensor, micro_batch: MicroBatch) -> Tensor:
    """The user's loss of one micro-batch.

    Raises:
        BatchError: it returned something that is no scalar tensor.
    """
    loss: Any = loss_fn(logits, micro_batch.batch)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise BatchError(f"loss_fn must return a scalar tensor, got {found}")
    return loss.reshape(())


def _gradients(loss: Tensor, wanted: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    """The loss, and the gradients of `wanted`, hidden states first; None for a parameter that took no part."""
    grads = torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad else [None]
    if grads[0] is None:
        raise BatchError("the result of loss_fn does not depend on the logits, so there is nothing to train on")
    return loss.detach(), grads


def _fused_gradients(
    logits: Tensor, targets: Tensor, divisor: float, wanted: Sequence[Tensor]
) -> tuple[Tensor, Sequence[Tensor]]:
    """As `_gradients` of the cross-entropy, whose own gradient comes from the fused kernel."""
    from horizon.stream.cross_entropy import fused_cross_entropy  # needs triton

    flat = logits.detach().view(-1, logits.shape[-1])
    loss, gradient = fused_cross_entropy(flat, targets.reshape(-1), 1 / divisor, IGNORED)
    return loss, torch.autograd.grad(logits, wanted, gradient.view_as(logits), allow_unused=True)


class HeadLoss:
    """Loss and gradients of the head block.

    Args:
        chunk: tokens whose logits exist at once; not used by custom losses, which need all of a micro-batch's.
    """

    def __init__(self, model: BlockModel, chunk: int):
        self._model, self.chunk = model, chunk
        self._trainable = [name for name, _, _ in model.layouts[model.head].grad_ranges()]

    def backward(
        self,
        params: Mapping[str, Tensor],
        hidden: Tensor,
        batch: MicroBatch,
        divisor: float,
        sums: GradientSlots,
        loss_fn: LossFn | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One micro-batch's loss divided by `divisor`, and its gradient.

        Args:
            params: the head block's parameters.
            hidden: [B, T, H], the last layer's output.
            divisor: of the summed cross-entropy, or of the custom loss.
            sums: take the parameter gradients, chunk by chunk.

        Returns:
            the divided loss (fp32 scalar) and its gradient with respect to `hidden`.
        """
        grad_hidden = torch.empty_like(hidden)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        size = self.chunk if loss_fn is None else batch.targets.numel()
        for span, states, targets in chunks(hidden, batch.targets, size):
            leaf = states.detach().requires_grad_()
            leaves = {n: params[n].detach().requires_grad_(n in self._trainable) for n in params}
            wanted = [leaf, *(leaves[n] for n in self._trainable)]
            with torch.enable_grad():
                logits = self._model.logits(leaves, leaf, sums)
                if loss_fn is not None:
                    part, grads = _gradients(custom_loss(loss_fn, logits, batch) / divisor, wanted)
                elif self._model.fused:
                    part, grads = _fused_gradients(logits, targets, divisor, wanted)
                else:
                    part, grads = _gradients(cross_entropy_sum(logits, targets) / divisor, wanted)
            del logits
            sums.add(dict(zip(self._trainable, grads[1:], strict=True)))
            grad_hidden.view(-1, hidden.shape[-1])[span].copy_(grads[0].view(-1, hidden.shape[-1]))
            loss += part
        return loss, grad_hidden

    def loss(
        self, params: Mapping[str, Tensor], hidden: Tensor, batch: MicroBatch, loss_fn: LossFn | None = None
    ) -> Tensor:
        """The summed cross-entropy (or the custom loss) of one micro-batch, without gradients."""
        if loss_fn is not None:
            return custom_loss(loss_fn, self._model.logits(params, hidden), batch).float()
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for _, states, targets in chunks(hidden, batch.targets, self.chunk):
            total += cross_entropy_sum(self._model.logits(params, states), targets)
        return total

    def is_finite(self, params: Mapping[str, Tensor], hidden: Tensor, batch: MicroBatch) -> bool:
        """Whether no logit of a micro-batch is NaN or +inf (a masked-out one may be -inf)."""
        pieces = chunks(hidden, batch.targets, self.chunk)
        return all(bool(self._model.logits(params, states).amax() < math.inf) for _, states, _ in pieces)
