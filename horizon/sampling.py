"""A sample of what the model writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from horizon.config.schema import TrainConfig
from horizon.data import TextData
from horizon.errors import ConfigError
from horizon.generation.prompts import padding_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from horizon.engine import Engine

SAMPLE_FROM = 20  # tokens that one of a sample is drawn from
PROMPT_TOKENS = 32  # taken from a row when train.sample_prompt is null


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
    return rows.ids(0)[:PROMPT_TOKENS]


def generate(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    num_tokens: int,
    max_context: int,
    seed: int,
) -> str:
    """Text of `num_tokens` tokens after `prompt`, or fewer if it ends before, each drawn from the likeliest few.

    Prompt and text together are `max_context` tokens at most: the beginning of a longer prompt is left out.

    The likeliest token alone would repeat itself for ever after a short training.
    """
    new_tokens = min(num_tokens, max_context - 1)
    ids = torch.tensor([prompt[-(max_context - new_tokens) :]])
    ends = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    written = engine.generate(
        ids, seed=seed, max_new_tokens=new_tokens, do_sample=True, top_k=SAMPLE_FROM, eos_token_id=ends or None,
        pad_token_id=padding_id(tokenizer),
    )  # fmt: skip
    return str(tokenizer.decode(written[0, ids.shape[1] :].tolist()))
