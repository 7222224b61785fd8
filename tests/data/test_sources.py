"""Sources from files to rows: formats found and named, what is left out, mixtures."""

import csv
import json

import numpy as np
import pytest

from horizon.config.schema import DataConfig, DataFormat, FieldNames, OnBadData, SourceConfig, TooLong, TrainOn
from horizon.data import load_data
from horizon.errors import ConfigError, DataError


def lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def load(seq_len=64, **settings):
    return load_data(
        DataConfig(**{"tokenizer": "bytes", "validation_fraction": 0, **settings}), seq_len=seq_len, seed=0
    )


def trained(data, rows=None):
    """What is trained, row by row, as one text."""
    rows = data.train if rows is None else rows
    labels = rows.batch(np.arange(len(rows)))["labels"]
    return data.tokenizer.decode(labels[labels >= 0])


def talk(*contents):
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


@pytest.fixture
def chat_folder(tmp_path, make_chat_tokenizer, chatml):
    folder = tmp_path / "tokenizer"
    make_chat_tokenizer(chatml).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"messages": talk("hi", "yo")}, "messages"),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}, "sharegpt"),
        ({"instruction": "hi", "output": "yo"}, "instruction"),
    ],
)
def test_conversations_of_every_kind_are_found_and_trained_alike(tmp_path, chat_folder, row, kind):
    path = lines(tmp_path / "f.jsonl", [row])
    found = load(format=DataFormat.auto, path=path, tokenizer=chat_folder)
    named = load(format=DataFormat[kind], path=path, tokenizer=chat_folder)
    assert trained(found) == "yo<|im_end|>" and f"{kind} in {path}" in found.summary
    assert found.train.ids(0) == named.train.ids(0)


def test_instructions_without_a_template_are_written_plainly(tmp_path):
    file = tmp_path / "f.csv"
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([["q", "input", "a"], ["Add", "1, 2", "3"]])
    names = FieldNames(instruction="q", output="a")
    data = load(format=DataFormat.instruction, path=str(file), fields=names)
    assert data.tokenizer.decode(data.train.ids(0)) == (
        "### Instruction:\nAdd\n\n1, 2\n\n### Response:\n3<|endoftext|>"
    )
    assert trained(data) == "3<|endoftext|>"
    assert data.tokenizer.chat_template is None


@pytest.mark.parametrize(("train_on", "expected"), [("last", "d<|im_end|>"), ("assistant", "b<|im_end|>d<|im_end|>")])
def test_a_template_of_your_own_is_used_and_kept(tmp_path, chatml, train_on, expected):
    path = lines(tmp_path / "f.jsonl", [{"messages": talk("a", "b", "c", "d")}])
    (tmp_path / "t.jinja").write_text(chatml)
    data = load(
        seq_len=400,
        path=path,
        format=DataFormat.auto,
        chat_template=str(tmp_path / "t.jinja"),
        train_on=TrainOn[train_on],
    )
    assert trained(data) == expected and data.tokenizer.chat_template == chatml


def test_conversations_without_a_template_and_unreadable_templates_are_named(tmp_path):
    path = lines(tmp_path / "f.jsonl", [{"messages": talk("a", "b")}])
    with pytest.raises(DataError, match=r"conversations: the tokenizer has no chat template; set data\.chat_template"):
        load(path=path, format=DataFormat.messages)
    with pytest.raises(DataError, match=r"none\.jinja: cannot be read"):
        load(path=path, format=DataFormat.messages, chat_template=str(tmp_path / "none.jinja"))


def test_records_that_cannot_be_used_stop_the_run_or_are_counted(tmp_path, chat_folder):
    path = lines(
        tmp_path / "f.jsonl",
        [{"messages": talk("a", "b")}, {"messages": talk("a")}, {"msgs": 3}, {"messages": talk("c", "d")}],
    )
    settings = {"path": path, "format": DataFormat.messages, "tokenizer": chat_folder}
    with pytest.raises(DataError, match=r"f\.jsonl:2: no message has the role 'assistant'.*data\.on_error=skip"):
        load(**settings)
    for _ in range(2):  # the second time from the cache
        data = load(**settings, on_error=OnBadData.skip)
        assert trained(data) == "b<|im_end|>d<|im_end|>"
        assert "2 records left out, the first: " in data.summary and "f.jsonl:2: no message" in data.summary


