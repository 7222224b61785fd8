import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from horizon.errors import BatchError
from horizon.models.skeleton import init_parameters
from horizon.stream.batch import IGNORED, to_micro_batches
from horizon.stream.head import HeadLoss, chunk_tokens, chunks, cross_entropy_sum
from tests.stream.steps import HIDDEN, VOCAB, tiny_model


def head_parameters(model):
    values = dict(init_parameters(model.skeleton))
    layout = model.layouts[model.head]
    return {p.spec.local_name: values[p.name] for p in layout.params} | {
        b.local_name: values[b.param.name] for b in layout.borrowed
    }


def case(rows, tokens, seed=0):
    """Hidden states [rows, tokens, H] and a micro-batch, some of whose labels are ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, tokens, HIDDEN, generator=generator)
    ids = torch.randint(0, VOCAB, (rows, tokens), generator=generator)
    labels = ids.where(torch.rand(ids.shape, generator=generator) > 0.3, IGNORED)
    labels[:, -1] = ids[:, -1]  # the last token is always trained
    return hidden, to_micro_batches({"input_ids": ids, "labels": labels}, torch.device("cpu"), VOCAB)[0]


class Sums(dict):
    def add(self, gradients):
        for name, value in gradients.items():
            if value is not None:
                self[name] = self.get(name, 0) + value

    def add_product(self, name, grad, x):
        self.add({name: grad.t() @ x})


@given(st.integers(1, 5), st.integers(1, 30), st.integers(1, 200))
def test_chunks_cover_every_token_once_in_order(rows, tokens, size):
    hidden = torch.arange(rows * tokens * 2).view(rows, tokens, 2)
    targets = torch.arange(rows * tokens).view(rows, tokens)
    pieces = list(chunks(hidden, targets, size))
    assert all(t.numel() <= max(size, 1) and h.shape[:-1].numel() == t.numel() for _, h, t in pieces)
    assert torch.equal(torch.cat([h.reshape(-1, 2) for _, h, _ in pieces]), hidden.view(-1, 2))
    assert torch.equal(torch.cat([t.reshape(-1) for _, _, t in pieces]), targets.view(-1))
    assert [i for span, _, _ in pieces for i in range(rows * tokens)[span]] == list(range(rows * tokens))


def test_chunk_tokens_fills_the_bytes_but_is_never_tiny():
    assert chunk_tokens(vocab_size=1024, chunk_bytes=4 * 1024 * 300) == 300
    assert chunk_tokens(vocab_size=1 << 20, chunk_bytes=1 << 20) == 64


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(2, 12), st.integers(1, 40), st.sampled_from([1.0, 7.0]), st.booleans())
def test_the_loss_and_its_gradients_do_not_depend_on_the_chunk(rows, tokens, chunk, divisor, tied):
    model = tiny_model(layers=1, tied=tied)
    params, (hidden, batch) = head_parameters(model), case(rows, tokens)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    leaf = hidden.clone().requires_grad_()
    logits = model.logits(leaves, leaf)
    targets = batch.batch["labels"][:, 1:].flatten()  # what transformers computes: shifted here, not by us
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum") / divisor
    expected.backward()
    sums = Sums()
    loss, grad_hidden = HeadLoss(model, chunk).backward(params, hidden, batch, divisor, sums)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad_hidden, leaf.grad)
    assert sums.keys() == leaves.keys()
    for name, grad in sums.items():
        torch.testing.assert_close(grad, leaves[name].grad, msg=name)
    torch.testing.assert_close(HeadLoss(model, chunk).loss(params, hidden, batch) / divisor, loss)


def test_no_more_logits_exist_at_once_than_the_chunk_allows(monkeypatch):
    model = tiny_model(layers=1)
    params, (hidden, batch) = head_parameters(model), case(3, 11)
    seen, logits = [], model.logits
    monkeypatch.setattr(model, "logits", lambda p, h, s: (seen.append(h.shape[:-1].numel()), logits(p, h, s))[1])
    HeadLoss(model, 8).backward(params, hidden, batch, 1.0, Sums())
    assert seen == [8, 8, 8, 8, 1]


def test_bf16_logits_are_normalised_in_fp32():
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(5, 96, generator=generator)).bfloat16()
    targets = torch.tensor([3, IGNORED, 95, 0, 7])
    expected = F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
    assert torch.equal(cross_entropy_sum(logits, targets), expected)


def test_a_custom_loss_sees_all_logits_of_the_micro_batch_and_what_the_user_gave():
    model = tiny_model(layers=1)
    params, (hidden, batch) = head_parameters(model), case(2, 9)
    leaf = hidden.clone().requires_grad_()

    def loss_fn(logits, given):
        assert logits.shape == (2, 9, VOCAB) and set(given) == {"input_ids", "labels"}
        return logits.square().mean()

    expected = model.logits(params, leaf).square().mean() / 3
    expected.backward()
    loss, grad_hidden = HeadLoss(model, 4).backward(params, hidden, batch, 3.0, Sums(), loss_fn)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad_hidden, leaf.grad)


@pytest.mark.parametrize(
    ("loss_fn", "found"),
    [
        (lambda logits, batch: logits.sum(dim=-1), r"a tensor of shape \(2, 3\)"),
        (lambda logits, batch: 1.0, "float"),
        (lambda logits, batch: None, "NoneType"),
    ],
)
def test_a_custom_loss_must_give_a_scalar(loss_fn, found):
    model = tiny_model(layers=1)
    params, (hidden, batch) = head_parameters(model), case(2, 3)
    head = HeadLoss(model, 64)
    for call in (
        lambda: head.loss(params, hidden, batch, loss_fn),
        lambda: head.backward(params, hidden, batch, 1.0, Sums(), loss_fn),
    ):
        with pytest.raises(BatchError, match=f"loss_fn must return a scalar tensor, got {found}"):
            call()
