"""Datasets of the `datasets` library: saved folders for real, the hub by what is asked of the library."""

import builtins
import inspect
from types import SimpleNamespace

import pytest

from horizon.config.schema import DataConfig, DataFormat
from horizon.data import load_data
from horizon.errors import ConfigError, DataError

datasets = pytest.importorskip("datasets")
huggingface_hub = pytest.importorskip("huggingface_hub")
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

    signature = inspect.signature(datasets.load_dataset)

    def load_dataset(*args, **settings):
        found = signature.bind(*args, **settings).arguments
        streaming = found["streaming"]
        asked.append(tuple(found[key] for key in ("path", "name", "split", "revision", "streaming")))
        whole = datasets.IterableDataset.from_generator(rows) if streaming else datasets.Dataset.from_list(TEXTS)
        return whole

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(
        huggingface_hub, "dataset_info", lambda path, *, revision: SimpleNamespace(sha=f"commit-{revision}")
    )
    return asked, read


def test_a_hub_id_is_asked_for_by_name_subset_and_split(hub):
    data = load(path="owner/name", subset="en", split="validation")
    assert texts(data) == [row["text"] for row in TEXTS]
    assert hub[0] == [("owner/name", "en", "validation", None, False)]
    assert "texts in owner/name" in data.summary


THREE = {"path": "owner/name", "streaming": True, "max_bytes": len("text number 0") * 3}


def test_streaming_reads_the_beginning_and_no_more(hub):
    data = load(**THREE)
    assert texts(data) == [row["text"] for row in TEXTS[:3]]
    assert hub[0] == [("owner/name", None, "train", "commit-None", True)]
    assert len(hub[1]) == 1 + 4  # the first tells the format, the last is too much
    assert "texts in owner/name at commit-None, the first 3 records, up to data.max_bytes=39; token" in data.summary


def test_what_was_streamed_is_read_again_from_the_cache(hub):
    for _ in range(2):
        hub[1].clear()
        data = load(**THREE)
        assert texts(data) == [row["text"] for row in TEXTS[:3]]
        assert "the first 3 records" in data.summary
    assert data.reports[0].tokenized.reused and len(hub[1]) == 1
    others = {"revision": "main"}, {"subset": "en"}, {"split": "test"}, {"max_bytes": 50}
    assert not any(load(**{**THREE, **other}).reports[0].tokenized.reused for other in others)
    assert hub[0][-4] == ("owner/name", None, "train", "commit-main", True)


def test_a_stream_that_breaks_off_says_where(hub, monkeypatch):
    def rows():
        yield from TEXTS[:2]
        raise ConnectionError("the line\nis dead")

    broken = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **settings: broken)
    with pytest.raises(DataError, match=r"dataset owner/name\[train\] ends after record 2 \(the line is dead\)"):
        load(**THREE, revision="broken")


def test_streaming_without_a_dataset_of_the_hub_is_refused(saved, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "a b c"}')
    for path in (saved / "one", file):
        with pytest.raises(ConfigError, match=r"data\.streaming=true reads datasets of the hub, and here is none"):
            load(path=str(path), streaming=True, max_bytes=100)
    with pytest.raises(ConfigError, match=r"is a saved dataset, which has no subset and no revision"):
        load(path=str(saved / "one"), revision="main")
    with pytest.raises(ConfigError, match=r"is read as files, which have no subset, revision and split"):
        load(path=str(file), revision="main")


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