def test_what_the_template_refuses_is_left_out_too_and_nothing_left_is_an_error(tmp_path, make_chat_tokenizer, chatml):
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + chatml
    make_chat_tokenizer(strict).save_pretrained(tmp_path / "t")
    system = [{"role": "system", "content": "s"}, *talk("a", "b")]
    settings = {"format": DataFormat.messages, "tokenizer": str(tmp_path / "t"), "on_error": OnBadData.skip}
    data = load(path=lines(tmp_path / "f.jsonl", [{"messages": system}, {"messages": talk("c", "d")}]), **settings)
    assert trained(data) == "d<|im_end|>" and "1 records left out" in data.summary
    with pytest.raises(DataError, match=r"all 1 records were left out, the first: .*:1: .*\(no system\)"):
        load(path=lines(tmp_path / "g.jsonl", [{"messages": system}]), **settings)
    with pytest.raises(DataError, match=r"dataset is empty; 1 were left out, the first: .*h\.jsonl:1: not JSON"):
        (tmp_path / "h.jsonl").write_text("{")
        load(path=str(tmp_path / "h.jsonl"), **settings)


def test_a_folder_of_one_kind_is_found_and_a_mixed_one_is_not_guessed_at(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    lines(folder / "b.jsonl", [{"text": "two"}])
    lines(folder / "a.json", [{"text": "one"}])
    data = load(path=str(folder), format=DataFormat.auto)
    assert data.tokenizer.decode(data.train.ids(0)) == "one<|endoftext|>two<|endoftext|>"
    (folder / "README.md").write_text("read me")
    with pytest.raises(DataError, match=r"holds records \(a\.json\) and text \(README\.md\); set data\.format"):
        load(path=str(folder), format=DataFormat.auto)
    assert load(path=str(folder), format=DataFormat.text_field).train.num_tokens.tolist() == [8]
    assert load(path=str(folder), format=DataFormat.text).reports[0].train.counts.documents == 3
    with pytest.raises(DataError, match=r"README\.md: data\.format=messages reads \.jsonl"):
        load(path=str(folder / "README.md"), format=DataFormat.messages)


def test_max_bytes_chooses_records_by_seed_and_keeps_their_order(tmp_path):
    path = lines(tmp_path / "f.jsonl", [{"text": f"text {n}"} for n in range(9)])
    data = load(path=path, format=DataFormat.text_field, max_bytes=18)
    found = data.tokenizer.decode(data.train.ids(0)).split("<|endoftext|>")[:-1]
    assert len(found) == 3 and found == sorted(found) and found != ["text 0", "text 1", "text 2"]
    with pytest.raises(DataError, match=r"no record in .* within data.max_bytes=5"):
        load(path=path, format=DataFormat.text_field, max_bytes=5)


@pytest.mark.parametrize(
    ("too_long", "counted"), [("split", "1 split"), ("truncate", "1 truncated (8 tok"), ("drop", "1 dro")]
)
def test_what_became_of_long_documents_is_said(tmp_path, too_long, counted):
    path = lines(tmp_path / "f.jsonl", [{"text": "x" * 23}, {"text": "short"}])
    data = load(path=path, format=DataFormat.text_field, too_long=TooLong[too_long], seq_len=16)
    assert counted in data.summary


@pytest.fixture
def mixture(tmp_path, chat_folder):
    path = lines(tmp_path / "chats.jsonl", [{"messages": talk("hi", "yo")}] * 4)
    (tmp_path / "texts").mkdir()
    for n in range(8):
        (tmp_path / "texts" / f"{n}.txt").write_text(f"text {n} " + "and more " * 9)
    sources = [SourceConfig(path=path, weight=3), SourceConfig(path=str(tmp_path / "texts"), weight=1, name="books")]
    return {"format": DataFormat.mixture, "sources": sources, "tokenizer": chat_folder}


def test_sources_of_a_mixture_keep_their_formats_names_and_rows_apart(mixture):
    data = load(**mixture, validation_fraction=0.25)
    assert [(source.name, source.weight) for source in data.train.sources] == [("chats.jsonl", 3), ("books", 1)]

    def of_source(rows, index):
        return trained(data, rows.select(rows.source == index))

    assert of_source(data.train, 0) == "yo<|im_end|>" * 3
    assert "text" in of_source(data.train, 1) and "yo" not in of_source(data.train, 1)
    assert of_source(data.validation, 0) == "yo<|im_end|>"
    assert "ext" in of_source(data.validation, 1)
    assert sorted(data.validation.source[:2]) == [0, 1]  # the beginning, which a run may score alone, has both
    assert "chats.jsonl: messages in" in data.summary and "books: text in" in data.summary


def test_a_validation_path_of_a_mixture_is_a_source_of_its_own(mixture, tmp_path):
    data = load(**mixture, validation_path=lines(tmp_path / "v.jsonl", [{"messages": talk("hi", "fine")}]))
    assert trained(data, data.validation) == "fine<|im_end|>"
    assert [source.name for source in data.validation.sources] == ["validation"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": []}, r"data\.format=mixture needs data\.sources"),
        ({"path": "/tmp"}, r"data\.path=/tmp is not read by data\.format=mixture"),
        ({"sources": [SourceConfig(path="a", weight=0)]}, r"have the weights \[0\]: each must be"),
        (
            {"sources": [SourceConfig(path="a", weight=1), SourceConfig(path="b")]},
            r"have the weights \[1, None\]: give each source one, or none",
        ),
        ({"sources": [SourceConfig(path="a", format=DataFormat.mixture)]}, r"a source cannot be a mixture itself"),
        ({"sources": [SourceConfig(path="no/such/file")]}, r"data\.sources\[0\]\.path=no/such/file does not exist"),
        ({"format": DataFormat.text, "path": "/tmp"}, r"data\.sources are not read by data\.format=text"),
        ({"split": "test"}, r"data\.fields are not read by data\.format=mixture; give them to a source"),
        ({"streaming": True}, r"data\.streaming=true reads the beginning of a dataset: set data\.max_bytes"),
    ],
)  # fmt: skip
def test_mixtures_that_cannot_work_are_named(mixture, settings, message):
    with pytest.raises((ConfigError, DataError), match=message):
        load(**{**mixture, **settings})


