"""What a batch may look like: padding on either side, labels that train few tokens, custom losses, evaluation."""

import copy

import pytest
import torch
from torch.nn import functional as F

from horizon import runtime
from tests.parity.reference import (
    VOCAB,
    Resident,
    assert_close_tensors,
    assert_same_tensors,
    assert_trains_the_same,
    build,
    engine_for,
    num_trained,
    packed,
    padded,
    plain,
    prompted,
)

PADDED = ["llama", "mistral", "gemma3_text", "gpt2", "opt", "bloom", "mixtral"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", PADDED)
def test_padding(family, side):
    assert_trains_the_same(build(family), [[padded(seed, [12, 5, 1], side)] for seed in range(3)])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_micro_batches_count_by_their_trained_tokens(tied):
    batches = [prompted(0, trained=11), prompted(1, trained=1), plain(2, rows=1)]
    assert [num_trained([batch]) for batch in batches] == [22, 2, 11]
    assert_trains_the_same(build("llama", tie_word_embeddings=tied), [batches, batches[:2], batches[1:]])


def test_a_micro_batch_without_a_trained_token_changes_nothing():
    silent = {**plain(1), "labels": torch.full((2, 12), -100)}
    outcomes = assert_trains_the_same(build("qwen2"), [[plain(0), silent]])
    with engine_for(build("qwen2")) as engine:
        engine.step(plain(0))
        assert_same_tensors(dict(engine.named_gradients()), outcomes[0].gradients)


def test_the_order_of_micro_batches_matters_by_rounding_only():
    batches = [plain(0), prompted(1, trained=3), padded(2, [4, 9])]
    gradients = []
    for order in (batches, batches[::-1]):
        with engine_for(build("llama")) as engine:
            engine.forward_backward(order)
            gradients.append(dict(engine.named_gradients()))
    assert_close_tensors(gradients[0], gradients[1], 1e-6)


def test_a_mask_of_ones_is_no_mask():
    masked = {**plain(0), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    outcomes = assert_trains_the_same(build("llama"), [[masked]])
    assert_same_tensors(outcomes[0].gradients, assert_trains_the_same(build("llama"), [[plain(0)]])[0].gradients)


# ---- the head's chunks


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_head_in_chunks_gives_the_same_gradients(monkeypatch, tied):
    batch = plain(0, rows=5, tokens=40)  # 200 tokens: chunks of 64, 64, 64 and 8
    batch["labels"][2:4] = -100  # the chunk of tokens 64 .. 127 has few, that of 128 .. 191 only its end
    batch["labels"][1, 24:] = -100
    model = build("gemma2", tie_word_embeddings=tied)
    resident = Resident(model)
    loss = resident.backward([batch])
    monkeypatch.setattr(runtime, "HEAD_CHUNK_BYTES", 1)
    with engine_for(model) as engine:
        assert engine._runtime.executor._head_loss.chunk == 64
        assert engine.forward_backward(batch) == pytest.approx(loss, rel=1e-6)
        assert_close_tensors(dict(engine.named_gradients()), resident.gradients(), 1e-6)
        assert engine.evaluate(batch) == pytest.approx(loss, rel=1e-6)


# ---- evaluation


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "mixtral", "granite"])
def test_evaluation_equals_the_model_in_evaluation_mode(family):
    dropout = {"gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3}, "opt": {"dropout": 0.3}}
    model = build(family, **dropout.get(family, {}))
    batches = [padded(0, [12, 5]), prompted(1, trained=2)]
    reference, total = copy.deepcopy(model).eval(), torch.tensor(num_trained(batches))
    with torch.no_grad():
        expected = sum(float(reference(**b, num_items_in_batch=total, use_cache=False).loss) for b in batches)
        logits = reference(input_ids=batches[1]["input_ids"], use_cache=False).logits[:, -1]
    with engine_for(model) as engine:
        assert engine.evaluate(batches) == pytest.approx(expected, rel=1e-6)
        found = engine.next_token_logits({"input_ids": batches[1]["input_ids"]})
    assert found.shape == (2, VOCAB)
    assert_close_tensors({"logits": found}, {"logits": logits}, 1e-6)


def test_evaluation_between_a_backward_and_its_update_disturbs_neither():
    model, batch = build("llama"), plain(0)
    outcome = assert_trains_the_same(model, [[batch]])[0]
    with engine_for(model) as engine:
        engine.forward_backward(batch)
        engine.evaluate(plain(1))
        engine.next_token_logits({"input_ids": plain(2)["input_ids"]})
        engine.optimizer_step()
        assert_same_tensors(dict(engine.named_gradients()), outcome.gradients)
        assert_same_tensors(dict(engine.named_master_parameters()), outcome.weights)


# ---- custom losses


def mean_cross_entropy(logits, batch):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_custom_loss_that_computes_the_built_in_one_gives_the_same(tied):
    batches = [prompted(0, trained=9), prompted(1, trained=2), padded(2, [12, 6])]
    results = []
    for loss_fn in (None, mean_cross_entropy):
        with engine_for(build("llama", tie_word_embeddings=tied)) as engine:
            loss = engine.forward_backward(batches, loss_fn=loss_fn)
            gradients = dict(engine.named_gradients())
            results.append((loss, engine.evaluate(batches, loss_fn=loss_fn), gradients))
    assert results[1][:2] == pytest.approx(results[0][:2], rel=1e-6)
    assert results[0][0] == pytest.approx(results[0][1], rel=1e-6)
    assert_close_tensors(results[1][2], results[0][2], 1e-6)


def test_a_custom_loss_sees_what_the_user_put_in_the_batch():
    """A preference-like loss over two rows, with a key of the user's own, against plain autograd."""
    batch = {**packed(0, [[12], [12]]), "chosen": torch.tensor([1.0, -1.0])}

    def preference(logits, batch):
        picked = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0].sum(-1)
        return F.softplus(-(picked * batch["chosen"]).sum() / 10)

    model = build("llama")
    reference = copy.deepcopy(model)
    inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
    loss = preference(reference(**inputs, use_cache=False).logits, batch)
    loss.backward()
    with engine_for(model) as engine:
        result = engine.step(batch, loss_fn=preference)
        found = dict(engine.named_gradients())
    assert result.loss == float(loss.detach())
    assert_same_tensors(found, {name: p.grad for name, p in reference.named_parameters()})
