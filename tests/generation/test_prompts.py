"""Prompts from files, as token ids, and what was written back as text."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from horizon.data.tokenizer import byte_tokenizer
from horizon.errors import DataError
from horizon.generation.prompts import Prompt, end_ids, new_texts, pad_left, padding_id, read_prompts


def test_special_tokens_are_added_unless_a_template_has_written_them():
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: (text, add_special_tokens))
    assert Prompt("a").encode(tokenizer, "b") == ("ab", True)
    assert Prompt("a", is_rendered=True).encode(tokenizer) == ("a", False)


def test_rows_are_padded_on_the_left():
    ids, mask = pad_left([[5], [6, 7, 8], [9, 9]], 3)
    assert ids.tolist() == [[3, 3, 5], [6, 7, 8], [3, 9, 9]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1], [0, 1, 1]]


def test_a_text_ends_at_a_token_that_ends_texts():
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: ids)
    rows = torch.tensor([[0, 4, 2, 0], [0, 5, 6, 7]])
    assert new_texts(tokenizer, rows, 1, [2, 9]) == [("[4, 2]", 2), ("[5, 6, 7]", 3)]


@pytest.mark.parametrize(("own", "of_tokenizer", "found"), [(None, None, []), (3, 1, [1, 3]), ([4, 3], None, [3, 4])])
def test_texts_end_as_the_model_or_its_tokenizer_says(own, of_tokenizer, found):
    tokenizer = SimpleNamespace(eos_token_id=of_tokenizer, pad_token_id=None)
    assert end_ids(tokenizer, GenerationConfig(eos_token_id=own)) == found
    assert padding_id(tokenizer) == (of_tokenizer or 0)


def test_a_file_of_lines_and_one_of_objects(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    (tmp_path / "a.txt").write_text("one\n\n two\n")
    assert read_prompts(tmp_path / "a.txt", tokenizer) == [Prompt("one"), Prompt(" two")]
    records = [{"prompt": "one"}, {"messages": [{"role": "user", "content": "Hi"}], "note": "kept by nobody"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert read_prompts(tmp_path / "a.jsonl", tokenizer) == [Prompt("one"), Prompt("Hi|", is_rendered=True)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n", "holds no prompt"),
        ("a.txt", b"\xff", "cannot be read"),
        ("a.jsonl", b'{"text": "a"}', r"a.jsonl:1: expected either 'prompt' or 'messages', found \['text'\]"),
        ("a.jsonl", b'\n{"prompt": 1}', "a.jsonl:2: 'prompt' is 1"),
        ("a.jsonl", b'{"messages": [{}]}', "does not render 'messages'"),
    ],
)
def test_what_is_no_prompt_is_refused(name, content, message, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_prompts(tmp_path / name, tokenizer)
