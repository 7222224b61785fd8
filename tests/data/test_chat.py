import pytest

from horizon.data.chat import ChatRenderer
from horizon.data.encoding import encode
from horizon.data.samples import Conversation
from horizon.errors import DataError

TWO_TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello é 😀 "},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Bye"},
]
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_WITHOUT_END = MARKED.replace(
    " + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}", " }}{% endgeneration %}{{ '<|im_end|>\n' }}"
)
# As Qwen3 does it: the last turn shows an empty thought that earlier turns do not.
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As gpt-oss does it: a turn that others follow ends differently from the last one.
TWO_ENDS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ':' + message['content'] }}"
    "{% if loop.last and message['role'] == 'assistant' %}{{ '<|endoftext|>' }}{% else %}{{ '<|im_end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
)
# No special tokens at all, and no end of turn but the line's.
PLAIN = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def trained_text(tokenizer, messages):
    """What is trained, as text: one string for each run of trained tokens."""
    tokens = encode(tokenizer, [ChatRenderer(tokenizer).render(Conversation("f:1", messages))])
    runs, previous = [], False
    for token_id, trained in zip(tokens.ids.tolist(), tokens.trained.tolist(), strict=True):
        if trained:
            runs = runs if previous else [*runs, []]
            runs[-1].append(token_id)
        previous = trained
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template", ["chatml", MARKED, MARKED_WITHOUT_END])
def test_every_assistant_turn_is_trained_with_its_end(make_chat_tokenizer, chatml, template):
    tokenizer = make_chat_tokenizer(chatml if template == "chatml" else template)
    assert trained_text(tokenizer, TWO_TURNS) == ["Hello é 😀 <|im_end|>", "Bye<|im_end|>"]


@pytest.mark.parametrize("template", ["chatml", MARKED])
def test_a_conversation_is_encoded_as_the_template_writes_it(make_chat_tokenizer, chatml, template):
    tokenizer = make_chat_tokenizer(chatml if template == "chatml" else template)
    tokens = encode(tokenizer, [ChatRenderer(tokenizer).render(Conversation("f:1", TWO_TURNS))])
    expected = tokenizer.apply_chat_template(TWO_TURNS, return_dict=True, return_assistant_tokens_mask=True)
    assert tokens.ids.tolist() == expected["input_ids"]
    if template == MARKED:
        assert tokens.trained.tolist() == [bool(trained) for trained in expected["assistant_masks"]]


def test_earlier_turns_may_be_shown_differently_from_the_last(make_chat_tokenizer):
    trained = trained_text(make_chat_tokenizer(THINKING), TWO_TURNS)
    assert trained == ["Hello é 😀 <|im_end|>", "<think></think>Bye<|im_end|>"]


def test_the_last_turn_may_end_differently(make_chat_tokenizer):
    trained = trained_text(make_chat_tokenizer(TWO_ENDS), TWO_TURNS)
    assert trained == ["Hello é 😀 <|im_end|>", "Bye<|endoftext|>"]


def test_a_template_without_special_tokens_ends_turns_as_it_renders_prefixes(make_chat_tokenizer):
    assert trained_text(make_chat_tokenizer(PLAIN), TWO_TURNS) == ["Hello é 😀 \n", "Bye\n"]


def test_a_conversation_may_end_with_the_user(make_chat_tokenizer, chatml):
    assert trained_text(make_chat_tokenizer(chatml), TWO_TURNS[:4]) == ["Hello é 😀 <|im_end|>"]


def test_a_template_that_hides_where_turns_lie_is_refused(make_chat_tokenizer, chatml):
    counting = "{{ messages | length }} " + chatml
    renderer = ChatRenderer(make_chat_tokenizer(counting))
    with pytest.raises(DataError, match=r"f:7: .*message 3 begins and ends: .* add \{% generation %\} markers"):
        renderer.render(Conversation("f:7", TWO_TURNS))


def test_a_template_that_marks_nothing_is_refused(make_chat_tokenizer, chatml):
    renderer = ChatRenderer(
        make_chat_tokenizer(chatml + "{% if false %}{% generation %}{% endgeneration %}{% endif %}")
    )
    with pytest.raises(DataError, match="f:2: the chat template marks no assistant turn"):
        renderer.render(Conversation("f:2", TWO_TURNS))


def test_a_template_that_raises_is_named_with_file_and_line(make_chat_tokenizer, chatml):
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + chatml
    renderer = ChatRenderer(make_chat_tokenizer(strict))
    with pytest.raises(DataError, match=r"f:3: the chat template refuses these messages \(no system role\)"):
        renderer.render(Conversation("f:3", TWO_TURNS))


def test_a_tokenizer_without_template_is_refused(small_tokenizer):
    with pytest.raises(DataError, match=r"has no chat template; set data.chat_template"):
        ChatRenderer(small_tokenizer)
