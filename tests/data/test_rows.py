import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from horizon.data.encoding import Tokens
from horizon.data.rows import IGNORED, pack, pad

PAD = 999


def make_tokens(lengths, untrained=()):
    """Tokens 1, 2, 3, ... so that a token says where it came from."""
    ids = np.arange(1, sum(lengths) + 1, dtype=np.int32)
    return Tokens(ids, ~np.isin(ids, list(untrained)), np.array(lengths, np.int64))


@st.composite
def cases(draw):
    lengths = draw(st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(any))
    untrained = draw(st.sets(st.integers(1, sum(lengths))))
    return make_tokens(lengths, untrained), lengths, untrained, draw(st.integers(2, 9))


def plain_pack(lengths, seq_len):
    """(ids, position ids, first token of a document?) for each place of the packed rows, one token at a time."""
    places, token = [], 0
    for length in lengths:
        position = 0
        for _ in range(length):
            token += 1
            position = 0 if len(places) % seq_len == 0 else position
            places.append((token, position))
            position += 1
    position = 0
    while len(places) % seq_len:
        places.append((PAD, position))
        position += 1
    return places


def test_a_row_reads_as_the_picture_in_the_module():
    rows = pack(make_tokens([5, 5, 4], untrained={2}), seq_len=8, pad_id=PAD)
    assert rows.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14, PAD, PAD]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 0, 1, 2, 3, 0, 1]]
    assert rows.labels.tolist() == [[-100, -100, 3, 4, 5, -100, 7, 8], [-100, 10, -100, 12, 13, 14, -100, -100]]
    assert rows.num_tokens.tolist() == [8, 6]
    assert rows.num_trained.tolist() == [5, 4]
    assert {array.dtype for array in (rows.input_ids, rows.labels, rows.position_ids)} == {np.dtype(np.int32)}


@given(cases())
def test_packing_keeps_every_token_once_and_in_order(case):
    tokens, lengths, _, seq_len = case
    rows = pack(tokens, seq_len, PAD)
    real = np.concatenate([row[:count] for row, count in zip(rows.input_ids, rows.num_tokens, strict=True)])
    assert real.tolist() == list(range(1, sum(lengths) + 1))
    assert (rows.num_tokens[:-1] == seq_len).all() and 0 < rows.num_tokens[-1] <= seq_len


@given(cases())
def test_packed_positions_restart_exactly_at_documents_rows_and_padding(case):
    tokens, lengths, _, seq_len = case
    rows = pack(tokens, seq_len, PAD)
    found = list(zip(rows.input_ids.ravel().tolist(), rows.position_ids.ravel().tolist(), strict=True))
    assert found == plain_pack(lengths, seq_len)


@given(cases())
def test_packed_labels_are_the_trained_tokens_but_each_documents_first(case):
    tokens, _, untrained, seq_len = case
    rows = pack(tokens, seq_len, PAD)
    ignored = (rows.position_ids == 0) | np.isin(rows.input_ids, [*untrained, PAD])
    assert (rows.labels == np.where(ignored, IGNORED, rows.input_ids)).all()
    assert (rows.num_trained == (~ignored).sum(axis=1)).all()


@given(cases())
def test_unpacked_rows_are_the_beginnings_of_the_documents(case):
    tokens, lengths, untrained, seq_len = case
    rows = pad(tokens, seq_len, PAD)
    assert len(rows) == len(lengths)
    for row, (start, length) in enumerate(zip(tokens.starts.tolist(), lengths, strict=True)):
        kept = list(range(start + 1, start + 1 + min(length, seq_len)))
        filler = seq_len - len(kept)
        labels = [IGNORED if token in untrained or token == start + 1 else token for token in kept]
        assert rows.input_ids[row].tolist() == kept + [PAD] * filler
        assert rows.labels[row].tolist() == labels + [IGNORED] * filler
        assert rows.num_tokens[row] == len(kept)


def test_a_packed_batch_has_positions_and_no_mask():
    rows = pack(make_tokens([5, 2]), seq_len=4, pad_id=PAD)
    batch = rows.batch([1, 0])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7, PAD], [1, 2, 3, 4]],
        "labels": [[-100, -100, 7, -100], [-100, 2, 3, 4]],
        "position_ids": [[0, 0, 1, 0], [0, 1, 2, 3]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_an_unpacked_batch_has_a_mask_only_where_it_masks_something():
    rows = pad(make_tokens([4, 2]), seq_len=4, pad_id=PAD)
    assert set(rows.batch([0])) == {"input_ids", "labels"}
    mask = rows.batch([0, 1])["attention_mask"]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]] and mask.dtype is torch.int64


def test_selecting_rows_keeps_their_parts_together():
    rows = pack(make_tokens([4, 4, 3]), seq_len=4, pad_id=PAD).select(np.array([False, True, True]))
    assert rows.input_ids.tolist() == [[5, 6, 7, 8], [9, 10, 11, PAD]]
    assert rows.labels.tolist() == [[-100, 6, 7, 8], [-100, 10, 11, -100]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0]]
    assert rows.num_tokens.tolist() == [4, 3]