def test_a_source_with_a_weight_that_leaves_nothing_to_train_on_is_named(mixture):
    mixture["too_long"] = TooLong.truncate
    with pytest.raises(DataError, match=r"messages in .*chats\.jsonl: nothing to train on, no token of"):
        load(**mixture, seq_len=8)
    for source in mixture["sources"]:
        source.weight = None
    data = load(**mixture, seq_len=8)
    assert set(data.train.source.tolist()) == {1}


def test_sources_need_names_of_their_own(mixture):
    for source in mixture["sources"]:
        source.name = "same"
    with pytest.raises(ConfigError, match=r"names same, same: give each a name of its own"):
        load(**mixture)


def test_a_lone_text_is_divided_near_its_end(tmp_path):
    (tmp_path / "f.txt").write_text("".join(f"line {n}\n" for n in range(100, 200)))
    data = load(path=str(tmp_path / "f.txt"), format=DataFormat.text, validation_fraction=0.2, seq_len=32)
    head, tail = ([n for row in range(len(rows)) for n in rows.ids(row)] for rows in (data.train, data.validation))
    assert data.tokenizer.decode(head).startswith("line 100") and "line 199" in data.tokenizer.decode(tail)
    assert abs(len(tail) - 180) <= 32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_on": TrainOn.last}, r"data\.train_on=last is for conversations, and the data are text"),
        ({"subset": "en"}, r"is read as files, which have no subset, revision and split"),
        ({"split": "test"}, r"is read as files, which have no subset, revision and split"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(tmp_path, settings, message):
    (tmp_path / "f.txt").write_text("abc")
    with pytest.raises(ConfigError, match=message):
        load(path=str(tmp_path / "f.txt"), format=DataFormat.auto, **settings)


def test_too_little_to_hold_out_leaves_validation_empty(tmp_path):
    (tmp_path / "f.txt").write_text("abc")
    data = load(path=str(tmp_path / "f.txt"), format=DataFormat.text, validation_fraction=0.1)
    assert data.validation is None and "validation: none" in data.summary
