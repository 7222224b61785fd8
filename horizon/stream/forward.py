"""Forward passes that keep nothing: every block once, all micro-batches through each while it is on the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from horizon.models.blocks import BlockModel, Params
from horizon.stream.batch import MicroBatch
from horizon.stream.head import LossFn, TokenScores, token_scores

T = TypeVar("T")
Visits = Iterator[tuple[int, Params]]  # blocks in order, each on the device until the next one is asked for


class Loss(Protocol):
    """The head's loss, as an executor computes it."""

    chunk: int  # tokens whose logits exist at once

    def loss(self, params: Params, hidden: Tensor, batch: MicroBatch, loss_fn: LossFn | None) -> Tensor:
        """The summed cross-entropy, or the custom loss, of one micro-batch: a scalar on the device."""


class ForwardPasses(ABC):
    """What an executor computes without gradients, dropout off."""

    def __init__(self, model: BlockModel, loss: Loss):
        self._model, self._loss = model, loss

    @abstractmethod
    def visits(self, version: int, blocks: Sequence[int] | None = None) -> Visits:
        """All blocks in order, or only `blocks`, with the weights of `version`."""

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch], version: int, loss_fn: LossFn | None = None) -> list[Tensor]:
        """Per micro-batch: the summed cross-entropy (or the custom loss), scalars on the device."""
        return self._outputs(batches, version, lambda p, h, batch: self._loss.loss(p, h, batch, loss_fn))

    @torch.no_grad()
    def score(self, batches: Sequence[MicroBatch], version: int) -> list[TokenScores]:
        """Per micro-batch: how well each trained token is predicted."""
        chunk = self._loss.chunk
        return self._outputs(batches, version, lambda p, h, batch: token_scores(self._model, p, h, batch, chunk))

    @torch.no_grad()
    def last_logits(self, batches: Sequence[MicroBatch], version: int) -> list[Tensor]:
        """Per micro-batch: the logits of each row's last position, [B, V]."""
        return self._outputs(batches, version, lambda params, h, _: self._model.logits(params, h[:, -1:])[:, 0])

    def _outputs(
        self, batches: Sequence[MicroBatch], version: int, finish: Callable[[Params, Tensor, MicroBatch], T]
    ) -> list[T]:
        """What `finish(the head's parameters, hidden states [B, T, H], batch)` makes of each micro-batch."""
        model, visits = self._model, self.visits(version)
        model.train(False)
        _, params = next(visits)
        embedded = [model.embed(params, batch.inputs, batch.documents) for batch in batches]
        hidden, calls = [states for states, _ in embedded], [layer_calls for _, layer_calls in embedded]
        del embedded  # else what enters the first layer stays
        for block, params in visits:
            if block == model.head:
                outputs = [finish(params, states, batch) for states, batch in zip(hidden, batches, strict=True)]
            else:
                for m, layer_calls in enumerate(calls):
                    hidden[m] = model.layer(block, params, hidden[m], layer_calls[block - 1])
        return outputs
