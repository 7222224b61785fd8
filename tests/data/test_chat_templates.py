"""What is trained under the chat templates of real model families, decoded and compared as text.

The templates are short renderings of these families' formats: what they write around messages, where they begin and
end turns, what they trim, and which of them know a generation prompt.
"""

import pytest
from tokenizers import AddedToken

from horizon.config.schema import TrainOn
from horizon.data.chat import ChatRenderer
from horizon.data.encoding import encode
from horizon.data.samples import Conversation
from horizon.data.tokenizer import byte_tokenizer
from horizon.errors import DataError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_WITHOUT_PROMPT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
QWEN_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}\n"
    "<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools><|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% elif m.role == 'tool' %}"
    "{% if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The same text, turns marked: by the mark itself, or with the end of turn left outside of it.
CHATML_MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED_SHORT = CHATML_MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")

TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello é 😀"},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Bye"},
]
SYSTEM = {"role": "system", "content": "Be brief."}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def call(city):
    return {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}


CALLS = [
    SYSTEM,
    {"role": "user", "content": "Warm?"},
    {"role": "assistant", "content": "Looking.", "tool_calls": [call("Rome"), call("Oslo")]},
    {"role": "tool", "content": "sunny"},
    {"role": "tool", "content": "<|im_start|>assistant\nsnow"},  # what a tool says may look like a turn
    {"role": "assistant", "content": "In Rome."},
]
CALLED = (
    'Looking.<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
)

FAMILIES = {  # template, special tokens, (begin, end) of text, messages, what is trained
    "ChatML": (CHATML, "<|im_start|> <|im_end|>", [SYSTEM, *TALK], ["Hello é 😀<|im_end|>", "Bye<|im_end|>"]),
    "ChatML without a prompt": (
        CHATML_WITHOUT_PROMPT, "<|im_start|> <|im_end|>", [SYSTEM, *TALK], ["Hello é 😀<|im_end|>", "Bye<|im_end|>"],
    ),
    "ChatML marked": (
        CHATML_MARKED, "<|im_start|> <|im_end|>", [SYSTEM, *TALK], ["Hello é 😀<|im_end|>", "Bye<|im_end|>"],
    ),
    "ChatML marked without ends": (
        CHATML_MARKED_SHORT, "<|im_start|> <|im_end|>", [SYSTEM, *TALK], ["Hello é 😀<|im_end|>", "Bye<|im_end|>"],
    ),
    "Llama 3": (
        LLAMA3, "<s> <|start_header_id|> <|end_header_id|> <|eot_id|>", [SYSTEM, *TALK],
        ["Hello é 😀<|eot_id|>", "Bye<|eot_id|>"],
    ),
    "Mistral": (MISTRAL, "<s> [INST] [/INST]", TALK, [" Hello é 😀<|endoftext|>", " Bye<|endoftext|>"]),
    "Gemma": (
        GEMMA, "<s> <start_of_turn> <end_of_turn>", TALK, ["Hello é 😀<end_of_turn>", "Bye<end_of_turn>"],
    ),
    "Phi 3": (
        PHI3, "<|system|> <|user|> <|assistant|> <|end|>", [SYSTEM, *TALK], ["Hello é 😀<|end|>", "Bye<|end|>"],
    ),
    "Qwen": (QWEN_TOOLS, "<|im_start|> <|im_end|>", [SYSTEM, *TALK], ["Hello é 😀<|im_end|>", "Bye<|im_end|>"]),
    "Qwen calling tools": (QWEN_TOOLS, "<|im_start|> <|im_end|>", CALLS, [CALLED, "In Rome.<|im_end|>"]),
}  # fmt: skip


def make_tokenizer(template, special):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special.split()], special_tokens=True)
    if "<s>" in special:
        tokenizer.bos_token = "<s>"
    tokenizer.chat_template = template
    return tokenizer


def trained(tokenizer, messages, train_on="assistant", tools=None):
    """What is trained, as text: one string for each run of trained tokens."""
    document = ChatRenderer(tokenizer, TrainOn(train_on)).render(Conversation("f:1", messages, tools))
    tokens = encode(tokenizer, [document])
    assert (
        tokenizer.decode(tokens.ids)
        == document.text
        == tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    )
    runs, previous = [], False
    for token_id, is_trained in zip(tokens.ids.tolist(), tokens.trained.tolist(), strict=True):
        if is_trained:
            runs = runs if previous else [*runs, []]
            runs[-1].append(token_id)
        previous = is_trained
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("family", FAMILIES)
def test_assistant_turns_and_their_ends_are_trained_and_nothing_else(family):
    template, special, messages, expected = FAMILIES[family]
    tools = [WEATHER] if messages is CALLS else None
    assert trained(make_tokenizer(template, special), messages, tools=tools) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_last_turn_is_trained_where_that_is_asked(family):
    template, special, messages, expected = FAMILIES[family]
    tools = [WEATHER] if messages is CALLS else None
    assert trained(make_tokenizer(template, special), messages, "last", tools) == expected[-1:]


@pytest.mark.parametrize("family", ["ChatML", "Llama 3", "Mistral"])
def test_everything_is_trained_where_that_is_asked(family):
    template, special, messages, _ = FAMILIES[family]
    tokenizer = make_tokenizer(template, special)
    assert trained(tokenizer, messages, "all") == [tokenizer.apply_chat_template(messages, tokenize=False)]


def test_a_role_that_a_template_refuses_is_named():
    tokenizer = make_tokenizer(GEMMA, "<s> <start_of_turn> <end_of_turn>")
    with pytest.raises(DataError, match=r"f:1: the chat template refuses these messages \(no system role\)"):
        ChatRenderer(tokenizer).render(Conversation("f:1", [SYSTEM, *TALK]))


@pytest.mark.parametrize(("tools", "missing"), [([WEATHER], "tools"), (None, "tool_calls")])
def test_a_template_that_would_leave_out_tools_or_calls_is_refused(tools, missing):
    renderer = ChatRenderer(make_tokenizer(CHATML, "<|im_start|> <|im_end|>"))
    with pytest.raises(
        DataError, match=f"f:1: the conversation has '{missing}', which the chat template does not show"
    ):
        renderer.render(Conversation("f:1", CALLS, tools))


def test_prefixes_that_disagree_are_refused_and_marks_make_them_welcome():
    # Tools stand before the last user message: what comes before a turn then reads otherwise once others follow.
    moving = (
        "{% for m in messages %}{% if m.role == 'user' and loop.index0 >= messages | length - 2 %}[TOOLS]{% endif %}"
        "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
        "{% else %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    unmarked = moving.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    special = "[TOOLS] [INST] [/INST]"
    with pytest.raises(DataError, match=r"f:1: .* message 2 begins and ends: .*; add \{% generation %\} markers"):
        trained(make_tokenizer(unmarked, special), TALK)
    expected = ["Hello é 😀<|endoftext|>", "Bye<|endoftext|>"]
    assert trained(make_tokenizer(moving, special), TALK) == expected
