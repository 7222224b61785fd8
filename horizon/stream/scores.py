"""How well a model predicts a batch's labels, token by token, from a forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from horizon.models.blocks import BlockModel, Params
from horizon.stream.batch import IGNORED, MicroBatch
from horizon.stream.head import chunks

BF16_COPIES = 3  # of the logits: themselves, and in fp32


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Of one micro-batch, each [rows, tokens], where position t stands for what it predicts: the label of t + 1."""

    log_likelihoods: Tensor  # fp32, of the label; 0 where there is none
    correct: Tensor  # bool: the label is the likeliest token
    trained: Tensor  # bool: there is a label

    def cpu(self) -> TokenScores:
        """The same on the CPU."""
        return TokenScores(self.log_likelihoods.cpu(), self.correct.cpu(), self.trained.cpu())


def token_scores(model: BlockModel, params: Params, hidden: Tensor, batch: MicroBatch, chunk: int) -> TokenScores:
    """Scores on the model's device.

    Args:
        params: the head block's parameters.
        hidden: [B, T, H], the last layer's output.
        chunk: tokens whose logits a step's head holds at once; of as many bytes there are fewer here, with fp32 copies.
    """
    losses = torch.empty(batch.targets.shape, dtype=torch.float32, device=hidden.device)
    likeliest = torch.empty_like(batch.targets)
    for span, states, targets in chunks(hidden, batch.targets, max(1, chunk // BF16_COPIES)):
        logits = model.logits(params, states).view(targets.numel(), -1)
        log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        losses.view(-1)[span] = F.nll_loss(log_probs, targets.reshape(-1), ignore_index=IGNORED, reduction="none")
        likeliest.view(-1)[span] = logits.argmax(-1)
    return TokenScores(-losses, likeliest == batch.targets, batch.targets != IGNORED)
