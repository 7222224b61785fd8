import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from horizon.config.schema import TooLong
from horizon.data.encoding import Tokens
from horizon.data.pieces import cut
from horizon.data.rows import IGNORED, Source, join, pack, pad

PAD = 999


def make_tokens(lengths, untrained=()):
    """Tokens 1, 2, 3, ... so that a token says where it came from."""
    ids = np.arange(1, sum(lengths) + 1, dtype=np.int32)
    return Tokens(ids, ~np.isin(ids, list(untrained)), np.array(lengths, np.int64), [f"f:{n}" for n in lengths])


def make_rows(lay, tokens, seq_len, name="", weight=None):
    pieces = cut(tokens, np.ones(len(tokens.lengths), bool), seq_len, TooLong.split)
    return lay(Source(name, tokens, weight), pieces, seq_len, PAD)


def everything(rows):
    return {name: tensor.numpy() for name, tensor in rows.batch(np.arange(len(rows))).items()}


@st.composite
def cases(draw):
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=12))
    untrained = draw(st.sets(st.integers(1, sum(lengths))))
    return make_tokens(lengths, untrained), lengths, untrained, draw(st.integers(2, 9))


def expected_pieces(lengths, untrained, seq_len):
    """The pieces that something is trained in, each as its tokens, one token at a time."""
    pieces, token = [], 0
    for length in lengths:
        document = list(range(token + 1, token + length + 1))
        token += length
        pieces += [document[start : start + seq_len] for start in range(0, length, seq_len)]
    return [piece for piece in pieces if set(piece[1:]) - untrained]


def test_a_row_reads_as_the_picture_in_the_module():
    rows = make_rows(pack, make_tokens([5, 3, 4, 2], untrained={2}), seq_len=8)
    batch = everything(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14, PAD, PAD]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1, 0, 1]]
    assert batch["labels"].tolist() == [
        [-100, -100, 3, 4, 5, -100, 7, 8],
        [-100, 10, 11, 12, -100, 14, -100, -100],
    ]
    assert rows.num_tokens.tolist() == [8, 6]
    assert rows.num_trained.tolist() == [5, 4]
    assert rows.attention_work.tolist() == [5**2 + 3**2, 4**2 + 2**2 + 2**2]  # padding is computed, too
    assert make_rows(pad, make_tokens([5, 3]), seq_len=8).attention_work.tolist() == [64, 64]
    assert rows.ids(1) == [9, 10, 11, 12, 13, 14]


@given(cases())
def test_packed_rows_hold_every_piece_once_whole_and_apart(case):
    tokens, lengths, untrained, seq_len = case
    expected = expected_pieces(lengths, untrained, seq_len)
    rows = make_rows(pack, tokens, seq_len)
    found, padding = [], 0
    batch = everything(rows) if len(rows) else {"input_ids": [], "position_ids": []}
    for ids, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
        starts = np.flatnonzero(positions == 0)
        parts = [part.tolist() for part in np.split(ids, starts)[1:]]
        assert all((np.diff(part) == 1).all() for part in np.split(positions, starts)[1:])
        found += [part for part in parts if PAD not in part]
        padding += sum(set(part) == {PAD} for part in parts)
        assert all(PAD not in part or set(part) == {PAD} for part in parts)
    assert sorted(found) == sorted(expected)
    assert padding == sum(rows.num_tokens < seq_len)


@given(cases())
def test_packed_labels_are_the_trained_tokens_but_each_pieces_first(case):
    tokens, _, untrained, seq_len = case
    rows = make_rows(pack, tokens, seq_len)
    if len(rows):
        batch = everything(rows)
        ignored = (batch["position_ids"] == 0) | np.isin(batch["input_ids"], [*untrained, PAD])
        assert (batch["labels"] == np.where(ignored, IGNORED, batch["input_ids"])).all()
        assert (rows.num_trained == (~ignored).sum(axis=1)).all() and rows.num_trained.all()


