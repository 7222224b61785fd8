import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from horizon.models.documents import find_documents

CPU = torch.device("cpu")
IDS = torch.zeros(2, 6, dtype=torch.long)
NOBODY = torch.zeros(2, 6, dtype=torch.bool)


def documents(observed=None, **inputs):
    return find_documents(
        {"input_ids": IDS, **{name: torch.tensor(rows) for name, rows in inputs.items()}}, CPU, observed
    )


def test_a_row_is_a_document_unless_something_divides_it():
    for found in (
        documents(),
        documents(position_ids=[[0, 1, 2, 3, 4, 5], [7, 8, 9, 10, 11, 12]]),
        documents(attention_mask=[[1] * 6] * 2),
        documents(attention_mask=[[1] * 6] * 2, position_ids=[list(range(6))] * 2),
    ):
        assert (found.longest, found.ends, found.packed, found.padded, found.divisible) == (6, None, False, False, True)


def test_documents_begin_where_position_ids_do_not_go_on():
    found = documents(position_ids=[[0, 1, 2, 0, 1, 0], [3, 4, 6, 7, 8, 8]])
    assert found.ends.tolist() == [0, 3, 5, 6, 8, 11, 12]
    assert found.ends.dtype == torch.int32
    assert (found.longest, found.packed, found.padded, found.divisible) == (3, True, False, True)


def test_what_is_masked_before_a_rows_tokens_is_a_document_and_what_is_masked_after_them_is_not():
    left = documents(NOBODY, attention_mask=[[0, 0, 1, 1, 1, 1], [1] * 6])
    assert (left.ends.tolist(), left.longest, left.padded, left.packed) == ([0, 2, 6, 12], 6, True, False)
    right = documents(NOBODY, attention_mask=[[1, 1, 1, 1, 0, 0], [1] * 6])
    assert (right.ends, right.longest, right.padded, right.divisible) == (None, 6, True, True)
    both = documents(NOBODY, attention_mask=[[0, 1, 1, 1, 0, 0], [0] * 6])
    assert (both.ends.tolist(), both.divisible) == ([0, 1, 6, 12], True)


def test_only_a_mask_says_who_sees_whom_around_a_hole():
    found = documents(NOBODY, attention_mask=[[1, 1, 0, 1, 1, 1], [1] * 6])
    assert (found.divisible, found.padded, found.ends) == (False, True, None)


@pytest.mark.parametrize("position", [0, 1])
def test_masked_tokens_that_are_observed_compute_what_the_mask_says(position):
    observed = NOBODY.clone()
    observed[0, position] = True
    mask = [[0, 1, 1, 1, 1, 1], [1] * 6]
    assert documents(observed, attention_mask=mask).divisible is (position == 1)
    assert documents(None, attention_mask=mask).divisible is False  # anybody may look


def test_position_ids_divide_nothing_where_tokens_are_masked():
    found = documents(NOBODY, attention_mask=[[1] * 5 + [0]] * 2, position_ids=[[0, 1, 2, 0, 1, 2]] * 2)
    assert (found.packed, found.padded, found.ends) == (False, True, None)


@st.composite
def rows_of_documents(draw):
    """Position ids [rows, tokens], and the lengths of the documents."""
    tokens = draw(st.integers(1, 12))
    lengths = []
    for _ in range(draw(st.integers(1, 4))):
        left = tokens
        while left:
            lengths.append(draw(st.integers(1, left)))
            left -= lengths[-1]
    return torch.cat([torch.arange(n) for n in lengths]).view(-1, tokens), lengths


@given(rows_of_documents())
def test_ends_are_the_documents_lengths_summed_up(packed):
    positions, lengths = packed
    found = find_documents({"input_ids": positions, "position_ids": positions}, CPU)
    assert found.longest == max(lengths)
    if len(lengths) == len(positions):
        assert found.ends is None
    else:
        assert found.ends.diff().tolist() == lengths and found.ends[0] == 0


@given(rows_of_documents(), st.data())
def test_documents_of_padded_rows_let_real_tokens_see_real_ones_only(packed, data):
    positions, _ = packed
    rows, tokens = positions.shape
    mask = torch.stack([_a_run(data, tokens) for _ in range(rows)])
    found = find_documents({"input_ids": positions, "attention_mask": mask}, CPU, torch.zeros_like(mask))
    ends = torch.arange(0, rows * tokens + 1, tokens) if found.ends is None else found.ends
    document = torch.repeat_interleave(torch.arange(len(ends) - 1), ends.diff()).view(rows, tokens)
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    sees = causal & (document[:, :, None] == document[:, None, :])
    wanted = causal & mask[:, None, :]
    assert torch.equal(sees[mask], wanted[mask])


def _a_run(data, tokens):
    first = data.draw(st.integers(0, tokens))
    last = data.draw(st.integers(first, tokens))
    steps = torch.arange(tokens)
    return (steps >= first) & (steps < last)
