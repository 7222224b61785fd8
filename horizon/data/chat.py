"""Conversations rendered by the tokenizer's own chat template, assistant turns trained on.

A template that marks its turns with `{% generation %}` says itself what the assistant writes. For any other,
an assistant turn begins where the prompt for it ends and ends with the template's end-of-turn token:

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
                                                           |---- span ----|
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, cast

from horizon.config.schema import TrainOn
from horizon.data.documents import Document
from horizon.data.samples import Conversation
from horizon.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Rendered = tuple[list[str], list[list[tuple[int, int]]]]  # texts and their marked character ranges

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "horizonprobe"
_REMEDY = "set data.chat_template to a file of Jinja, or data.tokenizer to the folder of one that has a template"

# For instructions where the tokenizer has no template: a base model has seen no other either.
INSTRUCTIONS = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}### Instruction:\n{{ message.content }}\n\n"
    "{% else %}### Response:\n{% generation %}{{ message.content }}{{ eos_token | default('') }}{% endgeneration %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)


class ChatRenderer:
    """Turns conversations into documents whose spans are the assistant's turns."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train_on: TrainOn = TrainOn.assistant,
        template: str | None = None,
    ) -> None:
        """Finds how the template (None: the tokenizer's own) ends a turn.

        Raises:
            DataError: there is no template, it cannot be rendered, or the tokenizer keeps no character offsets.
        """
        if not template and not tokenizer.chat_template:
            raise DataError(f"conversations: the tokenizer has no chat template; {_REMEDY}")
        if not tokenizer.is_fast:
            raise DataError(
                f"conversations: {type(tokenizer).__name__} keeps no character offsets; set data.tokenizer to the "
                "folder of a fast one"
            )
        self._train_on = train_on
        self._special_tokens_map = tokenizer.special_tokens_map
        self._special_tokens = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        self._template = template or tokenizer.get_chat_template()
        self._marked = bool(_MARKER.search(self._template))
        self._middle_end, self._last_end = self._turn_ends()
        self._header = self._turn_header()

    def render(self, conversation: Conversation) -> Document:
        """The conversation as the template writes it; what is trained on, end-of-turn tokens included, are its spans.

        Raises:
            DataError: the template refuses the conversation, leaves some of it out, or does not show where the
                assistant's turns lie.
        """
        try:
            self._check_shown(conversation)
            text, marked = self._render(conversation)
            if self._train_on is TrainOn.all:
                spans = [(0, len(text))]
            elif self._marked:
                spans = [self._with_end(text, *span) for span in marked if span[0] < span[1]]
            else:
                spans = self._find_spans(text, conversation)
        except DataError as error:
            raise DataError(f"{conversation.where}: {error}") from None
        if not any(start < end for start, end in spans):
            raise DataError(f"{conversation.where}: the chat template marks no assistant turn")
        return Document(conversation.where, text, tuple(spans[-1:] if self._train_on is TrainOn.last else spans))

    def _check_shown(self, conversation: Conversation) -> None:
        """Refuse what a template would leave out without a word."""
        given = {"tools": conversation.tools, "tool_calls": any("tool_calls" in m for m in conversation.messages)}
        for name, value in given.items():
            if value and name not in self._template:
                raise DataError(f"the conversation has {name!r}, which the chat template does not show; {_REMEDY}")

    def _render(self, conversation: Conversation, prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """(text, character ranges marked as the assistant's); with `prompt`, the assistant's next turn is opened."""
        from jinja2 import TemplateError
        from transformers.utils import chat_template_utils

        render = cast("Callable[..., _Rendered]", chat_template_utils.render_jinja_template)
        try:
            texts, spans = render(
                conversations=[conversation.messages],
                tools=conversation.tools,
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
        last, middle = (
            self._render(Conversation("", messages))[0].partition(_PROBE)[2].lstrip()
            for messages in ([user, reply], [user, reply, user])
        )
        if not last:
            return "", ""
        pairs = takewhile(lambda pair: pair[0] == pair[1], zip(middle, last, strict=False))
        shared = "".join(left for left, _ in pairs).rstrip()
        return self._leading_special(middle) or shared, self._leading_special(last) or shared

    def _turn_header(self) -> str:
        """What a template that knows no prompt writes before an assistant's turn; "" where the prompt ends with it."""
        user = {"role": "user", "content": _PROBE[::-1]}
        asked, prompt = (self._render(Conversation("", [user]), opened)[0] for opened in (False, True))
        whole = self._render(Conversation("", [user, {"role": "assistant", "content": _PROBE}]))[0]
        if prompt != asked or not whole.startswith(asked):
            return ""
        header = whole[len(asked) :].partition(_PROBE)[0]
        return header if header.strip() else ""  # a blank is part of the first word's token

    def _leading_special(self, text: str) -> str:
        return max((token for token in self._special_tokens if text.startswith(token)), key=len, default="")

    def _with_end(self, text: str, start: int, end: int) -> tuple[int, int]:
        """A marked span with the end of the turn, which the model must learn to write or it never stops."""
        for turn_end in (self._middle_end, self._last_end):
            if turn_end and text.startswith(turn_end, end):
                return start, end + len(turn_end)
        return start, end

    def _find_spans(self, text: str, conversation: Conversation) -> list[tuple[int, int]]:
        """Where the assistant's turns lie in `text`, found by rendering the messages before and up to each.

        A prefix must read as `text` begins, or nothing says that what follows it is the turn.
        """
        spans: list[tuple[int, int]] = []
        messages = conversation.messages
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(replace(conversation, messages=messages[:index]), prompt=True)[0]
            is_last = index + 1 == len(messages)
            start = len(prompt)
            if self._header and text.startswith(self._header, start):
                start += len(self._header)
            end = self._find_end(text, start, replace(conversation, messages=messages[: index + 1]), is_last)
            if not text.startswith(prompt) or end <= start or (spans and start < spans[-1][1]):
                raise DataError(
                    f"the chat template does not show where the assistant's message {index + 1} begins and ends: "
                    "rendered up to there, the conversation reads otherwise; "
                    "add {% generation %} markers to the template"
                )
            spans.append((start, end))
        return spans

    def _find_end(self, text: str, start: int, until: Conversation, is_last: bool) -> int:
        """Where the turn that begins at `start`, the last of `until`, ends in `text`; -1 when it cannot be told."""
        turn_end = self._last_end if is_last else self._middle_end
        found = text.find(turn_end, start) if turn_end else -1
        if found >= 0:
            return found + len(turn_end)
        alone = self._render(until)[0]
        return len(alone) if text.startswith(alone) else -1
