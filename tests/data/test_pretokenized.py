import numpy as np
import pytest

from horizon.config.schema import DataConfig, DataFormat
from horizon.data import load_data
from horizon.data.pretokenized import read_tokens, token_files
from horizon.data.tokenizer import byte_tokenizer
from horizon.errors import ConfigError, DataError

IDS = [5, 6, 7, 8, 9, 256, 11]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("f.npy", "int64"), ("f.npy", ">u4"), ("f.bin", "uint16"), ("f.bin", "uint32"), ("f.bin", "int32")],
)
def test_ids_offsets_and_masks_are_read_as_documented(tmp_path, name, dtype):
    file, array = tmp_path / name, np.array(IDS, dtype)
    if name.endswith(".npy"):
        np.save(file, array)
    else:
        file.write_bytes(array.astype(array.dtype.newbyteorder("<")).tobytes())
    np.save(tmp_path / "f.offsets.npy", np.array([0, 3, 3, 7]))
    np.save(tmp_path / "f.trained.npy", np.array([0, 1, 1, 0, 0, 1, 1]))
    assert token_files(sorted(tmp_path.iterdir())) == [file]
    tokens = read_tokens([file], dtype if name == "f.bin" else "uint16")
    assert tokens.ids.tolist() == IDS and tokens.lengths.tolist() == [3, 0, 4]
    assert tokens.trained.tolist() == [False, True, True, False, False, True, True]
    assert tokens.where[2] == f"{file}: document 3"


def test_a_file_alone_is_one_document_all_of_it_trained_and_files_follow_each_other(tmp_path):
    for name, ids in (("a", IDS[:3]), ("b", IDS[3:])):
        np.save(tmp_path / f"{name}.npy", np.array(ids))
    tokens = read_tokens([tmp_path / "a.npy", tmp_path / "b.npy"], "uint16")
    assert tokens.ids.tolist() == IDS and tokens.lengths.tolist() == [3, 4] and tokens.trained.all()


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"f.npy": np.array([1.5])}, r"f\.npy: holds float64, expected integers"),
        ({"f.npy": np.array([[1]])}, r"f\.npy: has shape \(1, 1\), expected one dimension"),
        ({"f.npy": np.array([3, -1])}, r"f\.npy: token 1 is -1"),
        ({"f.npy": np.array([], int)}, r"f\.npy: holds no token"),
        ({"f.npy": b"nothing"}, r"f\.npy: no array of numpy's"),
        ({"f.npy": np.array([{}])}, r"f\.npy: no array of numpy's \(.*Python objects"),
        ({"f.bin": b"123"}, r"f\.bin: 3 bytes are no array of data\.token_dtype=uint16 \(2 bytes a token\)"),
        ({"f.npy": np.arange(4), "f.offsets.npy": np.array([0, 3])}, r"f\.offsets\.npy: expected offsets .*tokens, 4"),
        ({"f.npy": np.arange(4), "f.offsets.npy": np.array([0, 3, 2, 4])}, r"f\.offsets\.npy: expected offsets"),
        ({"f.npy": np.arange(4), "f.offsets.npy": np.array([1, 4])}, r"f\.offsets\.npy: expected offsets"),
        ({"f.npy": np.arange(4), "f.offsets.npy": np.array([0.0, 4.0])}, r"f\.offsets\.npy: holds float64"),
        ({"f.npy": np.arange(4), "f.trained.npy": np.ones(3, bool)}, r"f\.trained\.npy: holds 3 of bool"),
    ],
)
def test_what_a_file_should_not_hold_is_named(tmp_path, files, reason):
    for name, content in files.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            np.save(tmp_path / name, content, allow_pickle=True)
    with pytest.raises(DataError, match=reason):
        read_tokens([tmp_path / next(iter(files))], "uint16")


def test_an_unknown_type_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.token_dtype=uint8: expected one of uint16"):
        read_tokens([tmp_path / "f.bin"], "uint8")


def test_tokens_become_rows_and_those_beyond_the_vocabulary_are_named(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    ids = np.concatenate([tokenizer(text)["input_ids"] for text in ("one", "two!")])
    np.save(tmp_path / "f.npy", ids)
    np.save(tmp_path / "f.offsets.npy", [0, 3, 7])
    config = DataConfig(
        format=DataFormat.auto,
        path=str(tmp_path / "f.npy"),
        tokenizer=str(tmp_path / "tokenizer"),
        validation_fraction=0,
    )
    data = load_data(config, seq_len=8, seed=0)
    assert data.tokenizer.decode(data.train.ids(0)) == "onetwo!"
    config.path = str(tmp_path)
    config.format = DataFormat.tokens
    assert load_data(config, seq_len=8, seed=0).train.num_trained.tolist() == [5]
    with pytest.raises(DataError, match=r"f\.npy: document 1: token \d+ .* is outside the model's vocabulary of 50"):
        load_data(config, seq_len=8, seed=0, vocab_limit=50)
    config.tokenizer = "train"
    with pytest.raises(DataError, match=r"data\.format=tokens needs a tokenizer with the entries that its ids mean"):
        load_data(config, seq_len=8, seed=0)
