"""What a run looks at besides its steps: held-out rows, and a sample of what the model writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from horizon.config.schema import TrainConfig
from horizon.data import TextData
from horizon.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from horizon.engine import Engine

SAMPLE_FROM = 20  # tokens that one of a sample is drawn from
PROMPT_TOKENS = 32  # taken from a row when train.sample_prompt is null


def validation_batches(data: TextData, num_rows: int, micro_batch: int) -> list[dict[str, torch.Tensor]]:
    """The first `num_rows` held-out rows in micro-batches; empty when there are none."""
    if data.validation is None:
        return []
    rows = np.arange(min(num_rows, len(data.validation)))
    return [data.validation.batch(rows[start : start + micro_batch]) for start in range(0, len(rows), micro_batch)]


def prompt_text(data: TextData, train: TrainConfig) -> str | None:
    """What the samples of a run go on from; None where it has none."""
    if not train.sample_tokens:
        return None
    return str(data.tokenizer.decode(sample_prompt(data, train.sample_prompt, train.sample_tokens)))


def sample_prompt(data: TextData, text: str | None, num_tokens: int) -> list[int]:
    """Token ids of `text`, or of the beginning of a held-out row (of a trained one when none was held out)."""
    if text is not None:
        ids: list[int] = data.tokenizer.encode(text)
        if not ids:
            raise ConfigError(f"train.sample_prompt={text!r} holds no token")
        return ids
    rows = data.train if data.validation is None else data.validation
    return [int(token) for token in rows.input_ids[0, : min(PROMPT_TOKENS, int(rows.num_tokens[0]))]]


def generate(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    num_tokens: int,
    max_context: int,
    seed: int,
) -> str:
    """Text of `num_tokens` tokens after `prompt`, or fewer if it ends before, each drawn from the likeliest few.

    The likeliest token alone would repeat itself for ever after a short training.
    """
    ids, dice = list(prompt), torch.Generator().manual_seed(seed)
    for _ in range(num_tokens):
        logits = engine.next_token_logits({"input_ids": torch.tensor([ids[-max_context:]])})[0]
        likeliest = logits.topk(min(SAMPLE_FROM, len(logits)))
        drawn = torch.multinomial(likeliest.values.softmax(-1), 1, generator=dice)
        ids.append(int(likeliest.indices[drawn]))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(ids[len(prompt) :]))
