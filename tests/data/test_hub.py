"""Datasets of the `datasets` library: saved folders for real, the hub by what is asked of the library."""

import builtins

import pytest

from horizon.config.schema import DataConfig, DataFormat
from horizon.data import load_data
from horizon.errors import ConfigError, DataError

datasets = pytest.importorskip("datasets")
TEXTS = [{"text": f"text number {n}"} for n in range(6)]


def load(**settings):
    config = DataConfig(**{"tokenizer": "bytes", "validation_fraction": 0, "format": DataFormat.auto, **settings})
    return load_data(config, seq_len=32, seed=0)


def texts(data):
    tokens = data.reports[0].tokenized.tokens
    return data.tokenizer.decode(tokens.ids).split("<|endoftext|>")[:-1]


@pytest.fixture
def saved(tmp_path):
    datasets.Dataset.from_list(TEXTS).save_to_disk(tmp_path / "one")
    parts = {"train": datasets.Dataset.from_list(TEXTS[:2]), "test": datasets.Dataset.from_list(TEXTS[2:])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "split")
    return tmp_path


def test_a_saved_folder_is_read_and_its_split_chosen(saved):
    assert texts(load(path=str(saved / "one"))) == [row["text"] for row in TEXTS]
    assert texts(load(path=str(saved / "split"))) == [row["text"] for row in TEXTS[:2]]
    data = load(path=str(saved / "split"), split="test")
    assert texts(data) == [row["text"] for row in TEXTS[2:]]
    assert data.reports[0].tokenized.tokens.where[0] == f"{saved / 'split'}[test]: record 1"


def test_a_split_that_is_not_there_is_named(saved):
    with pytest.raises(DataError, match=r"dataset .*split\[dev\] cannot be opened"):
        load(path=str(saved / "split"), split="dev")
    with pytest.raises(ConfigError, match=r"data\.format=text reads files; a dataset has records"):
        load(path=str(saved / "one"), format=DataFormat.text)


@pytest.fixture
def hub(monkeypatch):
    """What is asked of the library, in place of a network; a dataset whose records are counted as they are read."""
    asked, read = [], []

    def rows():
        for row in TEXTS:
            read.append(row)
            yield row

    def load_dataset(path, subset, *, split, streaming):
        asked.append((path, subset, split, streaming))
        whole = datasets.IterableDataset.from_generator(rows) if streaming else datasets.Dataset.from_list(TEXTS)
        return whole

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked, read


def test_a_hub_id_is_asked_for_by_name_subset_and_split(hub):
    data = load(path="owner/name", subset="en", split="validation")
    assert texts(data) == [row["text"] for row in TEXTS]
    assert hub[0] == [("owner/name", "en", "validation", False)]
    assert "texts in owner/name" in data.summary


def test_streaming_reads_the_beginning_and_no_more_and_keeps_nothing(hub):
    for _ in range(2):
        hub[1].clear()
        data = load(path="owner/name", streaming=True, max_bytes=len("text number 0") * 3)
        assert texts(data) == [row["text"] for row in TEXTS[:3]]
        assert hub[0][-1][3] is True and len(hub[1]) == 1 + 4  # the first tells the format, the last is too much
        assert not data.reports[0].tokenized.reused


def test_a_path_that_is_none_and_no_hub_id_asks_nobody(hub):
    for path in ("nowhere.jsonl", "/no/such", "./a/b", "a/b/c"):
        with pytest.raises(DataError, match=r"data\.path=.* does not exist; expected a file or a folder"):
            load(path=path)
    assert hub[0] == []


def test_a_hub_id_without_the_library_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ConfigError, match=r"data\.path=owner/name is no file or folder; .*pip install 'horizon\[data\]'"
    ):
        load(path="owner/name")
