"""Prompts: read from a file, rendered, tokenized, and padded on the left to one length."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from horizon.errors import DataError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is to go on with."""

    text: str
    is_rendered: bool = False  # by a chat template, which writes the special tokens itself

    def encode(self, tokenizer: PreTrainedTokenizerBase, more: str = "") -> list[int]:
        """Token ids of the prompt, and of what follows it."""
        ids: list[int] = tokenizer.encode(self.text + more, add_special_tokens=not self.is_rendered)
        return ids


def read_json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(file:line, object) of every line that is not blank.

    Raises:
        DataError: the file cannot be read, or a line is no JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(found, Mapping):
            raise DataError(f"{path}:{number}: expected an object, found a {type(found).__name__}")
        yield f"{path}:{number}", found


def prompt_of(record: Mapping[str, Any], where: str, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """A record's `prompt`, a text, or its `messages`, as the tokenizer's chat template asks for the answer to them.

    Raises:
        DataError: it has neither or both, or the template does not render them.
    """
    prompt, messages = record.get("prompt"), record.get("messages")
    if (prompt is None) == (messages is None):
        raise DataError(f"{where}: expected either 'prompt' or 'messages', found {sorted(record)}")
    if messages is None:
        if not isinstance(prompt, str) or not prompt:
            raise DataError(f"{where}: 'prompt' is {prompt!r}, expected a text")
        return Prompt(prompt)
    if not tokenizer.chat_template:
        raise DataError(f"{where}: 'messages' need a chat template, and the tokenizer has none; use 'prompt'")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise what they like
        raise DataError(f"{where}: the chat template does not render 'messages' ({error})") from error
    return Prompt(str(text), is_rendered=True)


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The prompts of a file: of a `.jsonl`, an object a line (`prompt_of`); of any other, a text a line.

    Raises:
        DataError: a line is no prompt, or there is none.
    """
    if path.suffix == ".jsonl":
        prompts = [prompt_of(record, where, tokenizer) for where, record in read_json_lines(path)]
    else:
        try:
            prompts = [Prompt(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read ({error})") from error
    if not prompts:
        raise DataError(f"{path} holds no prompt")
    return prompts


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills rows up; nobody looks at it."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


def end_ids(tokenizer: PreTrainedTokenizerBase, config: GenerationConfig) -> list[int]:
    """The tokens that end a text, by the model's own generation settings or its tokenizer."""
    own = config.eos_token_id
    found = own if isinstance(own, list) else [own]
    return sorted({int(token_id) for token_id in (*found, tokenizer.eos_token_id) if token_id is not None})


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask [rows, tokens] of token ids of different lengths."""
    longest = max(map(len, rows))
    ids = [[pad_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def new_texts(
    tokenizer: PreTrainedTokenizerBase, sequences: Tensor, prompt_tokens: int, end_ids: Sequence[int]
) -> list[tuple[str, int]]:
    """(text, tokens) of what follows prompts of so many tokens, up to a token that ends a text, which is counted."""
    found = []
    for row in sequences[:, prompt_tokens:].tolist():
        end = next((i + 1 for i, token_id in enumerate(row) if token_id in end_ids), len(row))
        found.append((str(tokenizer.decode(row[:end], skip_special_tokens=True)), end))
    return found
