"""Which tokens of a micro-batch see each other, found on the host before the step begins.

    packed   a a a b b b b c      position ids restart where a document begins
    padded   . . a a a a a a      what is masked before a row's tokens is a document of its own
             a a a a a . . .      what is masked after them needs no mask: nothing earlier looks at it

Everything that depends on a batch's values is decided here, so that nothing asks the device about them later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Documents:
    """How a micro-batch's rows divide into documents: runs of tokens, each of which looks back to where its run began.

    Tokens of different documents never see each other, so attention inside each is all there is; unless `divisible`
    is false, when only a mask over all pairs of tokens says who sees whom.
    """

    longest: int  # tokens
    ends: Tensor | None = None  # int32 [documents + 1], from 0: ends in the rows laid end to end; None: a row is one
    packed: bool = False  # position ids restart within a row
    padded: bool = False  # some tokens are masked
    divisible: bool = True


def find_documents(inputs: Mapping[str, Tensor], device: torch.device, observed: Tensor | None = None) -> Documents:
    """Divide a micro-batch into documents.

    As in transformers, position ids that restart count only where no token is masked.

    Args:
        inputs: input_ids, and where given attention_mask and position_ids, each [B, T]. On the host: elsewhere, this
            waits for them.
        device: where `ends` goes.
        observed: bool [B, T], the positions whose outputs anybody looks at; None: all. Only where no masked one is
            among them may masked tokens compute what they like, as they do when they are documents.
    """
    rows, tokens = inputs["input_ids"].shape
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None and not bool(mask.all()):
        real = mask.bool().cpu()
        begins = real[:, 1:] & ~real[:, :-1]
        in_one_piece = bool((begins.sum(1) + real[:, 0] <= 1).all())
        unseen = observed is not None and not bool((observed.cpu() & ~real).any())
        if not (in_one_piece and unseen):
            return Documents(longest=tokens, padded=True, divisible=False)
        return _divided(begins, rows, tokens, device, padded=True)
    if positions is not None:
        positions = positions.cpu()
        return _divided(positions[:, 1:] != positions[:, :-1] + 1, rows, tokens, device, packed=True)
    return Documents(longest=tokens)


def _divided(
    begins: Tensor, rows: int, tokens: int, device: torch.device, packed: bool = False, padded: bool = False
) -> Documents:
    """Documents of rows in which a new one begins after position t where `begins[:, t]`, bool [B, T - 1]."""
    if not bool(begins.any()):
        return Documents(longest=tokens, padded=padded)
    first = torch.ones(rows, 1, dtype=torch.bool)
    starts = torch.cat([first, begins], dim=1).flatten().nonzero().flatten()
    ends = torch.cat([starts, torch.tensor([rows * tokens])])
    longest = int(ends.diff().max())
    return Documents(longest, ends.int().to(device, non_blocking=True), packed=packed, padded=padded)
