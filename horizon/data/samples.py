"""What a record is: a text, or a conversation, told by its fields.

    text_field     {"text": "..."}
    instruction    {"instruction": "...", "input": "...", "output": "..."}
    messages       {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    sharegpt       {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}

Conversations of every kind become messages as chat templates take them. The fields' names are settings.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from horizon.config.schema import DataFormat, FieldNames
from horizon.data.documents import Document
from horizon.data.tables import Record
from horizon.errors import DataError

CONVERSATIONS = frozenset({DataFormat.instruction, DataFormat.messages, DataFormat.sharegpt})
Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
_SENDERS = {  # of sharegpt -> role
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "system": "system", "tool": "tool", "observation": "tool", "function": "tool",
    "function_call": "assistant",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as chat templates take them."""

    where: str  # file:line
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None  # the functions that the assistant may call


Sample = Document | Conversation


def detect(record: Record, names: FieldNames) -> DataFormat:
    """The format of a record with such fields.

    Raises:
        DataError: it has those of no format.
    """
    found = record.fields
    if isinstance(found.get(names.messages), list):
        return DataFormat.messages
    if isinstance(found.get(names.conversations), list):
        return DataFormat.sharegpt
    if names.instruction in found and names.output in found:
        return DataFormat.instruction
    if names.text in found:
        return DataFormat.text_field
    raise DataError(
        f"{record.where}: has the fields {', '.join(map(str, found))}; expected {names.messages!r} or "
        f"{names.conversations!r}, {names.instruction!r} and {names.output!r}, or {names.text!r}: set data.fields to "
        "what they are called"
    )


def sample_reader(kind: DataFormat, names: FieldNames) -> Callable[[Record], Sample]:
    """What makes a text or a conversation of a record of that format; a record that is none is a DataError."""
    readers: dict[DataFormat, Callable[[Record, FieldNames], Sample]] = {
        DataFormat.text_field: _text,
        DataFormat.instruction: _instruction,
        DataFormat.messages: _messages,
        DataFormat.sharegpt: _sharegpt,
    }
    read = readers[kind]
    return lambda record: read(record, names)


def _text(record: Record, names: FieldNames) -> Document:
    text = _string(record, names.text)
    if not text.strip():
        raise DataError(f"{record.where}: the field {names.text!r} is blank")
    return Document(record.where, text)


def _instruction(record: Record, names: FieldNames) -> Conversation:
    asked, answer = _string(record, names.instruction), _string(record, names.output)
    more = record.fields.get(names.input)
    if more is not None and not isinstance(more, str):
        raise DataError(f"{record.where}: the field {names.input!r} holds a {type(more).__name__}, expected text")
    if not answer.strip():
        raise DataError(f"{record.where}: the field {names.output!r} is blank, so there is nothing to train on")
    content = f"{asked}\n\n{more}" if more else asked
    return Conversation(record.where, [{"role": "user", "content": content}, {"role": "assistant", "content": answer}])


def _messages(record: Record, names: FieldNames) -> Conversation:
    messages = [
        _message(f"{record.where}: {names.messages!r}, message {number}", message, names)
        for number, message in enumerate(_list(record, names.messages), start=1)
    ]
    return _conversation(record, messages, names)


def _sharegpt(record: Record, names: FieldNames) -> Conversation:
    messages = []
    for number, message in enumerate(_list(record, names.conversations), start=1):
        where = f"{record.where}: {names.conversations!r}, message {number}"
        sender = message.get(names.sender) if isinstance(message, dict) else None
        if sender not in _SENDERS:
            raise DataError(f"{where}: {names.sender!r} is {sender!r}, expected one of {', '.join(_SENDERS)}")
        value = message.get(names.value)
        if not isinstance(value, str):
            raise DataError(f"{where} has no text under {names.value!r}")
        if sender == "function_call":
            function = _json(where, value)
            messages.append({"role": "assistant", "content": "", "tool_calls": _tool_calls(where, [function])})
        else:
            messages.append({"role": _SENDERS[sender], "content": value})
    return _conversation(record, messages, names)


def _conversation(record: Record, messages: list[Message], names: FieldNames) -> Conversation:
    if all(message["role"] != "assistant" for message in messages):
        raise DataError(f"{record.where}: no message has the role 'assistant', so there is nothing to train on")
    tools = record.fields.get(names.tools)
    if isinstance(tools, str):
        tools = _json(f"{record.where}: {names.tools!r}", tools) if tools.strip() else None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f"{record.where}: {names.tools!r} is no list of functions (JSON objects)")
    return Conversation(record.where, messages, tools or None)


def _message(where: str, message: Any, names: FieldNames) -> Message:
    """A message under the names that templates know; calls have their arguments as objects, as templates want them."""
    role = message.get(names.role) if isinstance(message, dict) else None
    if not isinstance(role, str):
        raise DataError(f"{where} has no text under {names.role!r}")
    if role not in ROLES:
        raise DataError(f"{where}: {names.role!r} is {role!r}, expected one of {', '.join(ROLES)}")
    # Tables fill the fields that only other messages have with null; templates ask whether a field is there.
    known = (names.role, names.content)
    rest = {key: value for key, value in message.items() if key not in known and value is not None}
    if rest.get("tool_calls"):
        rest["tool_calls"] = _tool_calls(where, rest["tool_calls"])
    content = _content(where, message.get(names.content), names)
    if content is None and "tool_calls" not in rest:
        raise DataError(f"{where} has no text under {names.content!r}")
    return {"role": role, "content": content or "", **rest}


def _content(where: str, content: Any, names: FieldNames) -> str | None:
    """Text, given as such or in parts."""
    if content is None or isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        if not (isinstance(part, dict) and isinstance(part.get("text"), str)):
            raise DataError(f"{where}: {names.content!r} has a part that is no text ({str(part)[:60]})")
    return "".join(part["text"] for part in parts)


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """Calls of functions, with arguments that may be given as JSON text."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{where}: 'tool_calls' has a call without a function's name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _json(f"{where}: 'tool_calls', 'arguments' of {function['name']}", arguments)
        named = {"name": function["name"], "arguments": arguments}
        found.append({**({"id": call["id"]} if "id" in call else {}), "type": "function", "function": named})
    return found


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None


def _string(record: Record, field: str) -> str:
    value = record.fields.get(field)
    if not isinstance(value, str):
        what = f"holds a {type(value).__name__}, expected text" if field in record.fields else "is missing"
        raise DataError(f"{record.where}: the field {field!r} {what}")
    return value


def _list(record: Record, field: str) -> list[Any]:
    value = record.fields.get(field)
    if not isinstance(value, list) or not value:
        what = f"holds a {type(value).__name__}" if value not in (None, []) else "is missing or empty"
        raise DataError(f"{record.where}: the field {field!r} {what}, expected a list of messages")
    return value
