import json
import threading
from pathlib import Path

import numpy as np
import pytest

from horizon.config.schema import DataConfig, DataFormat, FieldNames, OnBadData
from horizon.data import cache, load_data, reading
from horizon.data.cache import TokenCache, Tokenized, content_hash
from horizon.data.encoding import Tokens


def tokenized(trained=(True, False, True)):
    return Tokenized(Tokens(np.arange(3, dtype=np.int32), np.array(trained), np.array([1, 2]), ["a", "b"]), 4, "bad")


def never():
    raise AssertionError("made again")


@pytest.mark.parametrize("trained", [(True, False, True), (True, True, True)])
def test_what_is_kept_is_what_was_made(tmp_path, trained):
    made = TokenCache(tmp_path).get({"a": 1}, lambda: tokenized(trained))
    found = TokenCache(tmp_path).get({"a": 1}, never)
    assert (made.reused, found.reused) == (False, True)
    for item in (made, found):
        assert item.tokens.ids.tolist() == [0, 1, 2] and item.tokens.trained.tolist() == list(trained)
        assert item.tokens.lengths.tolist() == [1, 2] and item.tokens.where == ["a", "b"]
        assert (item.num_skipped, item.first_skipped) == (4, "bad")
    assert isinstance(found.tokens.ids, np.memmap)


def test_other_facts_are_another_entry_and_unknown_ones_none(tmp_path):
    keep, calls = TokenCache(tmp_path), []
    for facts in ({"a": 1}, {"a": 2}, {"a": 1}, {"a": None}, {"a": None}):
        keep.get(facts, lambda facts=facts: calls.append(facts["a"]) or tokenized())
    assert calls == [1, 2, None, None]


@pytest.mark.parametrize("damage", ["truncate", "remove", "about", "length"])
def test_a_damaged_entry_is_made_again(tmp_path, damage, caplog):
    TokenCache(tmp_path).get({}, tokenized)
    (entry,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    if damage == "truncate":
        (entry / "ids.npy").write_bytes((entry / "ids.npy").read_bytes()[:-4])
    elif damage == "remove":
        (entry / "lengths.npy").unlink()
    elif damage == "about":
        (entry / "about.json").write_text("{")
    else:
        np.save(entry / "lengths.npy", np.array([1, 1]))
    made = TokenCache(tmp_path).get({}, tokenized)
    assert made.tokens.ids.tolist() == [0, 1, 2] and "is damaged" in caplog.text
    assert TokenCache(tmp_path).get({}, never).reused


def test_nothing_is_kept_of_what_fails_and_what_a_killed_run_left_is_no_entry(tmp_path):
    with pytest.raises(AssertionError):
        TokenCache(tmp_path).get({}, never)
    (lock,) = tmp_path.iterdir()
    lock.with_suffix(".partial").mkdir()
    (lock.with_suffix(".partial") / "ids.npy").write_bytes(b"half")
    assert not TokenCache(tmp_path).get({}, tokenized).reused
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".lock"}


def test_a_folder_that_cannot_be_written_keeps_nothing_and_stops_nothing(tmp_path, caplog):
    (tmp_path / "file").touch()
    for _ in range(2):
        assert not TokenCache(tmp_path / "file").get({}, tokenized).reused
    assert "nothing is kept" in caplog.text


def test_of_two_runs_at_once_the_second_waits_for_what_the_first_makes(tmp_path):
    found, calls = [], []

    def second():
        found.append(TokenCache(tmp_path).get({"a": 1}, lambda: calls.append("second") or tokenized()))

    def make():
        calls.append("first")
        other.start()
        other.join(timeout=0.5)  # it opens the lock's file itself, as another process would
        assert other.is_alive() and not found
        return tokenized()

    other = threading.Thread(target=second)
    TokenCache(tmp_path).get({"a": 1}, make)
    other.join(timeout=60)
    assert calls == ["first"] and found[0].reused and found[0].tokens.ids.tolist() == [0, 1, 2]


def test_content_is_what_the_files_hold_and_where_each_ends(tmp_path):
    def hashed(*contents):
        files = [tmp_path / str(n) for n in range(len(contents))]
        for file, content in zip(files, contents, strict=True):
            file.write_bytes(content)
        return content_hash(files)

    contents = [(b"ab", b"c"), (b"a", b"bc"), (b"abc",), (b"c", b"ab"), (b"ab", b"c", b"")]
    assert len({hashed(*each) for each in contents}) == len(contents)
    assert hashed(b"ab", b"c") == hashed(b"ab", b"c")
    assert len({content_hash(files) for files in ([tmp_path], [tmp_path / "0"], [])}) == 3  # a folder cannot be read


@pytest.fixture
def encoded(monkeypatch):
    """How often anything was encoded."""
    calls, encode = [], reading.encode

    def counted(*args, **kwargs):
        calls.append(1)
        return encode(*args, **kwargs)

    monkeypatch.setattr(reading, "encode", counted)
    return calls


def test_a_run_uses_what_another_tokenized_until_text_tokenizer_or_settings_change(tmp_path, encoded):
    file = tmp_path / "f.jsonl"

    def write(*texts):
        file.write_text("".join(json.dumps({"text": text, "body": text[::-1]}) + "\n" for text in texts))

    def run(seed=0, **settings):
        config = DataConfig(
            **{
                "format": DataFormat.auto,
                "path": str(file),
                "tokenizer": "bytes",
                "cache": str(tmp_path / "c"),
                **settings,
            }
        )
        before = len(encoded)
        data = load_data(config, seq_len=16, seed=seed)
        assert ("tokenized before" in data.summary) == (len(encoded) == before)
        return len(encoded) - before, data.train.fingerprint()

    write("one two three", "four five six", "seven")
    first = run()
    assert first[0] == 1 and run() == (0, first[1])
    changed_order = run(seed=1)
    assert changed_order[0] == 0 and changed_order[1] != first[1]  # other documents are held out
    assert run(validation_fraction=0.5)[0] == run(packing=False)[0] == 0
    for settings in (
        {"fields": FieldNames(text="body")}, {"tokenizer": "train", "vocab_size": 260}, {"max_bytes": 30},
        {"on_error": OnBadData.skip}, {"format": DataFormat.text},
    ):  # fmt: skip
        assert run(**settings)[0] == 1, settings
        assert run(**settings)[0] == 0, settings
    assert run(max_bytes=30, seed=1)[0] == 1  # other records are read
    assert [run(cache=None)[0] for _ in range(2)] == [1, 1]
    write("one two three", "four five six", "eight")
    assert run()[0] == 1


def test_the_folder_is_the_users_unless_one_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder("auto") == tmp_path / "horizon" / "tokens"
    assert cache.cache_folder("~/x") == Path.home() / "x"
    assert cache.cache_folder(None) is None
