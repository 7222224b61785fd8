import json

import numpy as np
import pytest

from horizon.config.schema import DataConfig, DataFormat, TooLong
from horizon.data import Loader, load_data
from horizon.data.reading import choose_held_out
from horizon.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for n in range(20):
        (folder / f"{n:02}.txt").write_text(f"file {n}: " + "some words to read " * 5)
    return folder


@pytest.fixture
def chat_folder(tmp_path, make_chat_tokenizer, chatml):
    folder = tmp_path / "model"
    make_chat_tokenizer(chatml).save_pretrained(folder)
    return folder


def write_chats(path, num_lines, answer="fine"):
    messages = [{"role": "user", "content": "how?"}, {"role": "assistant", "content": answer}]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for _ in range(num_lines)))
    return str(path)


def report_texts(data, side):
    """The documents of one side, put together from their pieces."""
    (report,) = data.reports
    pieces, tokens = getattr(report, side), report.tokenized.tokens
    runs = [tokens.ids[s : s + n] for s, n in zip(pieces.starts, pieces.lengths, strict=True)]
    return data.tokenizer.decode(np.concatenate(runs)).split("<|endoftext|>")[:-1]


def text_config(path, **settings):
    return DataConfig(format=DataFormat.text, path=str(path), **{"tokenizer": "bytes", **settings})


def decoded(data, rows):
    """The rows' real tokens as one text."""
    return data.tokenizer.decode([token for row in range(len(rows)) for token in rows.ids(row)])


def trained(data, rows):
    """What is trained in the rows, as one text."""
    labels = rows.batch(np.arange(len(rows)))["labels"]
    return data.tokenizer.decode(labels[labels >= 0])


def test_the_standard_library_trains_a_tokenizer_and_fills_rows():
    config = DataConfig(vocab_size=400, max_bytes=100_000)
    data = load_data(config, seq_len=64, seed=0)
    again = load_data(config, seq_len=64, seed=0)
    assert len(data.tokenizer) == 400 and data.validation is not None
    assert max(data.train.ids(0)) < 400
    assert data.train.fingerprint() == again.train.fingerprint()
    assert data.validation.fingerprint() == again.validation.fingerprint()
    assert "standard library sources" in data.summary and f"{len(data.train):,} rows of 64" in data.summary
    assert "import" in decoded(data, data.train)


def test_text_is_all_there_and_divided_by_file(folder):
    data = load_data(text_config(folder, validation_fraction=0.25), seq_len=32, seed=1)
    train, validation = (report_texts(data, side) for side in ("train", "validation"))
    assert (len(train), len(validation)) == (15, 5)
    assert sorted(train + validation) == sorted(path.read_text() for path in folder.iterdir())
    assert data.train.num_tokens.sum() == sum(len(text) + 1 for text in train)


