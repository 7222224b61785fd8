import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from horizon.data.packing import balanced, best_fit


def plain_best_fit(lengths, seq_len):
    """The same by looking at every row."""
    rooms, rows = [], []
    for piece in sorted(range(len(lengths)), key=lambda piece: -lengths[piece]):
        fitting = [row for row, room in enumerate(rooms) if room >= lengths[piece]]
        if not fitting:
            rooms.append(seq_len)
            rows.append([])
            fitting = [len(rooms) - 1]
        best = min(fitting, key=lambda row: rooms[row])
        rooms[best] -= lengths[piece]
        rows[best].append(piece)
    return [sorted(rooms), len(rows)]


@given(seq_len=st.integers(1, 40), data=st.data())
def test_every_piece_has_a_row_and_no_row_more_than_it_holds(seq_len, data):
    lengths = np.array(data.draw(st.lists(st.integers(1, seq_len), max_size=60)), np.int64)
    rows = best_fit(lengths, seq_len)
    assert sorted(piece for row in rows for piece in row) == list(range(len(lengths)))
    rooms = [seq_len - int(lengths[row].sum()) for row in rows]
    assert all(room >= 0 for room in rooms)
    assert [sorted(rooms), len(rows)] == plain_best_fit(lengths.tolist(), seq_len)
    assert rows == sorted(rows) and all(row == sorted(row) for row in rows)


def test_the_row_with_the_least_room_is_taken():
    # 7 and 6 begin rows with room for 3 and 4; 3 goes where it fits exactly, 2 into what is left of the other
    assert best_fit(np.array([2, 7, 6, 3]), 10) == [[0, 2], [1, 3]]


@given(
    work=st.lists(st.integers(0, 1000), min_size=1, max_size=30),
    size=st.integers(1, 8),
)
def test_groups_have_their_sizes_and_every_row_once(work, size):
    groups = balanced(work, size)
    assert [len(group) for group in groups] == [len(work[n : n + size]) for n in range(0, len(work), size)]
    assert sorted(row for group in groups for row in group) == list(range(len(work)))
    assert groups == balanced(work, size)


def test_arithmetic_is_divided_evenly_not_rows_in_order():
    work = [100, 90, 80, 10, 20, 30, 40, 50]  # in order: 280 and 140
    groups = balanced(work, 4)
    assert [sum(work[row] for row in group) for group in groups] == [210, 210]


@pytest.mark.parametrize("work", [[7] * 8, [0] * 8])
def test_rows_of_equal_work_stay_in_order(work):
    assert balanced(work, 3) == [[0, 1, 2], [3, 4, 5], [6, 7]]
