"""Streamed training equals the resident model, for every family: loss, gradient norm, every gradient and every weight
by name, bit for bit over three steps."""

import pytest
import torch

from tests.parity.reference import (
    CROSSING,
    FAMILIES,
    MAX_GRAD_NORM,
    NO_POSITIONS,
    Resident,
    assert_close_tensors,
    assert_same_tensors,
    assert_trains_the_same,
    build,
    engine_for,
    is_tied,
    packed,
    padded,
    plain,
)

STEPS = range(3)
PACKABLE = [family for family in FAMILIES if family not in NO_POSITIONS]
SEPARABLE = [family for family in PACKABLE if family not in CROSSING]


def ragged(seed):
    """Two micro-batches of different shapes, padded."""
    return [padded(seed, [12, 7]), padded(seed + 10, [3, 6, 4], tokens=6)]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_micro_batch_and_two_ragged_ones(family, tied):
    model = build(family, tie_word_embeddings=tied)
    assert is_tied(model) == tied
    outcomes = assert_trains_the_same(model, [[plain(0)], ragged(1), [plain(2)]])
    assert all(outcome.grad_norm > MAX_GRAD_NORM for outcome in outcomes)  # clipping took part


@pytest.mark.parametrize("family", SEPARABLE)
def test_packed_rows(family):
    assert_trains_the_same(build(family), [[packed(seed, [[5, 3, 4], [2, 9, 1]])] for seed in STEPS])


@pytest.mark.parametrize("family", CROSSING)
def test_packed_rows_differ_where_transformers_lets_documents_see_each_other(family):
    model, batch = build(family), packed(0, [[5, 3, 4], [2, 9, 1]])
    expected = Resident(model).backward([batch])
    with engine_for(model) as engine:
        assert abs(engine.forward_backward(batch) - expected) > 1e-3  # right is what documents give alone: below


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_a_tied_embedding_differs_from_plain_summation_by_rounding_only(family):
    """Streaming adds up the head's share of all micro-batches before it sees the first embedding gradient."""
    model, batches = build(family, tie_word_embeddings=True), ragged(0)
    resident = Resident(model, head_first=False)
    loss, expected = resident.backward(batches), resident.gradients()
    with engine_for(model) as engine:
        assert engine.forward_backward(batches) == loss
        found = dict(engine.named_gradients())
    tied = next(name for name, p in resident.named.items() if p is model_embedding(resident.model))
    assert_close_tensors({tied: found.pop(tied)}, {tied: expected.pop(tied)}, 2 * torch.finfo(torch.float32).eps)
    assert_same_tensors(found, expected)


def model_embedding(model):
    return model.get_input_embeddings().weight


@pytest.mark.parametrize("family", PACKABLE)
def test_packed_documents_give_what_they_give_alone(family):
    documents = [[5, 3, 4], [2, 9, 1]]
    together = packed(0, documents)
    alone = [
        {key: together[key][row : row + 1, start : start + length] for key in ("input_ids", "labels")}
        for row, lengths in enumerate(documents)
        for start, length in zip([0, lengths[0], lengths[0] + lengths[1]], lengths, strict=True)
    ]
    with engine_for(build(family)) as engine:
        found, gradients = engine.forward_backward(together), dict(engine.named_gradients())
        engine.optimizer_step()
    with engine_for(build(family)) as engine:
        expected = engine.forward_backward(alone)
        assert found == pytest.approx(expected, rel=1e-6)
        gradients_alone = dict(engine.named_gradients())
        if family == "opt":  # a bias of keys moves all of a query's scores alike: its gradient is rounding and no more
            for name in [n for n in gradients if n.endswith("k_proj.bias")]:
                assert max(float(g.pop(name).abs().max()) for g in (gradients, gradients_alone)) < 1e-8
        assert_close_tensors(gradients, gradients_alone, 2e-6)
        engine.optimizer_step()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2", "deepseek_v3", "gpt_oss"])
def test_packed_documents_give_what_they_give_in_padded_rows(family):
    together, rows = packed(0, [[5, 3, 4]]), padded(1, [5, 3, 4], tokens=5)
    for row, (start, length) in enumerate([(0, 5), (5, 3), (8, 4)]):
        for key in ("input_ids", "labels"):
            rows[key][row, :length] = together[key][0, start : start + length]
    results = []
    for batch in (together, rows):
        with engine_for(build(family)) as engine:
            results.append((engine.forward_backward(batch), dict(engine.named_gradients())))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert_close_tensors(results[0][1], results[1][1], 2e-6)
