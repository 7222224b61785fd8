"""Conversations (`messages` JSONL) rendered by the tokenizer's own chat template, assistant turns trained on.

A template that marks its turns with `{% generation %}` says itself what the assistant writes. For any other,
an assistant turn begins where the prompt for it ends and ends with the template's end-of-turn token:

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
                                                           |---- span ----|
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from horizon.data.documents import Document, decode_text, read_bytes
from horizon.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
_Rendered = tuple[list[str], list[list[tuple[int, int]]]]  # texts and their marked character ranges

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "horizonprobe"
_REMEDY = "set data.tokenizer to the folder of a fast tokenizer with a chat template"


@dataclass(frozen=True, slots=True)
class Conversation:
    """One line of a `messages` file."""

    where: str  # file:line
    messages: list[Message]


def read_conversations(files: Sequence[Path], max_bytes: int | None, seed: int) -> list[Conversation]:
    """Every non-blank line as a conversation, in the order given; at most `max_bytes` of lines, chosen by seed.

    Raises:
        DataError: a line is no conversation (names file, line and reason), or there is none.
    """
    lines = [line for file in files for line in _lines(file)]
    if max_bytes is not None:
        order = np.random.default_rng(seed).permutation(len(lines))
        total = np.cumsum([len(lines[index][1]) for index in order])
        lines = [lines[index] for index in sorted(order[total <= max_bytes])]
    if not lines:
        limit = "" if max_bytes is None else f" within data.max_bytes={max_bytes}"
        raise DataError(f"no conversation in {files[0]}{limit}: dataset is empty")
    return [_parse(where, raw) for where, raw in lines]


def _lines(file: Path) -> Iterator[tuple[str, bytes]]:
    for number, raw in enumerate(read_bytes(file).split(b"\n"), start=1):
        if raw.strip():
            yield f"{file}:{number}", raw


def _parse(where: str, raw: bytes) -> Conversation:
    try:
        record = json.loads(decode_text(raw, where))
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{where}: expected an object {{"messages": [{{"role": ..., "content": ...}}, ...]}}')
    for number, message in enumerate(messages, start=1):
        for key in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(key), str):
                raise DataError(f"{where}: message {number} has no text under {key!r}")
    if all(message["role"] != "assistant" for message in messages):
        raise DataError(f"{where}: no message has the role 'assistant', so there is nothing to train on")
    return Conversation(where, messages)


class ChatRenderer:
    """Turns conversations into documents whose spans are the assistant's turns."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Finds how the tokenizer's template ends a turn.

        Raises:
            DataError: there is no template, it cannot be rendered, or the tokenizer keeps no character offsets.
        """
        if not tokenizer.chat_template:
            raise DataError(f"data.format=messages: the tokenizer has no chat template; {_REMEDY}")
        if not tokenizer.is_fast:
            raise DataError(f"data.format=messages: {type(tokenizer).__name__} keeps no character offsets; {_REMEDY}")
        self._special_tokens_map = tokenizer.special_tokens_map
        self._special_tokens = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        self._template = tokenizer.get_chat_template()
        self._marked = bool(_MARKER.search(self._template))
        self._middle_end, self._last_end = self._turn_ends()

    def render(self, conversation: Conversation) -> Document:
        """The conversation as the template writes it; every assistant turn with its end-of-turn token is a span.

        Raises:
            DataError: the template refuses the conversation, or does not show where the assistant's turns lie.
        """
        try:
            text, marked = self._render(conversation.messages)
            if self._marked:
                spans = [self._with_end(text, *span) for span in marked]
            else:
                spans = self._find_spans(text, conversation.messages)
        except DataError as error:
            raise DataError(f"{conversation.where}: {error}") from None
        if not any(start < end for start, end in spans):
            raise DataError(f"{conversation.where}: the chat template marks no assistant turn")
        return Document(conversation.where, text, tuple(spans))

    def _render(self, messages: list[Message], prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """(text, character ranges marked as the assistant's); with `prompt`, the assistant's next turn is opened."""
        from jinja2 import TemplateError
        from transformers.utils import chat_template_utils

        render = cast("Callable[..., _Rendered]", chat_template_utils.render_jinja_template)
        try:
            texts, spans = render(
                conversations=[messages],
                chat_template=self._template,
                return_assistant_tokens_mask=self._marked,
                add_generation_prompt=prompt,
                **self._special_tokens_map,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"the chat template refuses these messages ({error})") from None
        return texts[0], spans[0] if self._marked else []

    def _turn_ends(self) -> tuple[str, str]:
        """What closes an assistant turn that others follow, and one that is last ("" when nothing does)."""
        user, reply = {"role": "user", "content": _PROBE[::-1]}, {"role": "assistant", "content": _PROBE}
        last = self._render([user, reply])[0].partition(_PROBE)[2].lstrip()
        middle = self._render([user, reply, user])[0].partition(_PROBE)[2].lstrip()
        if not last:
            return "", ""
        pairs = takewhile(lambda pair: pair[0] == pair[1], zip(middle, last, strict=False))
        shared = "".join(left for left, _ in pairs).rstrip()
        return self._leading_special(middle) or shared, self._leading_special(last) or shared

    def _leading_special(self, text: str) -> str:
        return max((token for token in self._special_tokens if text.startswith(token)), key=len, default="")

    def _with_end(self, text: str, start: int, end: int) -> tuple[int, int]:
        """A marked span with the end of the turn, which the model must learn to write or it never stops."""
        for turn_end in (self._middle_end, self._last_end):
            if turn_end and text.startswith(turn_end, end):
                return start, end + len(turn_end)
        return start, end

    def _find_spans(self, text: str, messages: list[Message]) -> list[tuple[int, int]]:
        spans: list[tuple[int, int]] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:index], prompt=True)[0]
            start, end = len(prompt), self._find_end(text, len(prompt), messages[: index + 1], len(messages))
            if not text.startswith(prompt) or end <= start or (spans and start < spans[-1][1]):
                raise DataError(
                    f"the chat template does not show where the assistant's message {index + 1} begins and ends; "
                    "add {% generation %} markers to the template"
                )
            spans.append((start, end))
        return spans

    def _find_end(self, text: str, start: int, messages: list[Message], num_messages: int) -> int:
        """Where the turn that begins at `start`, the last of `messages`, ends in `text`; -1 when it cannot be told."""
        turn_end = self._last_end if len(messages) == num_messages else self._middle_end
        found = text.find(turn_end, start) if turn_end else -1
        if found >= 0:
            return found + len(turn_end)
        alone = self._render(messages)[0]
        return len(alone) if text.startswith(alone) else -1
