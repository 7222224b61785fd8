from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from horizon.config.schema import TooLong
from horizon.data.encoding import Tokens
from horizon.data.loader import Loader
from horizon.data.pieces import cut
from horizon.data.rows import Source, join, pack, pad
from horizon.errors import ConfigError


def make_rows(num_rows, last=4, weight=None, lay=pack):
    """Rows of 4 tokens; row n begins with token 4 n. The last row has `last` real tokens."""
    num_tokens = 4 * (num_rows - 1) + last
    tokens = Tokens(np.arange(num_tokens, dtype=np.int32), np.ones(num_tokens, bool), np.array([num_tokens]), [""])
    pieces = cut(tokens, np.ones(1, bool), 4, TooLong.split)
    return lay(Source("", tokens, weight), pieces, seq_len=4, pad_id=0)


def rows_of(lengths, lay=pack):
    """Rows of 8 tokens, each with a document of such a length, of more than half a row."""
    tokens = Tokens(np.arange(sum(lengths)), np.ones(sum(lengths), bool), np.array(lengths), [""] * len(lengths))
    return lay(Source("", tokens), cut(tokens, np.ones(len(lengths), bool), 8, TooLong.split), 8, pad_id=0)


def ids(step):
    return [micro_batch["input_ids"].tolist() for micro_batch in step]


def row_numbers(step):
    return sorted(int(first) // 4 for micro_batch in step for first in micro_batch["input_ids"][:, 0])


@given(num_rows=st.integers(1, 13), batch_size=st.integers(1, 9), seed=st.integers(0, 3))
def test_every_epoch_takes_every_row_once_and_steps_wrap(num_rows, batch_size, seed):
    loader = Loader(make_rows(num_rows), batch_size, 2, seed)
    taken = [int(row) for _ in range(num_rows * 2) for row in loader.take(batch_size)]
    assert len(taken) == 2 * num_rows * batch_size
    epochs = [taken[start : start + num_rows] for start in range(0, len(taken), num_rows)]
    assert all(sorted(epoch) == list(range(num_rows)) for epoch in epochs)
    assert (loader.epoch, loader.position) == (2 * batch_size, 0)


@given(num_rows=st.integers(1, 13), batch_size=st.integers(1, 9), before=st.integers(0, 6))
def test_a_loader_made_with_anothers_state_goes_on_where_that_one_is(num_rows, batch_size, before):
    rows = rows_of([n % 4 + 5 for n in range(num_rows)])
    loader = Loader(rows, batch_size, 3, seed=5)
    for _ in range(before):
        loader.next_step()
    resumed = Loader(rows, batch_size, 3, seed=5, epoch=loader.epoch, position=loader.position)
    for _ in range(3):
        assert ids(resumed.next_step()) == ids(loader.next_step())  # divided alike, too


def test_the_order_depends_on_seed_and_epoch_only():
    def order(seed, epoch):
        return Loader(make_rows(50), 50, 50, seed, epoch=epoch).take(50).tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)


def test_without_shuffle_rows_come_in_order():
    loader = Loader(make_rows(5), 3, 3, seed=0, shuffle=False)
    assert [loader.take(3).tolist() for _ in range(3)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]


def test_a_step_is_cut_into_micro_batches():
    step = Loader(make_rows(20), 8, 3, seed=0).next_step()
    assert [len(micro_batch["input_ids"]) for micro_batch in step] == [3, 3, 2]
    assert max(Counter(row_numbers(step)).values()) == 1


def test_padding_is_not_counted():
    loader = Loader(make_rows(3, last=2), 2, 2, seed=0, shuffle=False)
    counts = []
    for _ in range(3):
        loader.next_step()
        counts.append(loader.step_tokens)
    assert counts == [8, 6, 6]  # rows (0, 1), (2, 0), (1, 2)


@pytest.mark.parametrize(("batch_size", "micro_batch", "key"), [(0, 1, "batch_size=0"), (4, 0, "micro_batch=0")])
def test_sizes_that_are_not_positive_are_named(batch_size, micro_batch, key):
    with pytest.raises(ConfigError, match=f"train.{key} must be at least 1"):
        Loader(make_rows(3), batch_size, micro_batch, seed=0)


def test_a_step_is_divided_by_arithmetic_and_keeps_its_rows():
    loader = Loader(rows_of([8, 7, 5, 6]), 4, 2, seed=0, shuffle=False)
    step = loader.next_step()
    assert [(micro_batch["labels"] > 0).sum(1).tolist() for micro_batch in step] == [[7, 4], [6, 5]]
    assert [micro_batch["input_ids"].shape for micro_batch in step] == [(2, 8), (2, 8)]
    assert loader.step_tokens == 26


def test_padded_rows_cost_the_same_and_stay_in_order():
    step = Loader(rows_of([8, 7, 5, 6], pad), 4, 2, seed=0, shuffle=False).next_step()
    assert [micro_batch["attention_mask"].sum(1).tolist() for micro_batch in step] == [[8, 7], [5, 6]]


def mixture(sizes, weights):
    return join([make_rows(size, weight=weight) for size, weight in zip(sizes, weights, strict=True)])


@given(shuffle=st.booleans(), batch_size=st.integers(1, 7), before=st.integers(0, 9))
def test_weights_are_shares_of_the_tokens_and_each_source_is_used_up_evenly(shuffle, batch_size, before):
    rows = mixture([10, 30], [3, 1])
    loader = Loader(rows, batch_size, 3, seed=1, shuffle=shuffle)
    taken = loader.take(3 * 40).tolist()
    for start in (0, 40, 80):
        epoch = taken[start : start + 40]
        assert sum(row < 10 for row in epoch) == 30
        assert all(epoch.count(row) == 3 for row in range(10))
    large = [row for row in taken if row >= 10]
    assert sorted(large) == list(range(10, 40))  # a third of it an epoch, and none of it twice
    again = Loader(rows, batch_size, 3, seed=1, shuffle=shuffle)
    for _ in range(before):
        again.take(batch_size)
    resumed = Loader(rows, batch_size, 3, seed=1, shuffle=shuffle, epoch=again.epoch, position=again.position)
    assert resumed.take(50).tolist() == again.take(50).tolist()


def test_without_shuffle_sources_alternate_by_their_shares():
    loader = Loader(mixture([4, 4], [3, 1]), 8, 8, seed=0, shuffle=False)
    assert [int(row >= 4) for row in loader.take(8)] == [0, 0, 1, 0, 0, 0, 1, 0]


def test_without_weights_every_row_of_every_source_comes_once():
    taken = Loader(mixture([3, 9], [None, None]), 12, 12, seed=0).take(12)
    assert sorted(taken.tolist()) == list(range(12))
