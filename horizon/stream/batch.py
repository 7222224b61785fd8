"""Batches as users hand them in, checked and brought to the device.

A batch is what transformers models take: `input_ids` and `labels` [rows, tokens] (labels not shifted, -100 = not
trained), optionally `attention_mask` and `position_ids`. Everything is checked on the CPU before any device work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from horizon.errors import BatchError

IGNORED = -100
INPUTS = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The rows that go through a block at once, on the device."""

    inputs: dict[str, Tensor]  # for the model's forward
    targets: Tensor  # [rows, tokens]: the token each position predicts, or IGNORED
    num_tokens: int  # trained tokens
    batch: dict[str, Tensor]  # everything the user gave, for custom losses

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, tokens)."""
        rows, tokens = self.inputs["input_ids"].shape
        return rows, tokens


Batch = Mapping[str, Tensor]


def to_micro_batches(
    batch: Batch | Sequence[Batch], device: torch.device, vocab_size: int, *, need_labels: bool = True
) -> list[MicroBatch]:
    """Check a step's batch, or list of micro-batches, and move it to `device`.

    Raises:
        BatchError: naming the micro-batch and what is wrong with it.
    """
    batches = [batch] if isinstance(batch, Mapping) else list(batch)
    if not batches:
        raise BatchError("the step has no micro-batch")
    checked = [_checked(b, i, vocab_size, need_labels) for i, b in enumerate(batches)]
    micro_batches = [_on_device(b, device) for b in checked]
    if need_labels and sum(m.num_tokens for m in micro_batches) == 0:
        raise BatchError("no token of the batch is trained: every label that has a token before it is -100")
    return micro_batches


def _checked(batch: Batch, index: int, vocab_size: int, need_labels: bool) -> dict[str, Tensor]:
    where = f"micro-batch {index}"
    required = ("input_ids", "labels") if need_labels else ("input_ids",)
    for key in required:
        if key not in batch:
            raise BatchError(f"{where} has no {key!r}; found {sorted(batch)}")
    tokens = batch["input_ids"]
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise BatchError(f"{where}: input_ids has shape {tuple(tokens.shape)}, expected [rows, tokens]")
    for key in ("labels", "attention_mask", "position_ids"):
        value = batch.get(key)
        if value is not None and value.shape != tokens.shape:
            raise BatchError(f"{where}: {key} has shape {tuple(value.shape)}, input_ids {tuple(tokens.shape)}")
    _check_range(batch["input_ids"], where, "input_ids", vocab_size, 0)
    if "labels" in batch:
        trained = batch["labels"][batch["labels"] != IGNORED]
        _check_range(trained, where, "labels", vocab_size, 0)
    return {key: value for key, value in batch.items() if value is not None}


def _check_range(values: Tensor, where: str, key: str, vocab_size: int, low: int) -> None:
    if values.numel() == 0:
        return
    if values.dtype.is_floating_point:
        raise BatchError(f"{where}: {key} holds {values.dtype}, expected integers")
    smallest, largest = (int(v) for v in torch.aminmax(values))
    if smallest < low or largest >= vocab_size:
        bad = smallest if smallest < low else largest
        raise BatchError(f"{where}: {key} holds token {bad}, outside the model's vocabulary of {vocab_size}")


def _on_device(batch: dict[str, Tensor], device: torch.device) -> MicroBatch:
    labels = batch.get("labels", torch.full_like(batch["input_ids"], IGNORED))
    targets = torch.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:]
    moved = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    inputs = {key: moved[key] for key in INPUTS if key in moved}
    mask = batch.get("attention_mask")
    if mask is not None and bool(mask.all()):
        del inputs["attention_mask"]  # nothing is masked: lets the model take its causal fast path
    num_tokens = int((targets != IGNORED).sum())
    return MicroBatch(inputs, targets.to(device, non_blocking=True), num_tokens, moved)
