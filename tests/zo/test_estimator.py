"""From losses to updates: numbers that can be checked by hand, and which updates are kept for how long."""

import numpy as np
import pytest

import horizon
from horizon.layout import ParamSpec, place_block
from horizon.zo.estimator import History, StepRecord, are_finite, mean_loss, projected_gradients, update_of
from horizon.zo.noise import GROUP, noise_key
from horizon.zo.table import FIRST_UPDATE, TERM, UPDATE, Term, Update, Work, decay_masks, make_table, noise_at


def record(step, *gradients, lr=0.5):
    return StepRecord(step, 0, gradients, lr)


def test_projected_gradients_are_central_differences():
    assert projected_gradients([3.0, 1.0, 2.0, 2.5], 0.25) == (4.0, -1.0)
    assert mean_loss([3.0, 1.0, 2.0, 2.5]) == 2.125
    assert are_finite([1.0, -2.0])
    assert not are_finite([1.0, float("nan")]) and not are_finite([float("inf")])


def test_an_update_averages_the_queries_and_weighs_past_steps():
    settings = horizon.ZerothOrder(queries=2, momentum=0.5, momentum_steps=2, weight_decay=0.25)
    update = update_of(settings, [record(6, 8.0, 4.0, lr=9.0), record(7, 1.0, -2.0)])
    assert update == Update(
        7, 0.875, (Term(7, 0, -0.25), Term(7, 1, 0.5), Term(6, 0, -0.5 * 0.5 * 8 / 2), Term(6, 1, -0.5 * 0.5 * 4 / 2))
    )  # fmt: skip


def test_nothing_is_added_where_a_coefficient_is_zero_and_yet_weights_decay():
    settings = horizon.ZerothOrder(weight_decay=0.25)
    assert update_of(settings, [record(1, 0.0)]) == Update(1, 0.875, ())
    assert update_of(settings, [record(1, 3.0, lr=0.0)]) == Update(1, 1.0, ())


def test_a_history_gives_what_is_pending_and_forgets_what_all_have_seen():
    history = History(horizon.ZerothOrder(momentum=0.5, momentum_steps=2))
    for step in range(1, 6):
        history.append(record(step, 1.0))
    assert [update.step for update in history.since(2)] == [3, 4, 5]
    assert [[term.step for term in update.terms] for update in history.since(3)] == [[4, 3], [5, 4]]
    assert history.since(5) == []
    history.forget(3)
    assert [update.step for update in history.since(3)] == [4, 5]
    history.forget(1)
    with pytest.raises(RuntimeError, match="the updates since step 2 are forgotten"):
        history.since(2)
    history.append(record(6, 1.0))
    assert [[term.step for term in update.terms] for update in history.since(5)] == [[6, 5]]
    with pytest.raises(RuntimeError, match="step 9 cannot follow step 6"):
        history.append(record(9, 1.0))


def test_a_table_holds_keys_and_numbers_where_the_kernels_look():
    update = Update(4, 0.75, (Term(4, 0, 0.5), Term(3, 1, -2.0)))
    table = make_table(9, [Work(0, [], 5, 2), Work(1, [update], 5, 2)])
    assert table.shape[1] % 16 == 0
    for block, row in enumerate(table):
        assert row[0] == block  # the number of updates
        for query in range(2):
            assert tuple(row[noise_at(query) :][:2]) == noise_key(9, 5, query, block)
    words = table[1][FIRST_UPDATE:]
    assert words[0] == 2
    assert words[1:2].view(np.float32) == 0.75
    for number, term in enumerate(update.terms):
        first, second, coefficient = words[UPDATE + number * TERM :][:TERM]
        assert (first, second) == noise_key(9, term.step, term.query, 1)
        assert coefficient.view(np.float32) == term.coefficient


def test_masks_say_which_chunks_of_64_elements_decay():
    specs = [
        ParamSpec("a", "a", (10, 10)),
        ParamSpec("n", "n", (64,), decay=False),
        ParamSpec("c", "c", (50, 60)),
        ParamSpec("f", "f", (9,), trainable=False),
    ]
    layout = place_block(0, "b", specs)
    masks = decay_masks(layout)
    bits = [bool(masks[chunk // 32] >> (chunk % 32) & 1) for chunk in range(layout.num_elements // 64)]
    assert len(masks) == layout.num_elements // GROUP == 3
    assert bits == [True] * 2 + [False] + [True] * 47 + [False] * (96 - 50)
