import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from horizon.config.schema import DataConfig, DataFormat, FieldNames, OnBadData
from horizon.data import cache, load, load_data
from horizon.data.cache import TokenCache, Tokenized, content_hash
from horizon.data.encoding import Tokens

ROOT = Path(__file__).parents[2]


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


def test_two_runs_at_once_make_an_entry_once(tmp_path):
    code = (
        "import sys, time, numpy as np\n"
        "from pathlib import Path\n"
        "from horizon.data.cache import TokenCache, Tokenized\n"
        "from horizon.data.encoding import Tokens\n"
        "folder = Path(sys.argv[1])\n"
        "def make():\n"
        "    (folder / f'made-{sys.argv[2]}').touch()\n"
        "    time.sleep(0.3)\n"
        "    return Tokenized(Tokens(np.arange(1000), np.ones(1000, bool), np.array([1000]), ['a']))\n"
        "print(TokenCache(folder / 'cache').get({'a': 1}, make).tokens.ids.sum())\n"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(n)], stdout=subprocess.PIPE, cwd=ROOT)
        for n in range(2)
    ]
    assert [run.communicate(timeout=100)[0].strip() for run in runs] == [b"499500"] * 2
    assert len(list(tmp_path.glob("made-*"))) == 1


def test_content_is_what_the_files_hold_and_where_each_ends(tmp_path):
    def hashed(*contents):
        files = [tmp_path / str(n) for n in range(len(contents))]
        for file, content in zip(files, contents, strict=True):
            file.write_bytes(content)
        return content_hash(files)

    contents = [(b"ab", b"c"), (b"a", b"bc"), (b"abc",), (b"c", b"ab"), (b"ab", b"c", b"")]
    assert len({hashed(*each) for each in contents}) == len(contents)
    assert hashed(b"ab", b"c") == hashed(b"ab", b"c")


@pytest.fixture
def encoded(monkeypatch):
    """How often anything was encoded."""
    calls, encode = [], load.encode

    def counted(*args, **kwargs):
        calls.append(1)
        return encode(*args, **kwargs)

    monkeypatch.setattr(load, "encode", counted)
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
