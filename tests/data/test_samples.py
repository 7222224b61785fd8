import pytest

from horizon.config.schema import DataFormat, FieldNames
from horizon.data.documents import Document
from horizon.data.samples import detect, sample_reader
from horizon.data.tables import Record
from horizon.errors import DataError

ASKED, ANSWERED = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
WEATHER = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


def read(fields, kind=None, **names):
    record, names = Record("f:1", fields), FieldNames(**names)
    return sample_reader(DataFormat(kind) if kind else detect(record, names), names)(record)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"text": "a"}, "text_field"),
        ({"instruction": "a", "output": "b", "text": "c"}, "instruction"),
        ({"messages": [ASKED], "text": "c"}, "messages"),
        ({"conversations": []}, "sharegpt"),
    ],
)
def test_formats_are_told_by_their_fields(fields, kind):
    assert detect(Record("f:1", fields), FieldNames()) is DataFormat(kind)


def test_fields_of_no_format_are_listed():
    with pytest.raises(DataError, match=r"f:1: has the fields body, id; expected .*: set data\.fields"):
        detect(Record("f:1", {"body": "x", "id": 3}), FieldNames())
    assert detect(Record("f:1", {"body": "x", "id": 3}), FieldNames(text="body")) is DataFormat.text_field


def test_a_text_field_is_a_document():
    assert read({"body": "a b"}, text="body") == Document("f:1", "a b")


def test_an_instruction_is_a_question_with_its_input_and_an_answer():
    named = {"instruction": "q", "input": "more", "output": "a"}
    asked = read({"q": "Add", "more": "1, 2", "a": "3"}, **named).messages
    assert asked == [{"role": "user", "content": "Add\n\n1, 2"}, {"role": "assistant", "content": "3"}]
    assert read({"q": "Hi", "more": "", "a": "Yo"}, **named).messages[0]["content"] == "Hi"
    assert read({"q": "Hi", "a": "Yo"}, **named).messages[0]["content"] == "Hi"


def test_messages_keep_what_templates_know_and_lose_what_tables_fill_with_null():
    call = {"id": "c1", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        {"who": "user", "said": [{"type": "text", "text": "Weather"}, {"type": "text", "text": "?"}], "name": None},
        {"who": "assistant", "said": None, "tool_calls": [call]},
        {"who": "tool", "said": "sunny", "tool_call_id": "c1", "tool_calls": None},
        {"who": "assistant", "said": "Sunny."},
    ]
    functions = [{"type": "function", "function": {"name": "weather"}}]
    sample = read({"messages": messages, "functions": functions}, role="who", content="said", tools="functions")
    assert sample.messages == [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", **WEATHER}]},
        {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
        {"role": "assistant", "content": "Sunny."},
    ]
    assert sample.tools == functions


def test_sharegpt_senders_become_roles_and_calls_become_tool_calls():
    pairs = [
        ("system", "s"), ("human", "h"), ("function_call", '{"name": "weather", "arguments": {"city": "Rome"}}'),
        ("observation", "sunny"), ("gpt", "g"),
    ]  # fmt: skip
    talk = [{"from": sender, "value": value} for sender, value in pairs]
    sample = read({"conversations": talk, "tools": '[{"name": "weather"}]'})
    assert [message["role"] for message in sample.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert sample.messages[2] == {"role": "assistant", "content": "", "tool_calls": [WEATHER]}
    assert sample.tools == [{"name": "weather"}]


def talk(*messages, **fields):
    return {"messages": list(messages), **fields}


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        ("text_field", {"body": "x"}, r"the field 'text' is missing"),
        ("text_field", {"text": 3}, r"the field 'text' holds a int, expected text"),
        ("text_field", {"text": " \n"}, r"the field 'text' is blank"),
        ("instruction", {"instruction": "a", "output": " "}, r"the field 'output' is blank"),
        ("instruction", {"instruction": "a", "output": "b", "input": 3}, r"the field 'input' holds a int"),
        ("messages", {}, r"the field 'messages' is missing or empty"),
        ("messages", talk(), r"the field 'messages' is missing or empty"),
        ("messages", {"messages": "hi"}, r"the field 'messages' holds a str, expected a list"),
        ("messages", talk("hi"), r"'messages', message 1 has no text under 'role'"),
        ("messages", talk(ASKED, {"role": "bot", "content": "a"}), r"message 2: 'role' is 'bot', expected one of"),
        ("messages", talk(ASKED, {"role": "assistant", "content": None}), r"message 2 has no text under 'content'"),
        ("messages", talk({"role": "user", "content": [{"type": "image"}]}), r"message 1: 'content' has a part"),
        ("messages", talk(ASKED), r"no message has the role 'assistant'"),
        ("messages", talk(ASKED, ANSWERED, tools="x"), r"'tools': not JSON"),
        ("messages", talk(ASKED, ANSWERED, tools=[3]), r"'tools' is no list of functions"),
        ("messages", talk({"role": "assistant", "tool_calls": [{}]}), r"'tool_calls' has a call without a function's"),
        (
            "messages",
            talk({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}),
            r"'arguments' of f: not JSON",
        ),
        ("sharegpt", {"conversations": [{"from": "me", "value": "a"}]}, r"message 1: 'from' is 'me', expected one"),
        ("sharegpt", {"conversations": [{"from": "gpt"}]}, r"message 1 has no text under 'value'"),
    ],
)  # fmt: skip
def test_a_record_that_is_none_is_named_with_its_field(kind, fields, reason):
    with pytest.raises(DataError, match=rf"^f:1: .*{reason}"):
        read(fields, kind)
