"""NaN and infinity: named by step and block or parameter, never written into the masters."""

import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from horizon.errors import HorizonError, NonFiniteError

BAD_TOKEN = 63  # `make_batch` never draws it


@pytest.fixture
def model(tools):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**tools.LLAMA))


def poisoned(model, name, value):
    """The model with one element of a parameter replaced: in the row of BAD_TOKEN where rows are tokens."""
    with torch.no_grad():
        parameter = model.get_parameter(name)
        parameter.view(-1)[BAD_TOKEN * 32 if "embed" in name or "head" in name else 0] = value
    return model


def nan_loss(logits, batch):
    return logits.sum() * float("nan")


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
@pytest.mark.parametrize(
    ("name", "value", "block"),
    [
        ("model.embed_tokens.weight", float("nan"), "embed"),
        ("model.layers.0.input_layernorm.weight", float("nan"), "layers.0"),
        ("model.layers.1.self_attn.o_proj.weight", float("inf"), "layers.1"),
        ("model.layers.2.mlp.down_proj.weight", float("nan"), "layers.2"),
        ("model.norm.weight", float("nan"), "head"),
        ("lm_head.weight", float("nan"), "head"),
    ],
)
def test_the_error_names_the_step_and_the_first_block_that_is_not_finite(
    build, fails, tools, model, name, value, block, max_grad_norm
):
    engine = build(poisoned(model, name, value), max_grad_norm=max_grad_norm)
    before = dict(engine.named_master_parameters())
    batch = tools.make_batch(0)
    batch["input_ids"][0, 3] = BAD_TOKEN
    for _ in range(2):  # nothing was applied, so it is step 1 again
        with fails(NonFiniteError, f"step 1: the loss is nan; block '{block}' is the first whose output is not finite"):
            engine.step(batch)
    assert engine.num_steps == 0
    assert tools.equal(dict(engine.named_master_parameters()), before)
    with fails(HorizonError, "no gradients are kept"):
        engine.named_gradients()


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
def test_skip_drops_the_step_counts_it_and_trains_on(build, tools, model, caplog, max_grad_norm):
    engine, twin = (
        build(poisoned(model, "model.embed_tokens.weight", float("nan")), max_grad_norm=m, on_nonfinite="skip")
        for m in (max_grad_norm, max_grad_norm)
    )
    good, bad = tools.make_batch(0), tools.make_batch(1)
    bad["input_ids"][1, 5] = BAD_TOKEN
    engine.step(good), twin.step(good)
    before = dict(engine.named_master_parameters())
    with caplog.at_level(logging.WARNING, "horizon.engine"):
        result = engine.step(bad)
    assert result.skipped and result.loss != result.loss and result.num_tokens == 30
    assert "step 2: the loss is nan; block 'embed'" in caplog.text and "the step is skipped" in caplog.text
    assert engine.num_steps == 1
    assert tools.equal(dict(engine.named_master_parameters()), before)
    again, expected = engine.step(good), twin.step(good)
    assert not again.skipped
    assert (again.loss, again.grad_norm) == (expected.loss, expected.grad_norm)
    assert tools.equal(dict(engine.named_master_parameters()), dict(twin.named_master_parameters()))


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_a_custom_loss_that_is_nan_is_not_blamed_on_a_block(build, fails, tools, max_grad_norm, on_nonfinite):
    engine, twin = (build(max_grad_norm=max_grad_norm, on_nonfinite=on_nonfinite) for _ in range(2))
    if on_nonfinite == "skip":
        assert engine.step(tools.make_batch(0), loss_fn=nan_loss).skipped
    else:
        with fails(NonFiniteError, "step 1: the loss is nan, though every block's output is finite; look at loss_fn"):
            engine.step(tools.make_batch(0), loss_fn=nan_loss)
    assert tools.equal(tools.train(engine)[1], tools.train(twin)[1])


class InfiniteGradient(torch.autograd.Function):
    """The identity, with an infinite gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("inf")


def break_layer(monkeypatch, model, index):
    """Give the MLP of one layer an infinite gradient, the values being right."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward
    broken = [True]

    def patched(module, x):
        output = forward(module, x)
        return InfiniteGradient.apply(output) if broken[0] and module.layer_index == index else output

    for number, layer in enumerate(model.model.layers):
        layer.mlp.layer_index = number
    monkeypatch.setattr(LlamaMLP, "forward", patched)
    return broken


def test_an_infinite_gradient_under_a_finite_loss_names_the_parameter(build, fails, tools, model, monkeypatch):
    engine, twin = build(model), build(model)
    broken = break_layer(monkeypatch, model, 1)
    engine = build(model)
    before = dict(engine.named_master_parameters())
    message = r"step 1: the gradient of model\.layers\.1\..* is not finite \(loss 4\.\d+\); set on_nonfinite=skip"
    with fails(NonFiniteError, message):
        engine.step(tools.make_batch(0))
    assert tools.equal(dict(engine.named_master_parameters()), before)
    broken[0] = False
    assert tools.equal(tools.train(engine)[1], tools.train(twin)[1])


def test_an_infinite_gradient_can_be_skipped(build, tools, model, monkeypatch):
    broken = break_layer(monkeypatch, model, 0)
    engine, twin = (build(model, max_grad_norm=None, on_nonfinite="skip") for _ in range(2))
    result = engine.step(tools.make_batch(0))
    assert result.skipped and result.loss == result.loss
    broken[0] = False
    assert tools.equal(tools.train(engine)[1], tools.train(twin)[1])


def test_without_clipping_an_infinite_gradient_ends_the_run(build, fails, tools, model, monkeypatch):
    """Blocks above have been updated by then: going on would train a broken model."""
    break_layer(monkeypatch, model, 1)
    engine = build(model, max_grad_norm=None)
    message = r"step 1: the gradient of model\.layers\.1\..* blocks were updated before that was known"
    for call in (
        lambda: engine.step(tools.make_batch(0)),
        lambda: engine.step(tools.make_batch(0)),
        lambda: engine.evaluate(tools.make_batch(0)),
        lambda: engine.save_pretrained("never"),
        lambda: engine.named_master_parameters(),
    ):
        with fails(NonFiniteError, message):
            call()


def test_a_bad_pass_among_several_is_named_and_forgotten(build, fails, tools, model):
    engine, twin = (build(poisoned(model, "model.embed_tokens.weight", float("nan"))) for _ in range(2))
    bad = tools.make_batch(1)
    bad["input_ids"][0, 0] = BAD_TOKEN
    before = dict(engine.named_master_parameters())
    engine.forward_backward(tools.make_batch(0))
    assert engine.forward_backward(bad) != engine.forward_backward(tools.make_batch(2))
    with fails(NonFiniteError, "step 1: the loss is nan; block 'embed'"):
        engine.optimizer_step()
    assert tools.equal(dict(engine.named_master_parameters()), before)
    for each in (engine, twin):
        each.forward_backward(tools.make_batch(0))
    assert engine.optimizer_step().loss == twin.optimizer_step().loss
    assert tools.equal(dict(engine.named_master_parameters()), dict(twin.named_master_parameters()))
