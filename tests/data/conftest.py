import pytest

from horizon.data.tokenizer import byte_tokenizer, train_tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def chatml():
    return CHATML


@pytest.fixture
def make_chat_tokenizer():
    """A tokenizer with ChatML's special tokens and the template given."""

    def make(template):
        tokenizer = byte_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def small_tokenizer():
    """Trained on words that merge, among them digits and a contraction: where words end shows in the tokens."""
    return train_tokenizer(["def add(left): 12345 don't\n    return left\n" * 20], vocab_size=275, seed=0)
