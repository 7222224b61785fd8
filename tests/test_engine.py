"""The public API of `horizon.Engine`: names, signatures, what each call gives and when it may be made."""

import inspect
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import horizon
from horizon.errors import BatchError, ConfigError, HorizonError

pytestmark = pytest.mark.timeout(60)

CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_batch(seed, rows=2, tokens=16):
    ids = torch.randint(3, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, :5] = -100
    return {"input_ids": ids, "labels": labels}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def masters(engine):
    return dict(engine.named_master_parameters())


@pytest.fixture
def model():
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG))


@pytest.fixture
def make():
    engines = []

    def make(source=CONFIG, **settings):
        engines.append(horizon.Engine.from_pretrained(source, device="cpu", **settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def test_public_names():
    assert {"Engine", "AdamW", "MemoryConfig", "Trainer"} <= set(horizon.__all__)
    for name in horizon.__all__:
        assert hasattr(horizon, name)


def test_from_pretrained_takes_what_scripts_pass():
    parameters = inspect.signature(horizon.Engine.from_pretrained).parameters
    assert list(parameters)[:6] == ["model", "optimizer", "memory", "max_grad_norm", "device", "compute_dtype"]
    assert [parameters[name].default for name in list(parameters)[3:6]] == [1.0, "auto", "auto"]
    assert all(p.kind is p.KEYWORD_ONLY for name, p in parameters.items() if name != "model")


def test_step_returns_what_it_did(make):
    engine, batch = make(optimizer=horizon.AdamW(lr=1e-3)), make_batch(0)
    before = engine.evaluate(batch)
    result = engine.step(batch)
    assert result.loss == pytest.approx(before, rel=1e-6)
    assert result.num_tokens == 15 + 11  # of a row's 16 tokens the first is not predicted, of the other's the first 5
    assert result.grad_norm > 0 and result.seconds > 0 and result.skipped is False
    with pytest.raises(AttributeError):
        result.loss = 0.0
    assert engine.num_steps == 1
    assert engine.evaluate(batch) < before


def test_a_step_is_the_plain_step(make, model):
    """Loss, norm, every gradient and every weight of clipped AdamW against transformers and torch."""
    engine, batch = make(model, optimizer=horizon.AdamW(lr=1e-2, weight_decay=0.1), max_grad_norm=0.5), make_batch(0)
    result = engine.step(batch)
    loss = model(**batch).loss
    loss.backward()
    loss = loss.detach()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, fused=True).step()
    assert result.loss == pytest.approx(float(loss), rel=1e-6)
    assert result.grad_norm == pytest.approx(float(norm), rel=1e-5)
    kept = dict(engine.named_gradients())
    assert list(kept) == list(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(kept[name], gradient, rtol=1e-4, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(masters(engine)[name], parameter.detach(), rtol=1e-5, atol=2e-5)


def test_the_two_halves_are_the_step(make):
    whole, halves, batch = make(), make(), make_batch(0)
    result = whole.step(batch)
    assert halves.forward_backward(batch) == result.loss
    second = halves.optimizer_step()
    assert (second.loss, second.grad_norm, second.num_tokens) == (result.loss, result.grad_norm, result.num_tokens)
    assert equal(masters(whole), masters(halves))


def test_gradients_accumulate_by_trained_tokens(make):
    together, apart = make(), make()
    batches = [make_batch(0), make_batch(1, rows=1), make_batch(2, tokens=9)]
    result = together.step(batches)
    losses = [apart.forward_backward(batch) for batch in batches]
    tokens = [26, 11, 8 + 4]
    assert sum(x * n for x, n in zip(losses, tokens, strict=True)) / 49 == pytest.approx(result.loss, rel=1e-6)
    for name, gradient in apart.named_gradients():
        torch.testing.assert_close(gradient, dict(together.named_gradients())[name], rtol=1e-4, atol=1e-7)
    second = apart.optimizer_step()
    assert second.num_tokens == result.num_tokens == 49
    assert second.loss == pytest.approx(result.loss, rel=1e-6)
    assert second.grad_norm == pytest.approx(result.grad_norm, rel=1e-5)


def test_order_of_the_halves(make):
    engine = make()
    with pytest.raises(HorizonError, match="optimizer_step without gradients: call forward_backward first"):
        engine.optimizer_step()
    engine.forward_backward(make_batch(0))
    with pytest.raises(BatchError, match="step while gradients of forward_backward wait; call optimizer_step first"):
        engine.step(make_batch(0))
    engine.optimizer_step()
    with pytest.raises(HorizonError, match="optimizer_step without gradients"):
        engine.optimizer_step()
    assert engine.step(make_batch(0)).num_tokens == 26
    assert engine.num_steps == 2


def test_when_gradients_can_be_read(make):
    clipped, unclipped, batch = make(), make(max_grad_norm=None), make_batch(0)
    none = "no gradients are kept: run a backward first; without clipping use forward_backward instead of step"
    for engine in (clipped, unclipped):
        with pytest.raises(HorizonError, match=none):
            engine.named_gradients()
        engine.step(batch)
    with pytest.raises(HorizonError, match=none):
        unclipped.named_gradients()
    gradients = dict(clipped.named_gradients())
    assert list(gradients) == list(masters(clipped))
    assert all(g.dtype is torch.float32 and g.device.type == "cpu" for g in gradients.values())
    clipped.evaluate(batch)
    assert equal(dict(clipped.named_gradients()), gradients)
    unclipped.forward_backward(batch)
    assert dict(unclipped.named_gradients()).keys() == gradients.keys()


def test_gradients_are_those_before_clipping(make):
    clipped, unclipped, batch = make(max_grad_norm=1e-3), make(max_grad_norm=None), make_batch(0)
    for engine in (clipped, unclipped):
        engine.forward_backward(batch)
    assert equal(dict(unclipped.named_gradients()), dict(clipped.named_gradients()))
    assert clipped.optimizer_step().grad_norm > 1
    assert equal(dict(unclipped.named_gradients()), dict(clipped.named_gradients()))


def test_what_is_read_is_a_copy(make):
    engine = make()
    engine.step(make_batch(0))
    for read in (engine.named_master_parameters, engine.named_gradients):
        before = dict(read())
        for tensor in dict(read()).values():
            tensor.zero_()
        assert equal(dict(read()), before)


def test_clipping_off_and_out_of_reach_are_the_same(make):
    off, far = make(max_grad_norm=None), make(max_grad_norm=1e9)
    for seed in range(3):
        a, b = off.step(make_batch(seed)), far.step(make_batch(seed))
        assert (a.loss, a.grad_norm) == (b.loss, b.grad_norm)
    assert equal(masters(off), masters(far))


def test_lr_is_what_the_next_step_uses(make):
    engine = make(optimizer=horizon.AdamW(lr=3e-4))
    assert engine.lr == 3e-4
    before = masters(engine)
    engine.lr = 0.0
    engine.step(make_batch(0))
    assert equal(masters(engine), before)
    engine.lr = 1e-3
    engine.step(make_batch(0))
    moved = [(masters(engine)[name] - value).abs().max() for name, value in before.items()]
    assert all(1e-4 < step < 3e-3 for step in moved)


def test_facts(make):
    engine = make()
    assert engine.vocab_size == 64
    assert engine.device == torch.device("cpu")
    assert engine.plan.num_blocks == 4 and engine.plan.num_parameters == sum(
        p.numel() for p in masters(engine).values()
    )
    assert engine.host_bytes > 50 << 20
    assert 0 < engine.device_bytes < 4 << 20
    assert "predicted peak" in engine.plan.table()
    assert engine.plan_micro_batch(8, 16) == 8


def test_custom_loss_equals_the_built_in_one(make):
    def loss_fn(logits, batch):
        labels = batch["labels"][:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels)

    built_in, custom, batches = make(), make(), [make_batch(0), make_batch(1, rows=1)]
    expected, result = built_in.step(batches), custom.step(batches, loss_fn=loss_fn)
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    assert custom.evaluate(batches, loss_fn=loss_fn) == pytest.approx(built_in.evaluate(batches), rel=1e-5)


def test_next_token_logits_are_the_models(make, model):
    engine, ids = make(model), make_batch(0)["input_ids"]
    logits = engine.next_token_logits({"input_ids": ids})
    assert logits.shape == (2, 64) and logits.dtype is torch.float32
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    several = engine.next_token_logits([{"input_ids": ids[:1]}, {"input_ids": ids[1:, :7]}])
    torch.testing.assert_close(several[0], expected[0], rtol=1e-5, atol=1e-6)
    assert several.shape == (2, 64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_saved_loads_in_transformers_with_equal_weights(make, tmp_path, dtype):
    engine = make()
    engine.step(make_batch(0))
    engine.save_pretrained(tmp_path / "out", dtype=dtype)  # while updates may still be running
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype is getattr(torch, dtype)
    assert equal(
        {name: p.detach() for name, p in loaded.named_parameters()},
        {name: p.to(loaded.dtype) for name, p in masters(engine).items()},
    )
    assert equal(masters(make(tmp_path / "out")), {name: p.detach().float() for name, p in loaded.named_parameters()})


def test_an_unknown_dtype_is_not_saved(make, tmp_path):
    with pytest.raises(ConfigError, match="dtype='fp8': expected float32, bfloat16 or float16"):
        make().save_pretrained(tmp_path / "out", dtype="fp8")
    assert not (tmp_path / "out").exists()


def test_every_source_of_a_model(make, model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    expected = {name: p.detach() for name, p in model.named_parameters()}
    live = make(model)
    assert equal(masters(live), expected)
    assert equal(masters(make(tmp_path / "model")), expected)
    assert equal(masters(make(str(tmp_path / "model"))), expected)
    live.step(make_batch(0))
    assert equal({name: p.detach() for name, p in model.named_parameters()}, expected)  # the live model is left alone


def test_a_folder_with_only_a_config_means_random_weights(make, model, tmp_path):
    model.config.save_pretrained(tmp_path)
    first, again, other = masters(make(tmp_path)), masters(make(tmp_path)), masters(make(tmp_path, seed=1))
    assert equal(first, again)
    assert not equal(first, other)
    assert equal(first, masters(make(CONFIG)))
    with horizon.Engine.from_config(CONFIG, device="cpu") as engine:
        assert equal(first, masters(engine))
    spread = first["model.layers.0.mlp.up_proj.weight"].std()
    assert math.isclose(spread, 0.02, rel_tol=0.1)


def test_frozen_parameters_stay_and_have_no_gradient(make):
    free, engine = make(), make(freeze=["model.embed_tokens.*", "*.1.self_attn.*"])
    before = masters(engine)
    for each in (free, engine):
        each.step(make_batch(0))
    frozen = {n for n in before if "embed_tokens" in n or ".1.self_attn." in n}
    assert len(frozen) == 5
    gradients, expected = dict(engine.named_gradients()), dict(free.named_gradients())
    assert gradients.keys() == before.keys() - frozen
    assert equal(gradients, {name: expected[name] for name in gradients})
    assert {name for name, value in masters(engine).items() if torch.equal(value, before[name])} == frozen


def test_a_context_manager_that_closes_once(make):
    with make() as engine:
        engine.step(make_batch(0))
    engine.close()
    for use in (
        lambda: engine.step(make_batch(0)),
        lambda: engine.forward_backward(make_batch(0)),
        lambda: engine.optimizer_step(),
        lambda: engine.evaluate(make_batch(0)),
        lambda: engine.next_token_logits(make_batch(0)),
        lambda: engine.named_master_parameters(),
        lambda: engine.named_gradients(),
        lambda: engine.save_pretrained("never"),
        lambda: engine.plan_micro_batch(2, 16),
    ):
        with pytest.raises(HorizonError, match=r"^the engine is closed$"):
            use()
    assert (engine.vocab_size, engine.num_steps, engine.lr) == (64, 1, 1e-5)
    assert engine.plan.num_blocks == 4 and engine.host_bytes > 0 and engine.device_bytes > 0


def test_the_body_s_error_passes_through(make):
    engine = make()
    with pytest.raises(KeyError, match="mine"), engine:
        raise KeyError("mine")
    with pytest.raises(HorizonError, match="the engine is closed"):
        engine.evaluate(make_batch(0))