def test_a_validation_path_takes_the_place_of_the_split(folder, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("held out by hand")
    data = load_data(text_config(folder, validation_path=str(other)), seq_len=32, seed=0)
    assert decoded(data, data.validation) == "held out by hand<|endoftext|>"
    assert decoded(data, data.train).count("<|endoftext|>") == 20


def test_without_packing_each_document_has_a_row(folder):
    config = text_config(folder, packing=False, validation_fraction=0.5, too_long=TooLong.truncate)
    data = load_data(config, seq_len=8, seed=0)
    assert not data.train.packed and len(data.train) == 10
    assert "10 truncated" in data.summary
    batch = Loader(data.train, 10, 10, seed=0).next_step()[0]
    assert all(text.startswith("file ") for text in data.tokenizer.batch_decode(batch["input_ids"]))


def test_rows_without_a_label_are_left_out(tmp_path):
    file = tmp_path / "f.txt"
    file.write_text("x" * 8)  # 8 bytes and the end of text: the second row has one token, hence no label
    data = load_data(text_config(file, validation_fraction=0), seq_len=8, seed=0)
    assert len(data.train) == 1
    assert data.validation is None and "validation: none" in data.summary


def test_held_out_lines_without_a_label_leave_validation_out(tmp_path, chat_folder):
    file = tmp_path / "c.jsonl"
    long_question = [{"role": "user", "content": "why? " * 50}, {"role": "assistant", "content": "so"}]
    write_chats(file, 1)
    file.write_text(file.read_text() + json.dumps({"messages": long_question}))
    config = DataConfig(format=DataFormat.messages, path=str(file), validation_fraction=0.5, too_long=TooLong.truncate)
    # Line 2 is cut before its answer; the seed that holds it out leaves nothing to score.
    seed = next(seed for seed in range(20) if choose_held_out(2, 0.5, seed).tolist() == [False, True])
    data = load_data(config, seq_len=48, seed=seed, model_folder=chat_folder)
    assert data.validation is None and "validation: none (no token of them has a label)" in data.summary
    file.write_text(json.dumps({"messages": long_question}))
    config.path, config.validation_path = write_chats(tmp_path / "train.jsonl", 2), str(file)
    with pytest.raises(DataError, match=r"data.validation_path=.*c\.jsonl: no token has a label"):
        load_data(config, seq_len=48, seed=0, model_folder=chat_folder)


def test_messages_are_divided_by_line_and_trained_on_answers_only(tmp_path, chat_folder):
    config = DataConfig(format=DataFormat.messages, path=write_chats(tmp_path / "c.jsonl", 10), validation_fraction=0.2)
    data = load_data(config, seq_len=64, seed=0, model_folder=chat_folder)
    assert trained(data, data.train) == "fine<|im_end|>" * 8
    assert trained(data, data.validation) == "fine<|im_end|>" * 2


def test_messages_need_a_tokenizer_with_a_template(tmp_path):
    config = DataConfig(format=DataFormat.messages, path=write_chats(tmp_path / "c.jsonl", 3))
    with pytest.raises(DataError, match=r"the model's folder has no tokenizer; set data.tokenizer"):
        load_data(config, seq_len=64, seed=0)


def test_nothing_to_train_on_is_named(tmp_path, chat_folder):
    path = write_chats(tmp_path / "c.jsonl", 3)
    config = DataConfig(format=DataFormat.messages, path=path, too_long=TooLong.truncate)
    with pytest.raises(DataError, match=r"nothing to train on, no token of train.seq_len=8 rows has a label"):
        load_data(config, seq_len=8, seed=0, model_folder=chat_folder)


def test_tokens_outside_the_models_vocabulary_are_named_with_their_file(folder, chat_folder):
    (folder / "07.txt").write_text("one <|im_end|> only here")
    config = text_config(folder, tokenizer=str(chat_folder), validation_fraction=0)
    with pytest.raises(DataError, match=r"07\.txt: token 258 \('<\|im_end\|>'\) is outside .* vocabulary of 258"):
        load_data(config, seq_len=32, seed=0, vocab_limit=258)
    load_data(config, seq_len=32, seed=0, vocab_limit=259)


def test_a_trained_vocabulary_larger_than_the_models_is_refused_before_reading(tmp_path):
    config = text_config(tmp_path / "nowhere", tokenizer="train", vocab_size=4096)
    with pytest.raises(DataError, match=r"data.vocab_size=4096 exceeds the model's vocabulary of 512"):
        load_data(config, seq_len=32, seed=0, vocab_limit=512)


@pytest.mark.parametrize(
    ("settings", "seq_len", "message"),
    [
        ({"path": "/tmp"}, 8, "data.path=/tmp is not read by data.format=python_stdlib"),
        ({"format": DataFormat.text}, 8, "data.format=text needs data.path"),
        ({"validation_fraction": 1.0}, 8, "data.validation_fraction=1.0 must be at least 0 and below 1"),
        ({"max_bytes": 0}, 8, "data.max_bytes=0 must be positive"),
        ({}, 1, "train.seq_len=1 must be at least 2"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, seq_len, message):
    with pytest.raises(ConfigError, match=message):
        load_data(DataConfig(**settings), seq_len=seq_len, seed=0)
