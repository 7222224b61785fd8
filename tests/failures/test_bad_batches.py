"""Batches and losses that cannot be trained on: refused before the weights are touched, and the engine goes on."""

import pytest
import torch

from horizon.errors import BatchError, ConfigError

IDS = torch.arange(3, 35).view(2, 16)
GPT2 = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip

BAD = {
    "token above the vocabulary": (
        {"input_ids": IDS + 30, "labels": IDS},
        "input_ids holds token 64, outside .* of 64",
    ),
    "negative token": ({"input_ids": IDS - 4, "labels": IDS}, "input_ids holds token -1, outside"),
    "label above the vocabulary": ({"input_ids": IDS, "labels": IDS + 40}, "labels holds token 74, outside"),
    "negative label": ({"input_ids": IDS, "labels": IDS - 10}, "labels holds token -7, outside"),
    "float tokens": ({"input_ids": IDS.float(), "labels": IDS}, "input_ids holds torch.float32, expected integers"),
    "bool tokens": ({"input_ids": IDS > 9, "labels": IDS}, "input_ids holds torch.bool, expected integers"),
    "float labels": ({"input_ids": IDS, "labels": IDS.double()}, "labels holds torch.float64, expected integers"),
    "one dimension": ({"input_ids": IDS[0], "labels": IDS[0]}, r"shape \(16,\), expected \[rows, tokens\]"),
    "no rows": ({"input_ids": IDS[:0], "labels": IDS[:0]}, r"shape \(0, 16\), expected \[rows, tokens\]"),
    "shorter labels": ({"input_ids": IDS, "labels": IDS[:, 1:]}, r"labels has shape \(2, 15\), input_ids \(2, 16\)"),
    "fewer masks": ({"input_ids": IDS, "labels": IDS, "attention_mask": IDS[:1]}, "attention_mask has shape"),
    "float positions": ({"input_ids": IDS, "labels": IDS, "position_ids": IDS / 2}, "position_ids holds torch.float32"),
    "negative position": ({"input_ids": IDS, "labels": IDS, "position_ids": IDS - 9}, "position_ids holds -6, outside"),
    "no labels": ({"input_ids": IDS}, r"has no 'labels'; found \['input_ids'\]"),
    "labels None": ({"input_ids": IDS, "labels": None}, "has no 'labels'"),
    "no tokens": ({"labels": IDS}, "has no 'input_ids'"),
    "nothing": ({}, "has no 'input_ids'"),
    "lists": ({"input_ids": IDS.tolist(), "labels": IDS}, "input_ids is a list, expected a tensor"),
    "no trained token": ({"input_ids": IDS, "labels": torch.full_like(IDS, -100)}, "no token of the batch is trained"),
    "only a first token": ({"input_ids": IDS[:, :1], "labels": IDS[:, :1]}, "no token of the batch is trained"),
    "empty list": ([], "the step has no micro-batch"),
    "a tensor": (IDS, "a batch is a dict of tensors or a list of such dicts, got a Tensor"),
    "None": (None, "got a NoneType"),
    "list of tensors": ([IDS], "micro-batch 0 is a Tensor, expected a dict of tensors"),
    "bad second": ([{"input_ids": IDS, "labels": IDS}, {"input_ids": IDS}], "micro-batch 1 has no 'labels'"),
}


@pytest.mark.parametrize("call", ["step", "forward_backward", "evaluate"])
def test_a_bad_batch_is_named_and_changes_nothing(build, fails, tools, healthy, call):
    engine = build()
    for batch, message in BAD.values():
        with fails(BatchError, message):
            getattr(engine, call)(batch)
    losses, masters = tools.train(engine)
    assert losses == healthy[0]
    assert tools.equal(masters, healthy[1])


def test_waiting_gradients_survive_a_bad_batch_and_a_failing_evaluation(build, fails, tools):
    def accumulated(disturb):
        engine = build()
        engine.forward_backward(tools.make_batch(0))
        disturb(engine)
        engine.forward_backward(tools.make_batch(1))
        engine.optimizer_step()
        return dict(engine.named_master_parameters())

    def disturb(engine):
        with fails(BatchError, "no 'labels'"):
            engine.forward_backward({"input_ids": IDS})
        with fails(ValueError, "mine"):
            engine.evaluate(tools.make_batch(0), loss_fn=raising)

    assert tools.equal(accumulated(disturb), accumulated(lambda engine: None))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_every_integer_type_is_taken(build, healthy, tools, dtype):
    batch = {key: value.to(dtype) for key, value in tools.make_batch(0).items()}
    assert build().step(batch).loss == healthy[0][0]


def test_rows_longer_than_the_table_of_positions_are_named(build, fails):
    engine = build(GPT2)
    long = torch.full((1, 25), 3)
    for call in (engine.step, engine.evaluate):
        with fails(BatchError, "rows of 25 tokens, but the model has 24 positions"):
            call({"input_ids": long, "labels": long})
    with fails(BatchError, "rows of 25 tokens"):
        engine.next_token_logits({"input_ids": long})
    with fails(BatchError, "position_ids holds 34, outside the model's positions"):
        engine.step({"input_ids": IDS, "labels": IDS, "position_ids": IDS})
    with fails(ConfigError, "train.seq_len=25, but the model has only 24 positions"):
        engine.plan_micro_batch(1, 25)
    assert engine.step({"input_ids": long[:, :24], "labels": long[:, :24]}).num_tokens == 23


def raising(logits, batch):
    raise ValueError("mine")


LOSSES = {
    "python float": (lambda logits, batch: 1.0, BatchError, "loss_fn must return a scalar tensor, got float"),
    "nothing": (lambda logits, batch: None, BatchError, "got NoneType"),
    "no scalar": (lambda logits, batch: logits.sum(-1), BatchError, r"got a tensor of shape \(2, 16\)"),
    "detached": (lambda logits, batch: logits.detach().sum(), BatchError, "does not depend on the logits"),
    "of something else": (
        lambda logits, batch: torch.ones((), requires_grad=True) * 2, BatchError, "does not depend on the logits"
    ),
    "raises": (raising, ValueError, "mine"),
}  # fmt: skip


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
@pytest.mark.parametrize("loss_fn, kind, message", LOSSES.values(), ids=LOSSES)
def test_a_bad_loss_is_named_and_changes_nothing(build, fails, tools, healthy, loss_fn, kind, message, max_grad_norm):
    engine = build(max_grad_norm=max_grad_norm)
    twin = build(max_grad_norm=max_grad_norm)
    with fails(kind, message):
        engine.step(tools.make_batch(0), loss_fn=loss_fn)
    assert tools.equal(tools.train(engine)[1], tools.train(twin)[1])


def test_a_custom_loss_needs_no_labels(build):
    def loss_fn(logits, batch):
        return logits.float().logsumexp(-1).mean()

    engine, twin = build(), build()
    result = engine.step({"input_ids": IDS}, loss_fn=loss_fn)
    assert result.num_tokens == IDS.numel()  # none is set apart, so all count
    assert twin.evaluate({"input_ids": IDS}, loss_fn=loss_fn) == pytest.approx(result.loss, rel=1e-6)
    assert twin.forward_backward({"input_ids": IDS}, loss_fn=loss_fn) == result.loss
    assert twin.optimizer_step().grad_norm == result.grad_norm
