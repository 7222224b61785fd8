import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from horizon.config.schema import TooLong
from horizon.data.encoding import Tokens
from horizon.data.pieces import cut
from horizon.data.rows import Source, pack, pad

LENGTHS = [5, 3, 8, 2, 4]  # 8-token rows: two documents, one that fills its row, two and padding


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).double().train()


def loss_and_gradients(model, rows):
    model.zero_grad()
    batch = rows.batch(np.arange(len(rows)))
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_packed_rows_give_the_loss_and_gradients_of_one_document_a_row(model):
    ids = np.random.default_rng(0).integers(1, 40, sum(LENGTHS)).astype(np.int32)
    tokens = Tokens(ids, np.ones(len(ids), np.bool_), np.array(LENGTHS), [""] * len(LENGTHS))
    source, pieces = Source("", tokens), cut(tokens, np.ones(len(LENGTHS), np.bool_), 8, TooLong.split)
    packed_rows, padded_rows = pack(source, pieces, 8, pad_id=0), pad(source, pieces, 8, pad_id=0)
    assert len(packed_rows) == 3 and len(padded_rows) == 5
    assert packed_rows.num_trained.sum() == padded_rows.num_trained.sum() == sum(LENGTHS) - len(LENGTHS)
    packed_loss, packed = loss_and_gradients(model, packed_rows)
    padded_loss, padded = loss_and_gradients(model, padded_rows)
    torch.testing.assert_close(packed_loss, padded_loss, rtol=1e-12, atol=0)
    for name, gradient in padded.items():
        torch.testing.assert_close(
            packed[name], gradient, rtol=1e-9, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
        )
