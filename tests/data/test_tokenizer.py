import json

import pytest

from horizon.data.tokenizer import END_OF_TEXT, byte_tokenizer, given_tokenizer, train_tokenizer
from horizon.errors import ConfigError, DataError

TEXT = "def area(width, height):\n\treturn width * height  # don't 12345 m²  😀\n\n"


def test_training_is_deterministic_and_fills_the_vocabulary():
    first, second = (train_tokenizer([TEXT * 5, "other words entirely\n" * 9], 300, seed=1) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert len(first) == 300
    assert len(first(TEXT)["input_ids"]) < len(TEXT.encode())


def test_the_sample_is_bounded_and_seeded(monkeypatch):
    monkeypatch.setattr("horizon.data.tokenizer._SAMPLE_CHARS", 100)
    monkeypatch.setattr("horizon.data.tokenizer._CHUNK_CHARS", 40)
    texts = ["a" * 90, "b" * 10, "c" * 200]
    from horizon.data.tokenizer import _sample

    assert sum(map(len, _sample(texts, seed=0))) == 100
    assert list(_sample(texts, seed=0)) == list(_sample(texts, seed=0)) != list(_sample(texts, seed=1))
    assert "".join(sorted("".join(_sample(texts[:2], seed=0)))) == "a" * 90 + "b" * 10


def test_bytes_are_one_token_each_and_come_back(tmp_path):
    tokenizer = byte_tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    assert len(tokenizer) == 257 and len(ids) == len(TEXT.encode()) and max(ids) < 256
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.eos_token == END_OF_TEXT and tokenizer.eos_token_id == 256


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("kind", ["trained", "bytes"])
def test_a_saved_tokenizer_reads_text_as_before(tmp_path, small_tokenizer, kind, model_type):
    tokenizer = small_tokenizer if kind == "trained" else byte_tokenizer()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer.save_pretrained(tmp_path)
    loaded = given_tokenizer("auto", tmp_path)
    ids = tokenizer(TEXT)["input_ids"]
    assert loaded(TEXT)["input_ids"] == ids
    assert loaded.decode(ids) == TEXT
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_auto_prefers_the_models_own_tokenizer(tmp_path, small_tokenizer):
    assert given_tokenizer("auto", None) is None
    assert given_tokenizer("auto", tmp_path) is None
    small_tokenizer.save_pretrained(tmp_path)
    assert len(given_tokenizer("auto", tmp_path)) == 275
    assert given_tokenizer("train", tmp_path) is None
    assert len(given_tokenizer("bytes", tmp_path)) == 257
    assert len(given_tokenizer(str(tmp_path), None)) == 275


def test_a_folder_that_does_not_exist_or_is_damaged_is_named(tmp_path):
    with pytest.raises(DataError, match=r"data.tokenizer='gpt2' is no folder; expected auto, train, bytes or a folder"):
        given_tokenizer("gpt2", None)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer in .* does not load \(.*\); set data.tokenizer"):
        given_tokenizer("auto", tmp_path)


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(ConfigError, match=r"data.vocab_size=256 must be at least 257"):
        train_tokenizer(["text"], 256, seed=0)