@given(cases())
def test_unpacked_rows_are_the_pieces_in_order(case):
    tokens, lengths, untrained, seq_len = case
    rows, expected = make_rows(pad, tokens, seq_len), expected_pieces(lengths, untrained, seq_len)
    assert len(rows) == len(expected)
    for row, kept in enumerate(expected):
        batch = rows.batch([row])
        filler = seq_len - len(kept)
        labels = [IGNORED if token in untrained or token == kept[0] else token for token in kept]
        assert batch["input_ids"].tolist() == [kept + [PAD] * filler]
        assert batch["labels"].tolist() == [labels + [IGNORED] * filler]
        assert rows.num_tokens[row] == len(kept)


def test_a_packed_batch_has_positions_and_no_mask():
    rows = make_rows(pack, make_tokens([5, 2, 3]), seq_len=4)
    batch = rows.batch([1, 0])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[6, 7, PAD, PAD], [1, 2, 3, 4]],
        "labels": [[-100, 7, -100, -100], [-100, 2, 3, 4]],
        "position_ids": [[0, 1, 0, 1], [0, 1, 2, 3]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert len(rows) == 3  # token 5, split off, has nothing before it and is left out


def test_an_unpacked_batch_has_a_mask_only_where_it_masks_something():
    rows = make_rows(pad, make_tokens([4, 2]), seq_len=4)
    assert set(rows.batch([0])) == {"input_ids", "labels"}
    mask = rows.batch([0, 1])["attention_mask"]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]] and mask.dtype is torch.int64


def test_selecting_rows_keeps_their_parts_together():
    rows = make_rows(pack, make_tokens([4, 2, 2, 3]), seq_len=4).select(np.array([False, True, True]))
    batch = everything(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 10, 11, PAD]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1], [0, 1, 2, 0]]
    assert rows.num_tokens.tolist() == [4, 3] and rows.num_trained.tolist() == [2, 2]


def test_rows_of_several_sources_are_told_apart():
    first, second = make_tokens([4, 2]), make_tokens([3, 3])
    joined = join([make_rows(pack, first, 4, "a"), make_rows(pack, second, 4, "b")])
    assert joined.source.tolist() == [0, 0, 1, 1] and [source.name for source in joined.sources] == ["a", "b"]
    assert everything(joined)["input_ids"].tolist() == [
        [1, 2, 3, 4], [5, 6, PAD, PAD], [1, 2, 3, PAD], [4, 5, 6, PAD]
    ]  # fmt: skip
    alone = everything(joined.select(joined.source == 1))
    assert alone["input_ids"].tolist() == [[1, 2, 3, PAD], [4, 5, 6, PAD]]


def test_the_fingerprint_follows_tokens_labels_rows_and_weights():
    base = make_rows(pack, make_tokens([4, 2, 3]), 4)
    others = [
        make_rows(pack, make_tokens([4, 2, 3]), 5),
        make_rows(pack, make_tokens([4, 3, 2]), 4),
        make_rows(pack, make_tokens([4, 2, 3], untrained={2}), 4),
        make_rows(pack, make_tokens([4, 2, 3]), 4, weight=2.0),
        make_rows(pad, make_tokens([4, 2, 3]), 4),
        base.select(np.array([True, True, False])),
    ]
    assert make_rows(pack, make_tokens([4, 2, 3]), 4).fingerprint() == base.fingerprint()
    assert len({base.fingerprint(), *(rows.fingerprint() for rows in others)}) == 7


def test_rows_are_taken_in_any_order_and_spread_by_source():
    rows = make_rows(pack, make_tokens([4, 2, 2, 3]), 4)
    assert [rows.take(np.array([2, 0])).ids(row) for row in (0, 1)] == [[9, 10, 11], [1, 2, 3, 4]]
    joined = join([make_rows(pack, make_tokens([4] * size), 4, str(size)) for size in (2, 6)])
    assert joined.spread().source.tolist() == [1, 0, 1, 1, 1, 0, 1, 1]
    assert sorted(tuple(joined.spread().ids(row)) for row in range(8)) == sorted(tuple(joined.ids(r)) for r in range(8))
