import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from horizon.config.schema import TooLong
from horizon.data.encoding import Tokens
from horizon.data.pieces import LengthCounts, cut


def make_tokens(lengths, trained=None):
    ids = np.arange(sum(lengths), dtype=np.int32)
    trained = np.ones(len(ids), bool) if trained is None else trained
    return Tokens(ids, trained, np.array(lengths, np.int64), [""] * len(lengths))


def runs(pieces):
    return list(zip(pieces.starts.tolist(), pieces.lengths.tolist(), strict=True))


@pytest.mark.parametrize(
    ("too_long", "expected", "counts"),
    [
        ("split", [(0, 4), (4, 4), (8, 2), (10, 3), (13, 4)], LengthCounts(3, 17, split=1)),
        ("truncate", [(0, 4), (10, 3), (13, 4)], LengthCounts(3, 17, truncated=1, lost_tokens=6)),
        ("drop", [(10, 3), (13, 4)], LengthCounts(3, 17, dropped=1, lost_tokens=10)),
    ],
)
def test_what_is_too_long_is_split_truncated_or_dropped_and_counted(too_long, expected, counts):
    pieces = cut(make_tokens([10, 3, 4]), np.ones(3, bool), 4, TooLong(too_long))
    assert runs(pieces) == expected
    assert pieces.counts == counts
    assert pieces.trained.tolist() == [length - 1 for _, length in expected]


def test_pieces_without_a_trained_token_are_left_out_and_counted():
    trained = np.array([True, False, True, True, True, False, False])  # the first of a piece never is
    pieces = cut(make_tokens([2, 1, 4], trained), np.ones(3, bool), 3, TooLong.split)
    assert runs(pieces) == [(3, 3)] and pieces.trained.tolist() == [1]
    assert pieces.counts.untrained == 3
    assert str(pieces.counts) == "1 split, 3 pieces without a trained token left out"


def test_counts_say_what_was_lost():
    counts = LengthCounts(9, 99, dropped=2, lost_tokens=1234) + LengthCounts(1, 1, dropped=1)
    assert (counts.documents, counts.tokens) == (10, 100)
    assert str(counts) == "3 dropped as too long (1,234 tokens lost)"
    assert str(LengthCounts(3, 5)) == ""


@given(
    lengths=st.lists(st.integers(1, 15), min_size=1, max_size=8),
    seq_len=st.integers(2, 6),
    too_long=st.sampled_from(TooLong),
    data=st.data(),
)
def test_trained_tokens_are_counted_as_one_by_one(lengths, seq_len, too_long, data):
    trained = np.array(data.draw(st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths))))
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))))
    pieces = cut(make_tokens(lengths, trained), chosen, seq_len, too_long)
    inside = np.repeat(chosen, lengths)
    for (start, length), count in zip(runs(pieces), pieces.trained.tolist(), strict=True):
        assert 2 <= length <= seq_len and inside[start : start + length].all()
        assert count == trained[start + 1 : start + length].sum() > 0
    assert pieces.counts.documents == chosen.sum()
