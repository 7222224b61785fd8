"""Sums over tokens, of any part of the rows."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from horizon.eval.metrics import Tally, by_source, tally_rows, total
from horizon.stream.head import TokenScores

TALLIES = st.builds(Tally, st.integers(1, 50), st.floats(-100, 0), st.integers(0, 50))


def test_rows_are_tallied_in_the_order_of_the_batches():
    trained = torch.tensor([[False, True, True], [False, False, True]])
    scores = TokenScores(
        torch.tensor([[0.0, -1.0, -2.0], [0.0, 0.0, -4.0]]),
        trained & torch.tensor([[1, 1, 0], [1, 1, 1]]).bool(),
        trained,
    )
    last = TokenScores(torch.tensor([[0.0, -0.5]]), torch.tensor([[False, False]]), torch.tensor([[False, True]]))
    assert tally_rows([scores, last]) == [Tally(2, -3.0, 1), Tally(1, -4.0, 1), Tally(1, -0.5, 0)]


def test_loss_perplexity_and_accuracy():
    tally = total([Tally(2, -3.0, 1), Tally(1, -4.0, 1), Tally(1, -0.5, 0)])
    assert tally == Tally(4, -7.5, 2)
    assert (tally.loss, tally.perplexity, tally.accuracy) == (1.875, math.exp(1.875), 0.5)
    assert math.isnan(Tally().loss) and math.isnan(Tally().accuracy)
    assert Tally(1, -1e6, 0).perplexity == math.inf


@given(st.lists(st.tuples(TALLIES, st.sampled_from("abc")), min_size=1))
def test_sources_divide_the_whole(rows):
    tallies, sources = zip(*rows, strict=True)
    parts = by_source(tallies, sources)
    assert list(parts) == list(dict.fromkeys(sources))
    whole = total(tallies)
    assert sum(part.num_tokens for part in parts.values()) == whole.num_tokens
    assert sum(part.num_correct for part in parts.values()) == whole.num_correct
    assert sum(part.log_likelihood for part in parts.values()) == pytest.approx(whole.log_likelihood)


def test_a_row_without_a_source_is_a_mistake():
    with pytest.raises(ValueError, match="zip"):
        by_source([Tally(), Tally()], ["a"])
