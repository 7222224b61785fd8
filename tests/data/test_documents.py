import logging

import pytest

from horizon.data.documents import (
    list_files,
    list_stdlib,
    read_documents,
    stdlib_folder,
)
from horizon.errors import DataError


def write(folder, **texts):
    for name, text in texts.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


def test_stdlib_sources_are_library_code_only():
    root = stdlib_folder()
    names = [path.relative_to(root).as_posix() for path in list_stdlib(root)]
    assert {"ast.py", "asyncio/base_events.py", "json/decoder.py"} <= set(names)
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "idlelib", "lib2to3", "encodings"}
    assert names == [path.relative_to(root).as_posix() for path in list_stdlib(root)]


def test_an_interpreter_without_sources_is_named(tmp_path):
    with pytest.raises(DataError, match=r"python_stdlib: no \.py files under .*; set data.format=text"):
        list_stdlib(tmp_path)


def test_a_folder_is_read_in_sorted_order_without_hidden_files(tmp_path):
    write(tmp_path, b="second", a__z="first", **{".hidden": "no", "c__.git__d": "no"})
    documents = read_documents(list_files(str(tmp_path), "data.path"), None, seed=3)
    assert [(document.where, document.text) for document in documents] == [
        (str(tmp_path / "a" / "z"), "first"),
        (str(tmp_path / "b"), "second"),
    ]


def test_a_missing_path_and_an_empty_folder_name_the_setting(tmp_path):
    with pytest.raises(DataError, match=r"data.path=.*nowhere does not exist"):
        list_files(str(tmp_path / "nowhere"), "data.path")
    with pytest.raises(DataError, match=r"data.validation_path=.* is a folder without \.jsonl, \.csv files"):
        list_files(str(tmp_path), "data.validation_path", (".jsonl", ".csv"))


@pytest.mark.parametrize(
    ("content", "reason"), [(b"fine\nbad \xff here", r":2: not UTF-8 text"), (b"fine\n\nno\0", r":3: .*NUL byte")]
)
def test_a_lone_file_that_is_not_text_is_named_with_its_line(tmp_path, content, reason):
    write(tmp_path, f=content)
    with pytest.raises(DataError, match=reason):
        read_documents([tmp_path / "f"], None, seed=0)


def test_files_that_are_not_text_are_skipped_and_counted_among_others(tmp_path, caplog):
    write(tmp_path, a="text", b=b"\xff", c=b"\xfe")
    with caplog.at_level(logging.WARNING):
        documents = read_documents(list_files(str(tmp_path), "data.path"), None, seed=0)
    assert [document.text for document in documents] == ["text"]
    assert "skipped 2 of 3 files" in caplog.text


def test_blank_text_is_an_empty_dataset(tmp_path):
    write(tmp_path, a=" \n", b="")
    with pytest.raises(DataError, match="no text in any of 2 files: dataset is empty"):
        read_documents(list_files(str(tmp_path), "data.path"), None, seed=0)


def test_max_bytes_limits_what_is_read_and_the_seed_chooses(tmp_path):
    write(tmp_path, **{name: name * 10 for name in "abcdefgh"})
    files = list_files(str(tmp_path), "data.path")
    chosen = {seed: read_documents(files, 25, seed) for seed in range(4)}
    for documents in chosen.values():
        assert sorted(len(document.text) for document in documents) == [5, 10, 10]
        assert [document.where for document in documents] == sorted(document.where for document in documents)
    assert len({tuple(document.where for document in documents) for documents in chosen.values()}) > 1
    assert chosen[2] == read_documents(files, 25, 2)


def test_max_bytes_does_not_cut_a_character_in_two(tmp_path):
    write(tmp_path, f="aé" * 10)
    assert read_documents([tmp_path / "f"], 5, seed=0)[0].text == "aéa"
