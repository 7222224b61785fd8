"""The master is true fp32: read back exactly, moved by AdamW where bfloat16 weights would stand still."""

import copy

import pytest
import torch

import horizon
from tests.parity.reference import (
    MAX_GRAD_NORM,
    Resident,
    assert_close_tensors,
    assert_same_tensors,
    build,
    engine_for,
    plain,
)

LOW_LR = 1e-6


def in_bfloat16(model):
    """The model with bfloat16 parameters; its buffers (rotary frequencies) stay as they are."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_masters_are_the_source_exactly(dtype, compute):
    model = build("gemma2").to(dtype)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.view(-1)[:4] = torch.tensor([-0.0, 6e-8, 65504.0, -1e-7])
    source = {name: p.detach().float() for name, p in model.named_parameters()}
    with engine_for(model, compute_dtype=compute) as engine:
        masters = dict(engine.named_master_parameters())
    assert all(value.dtype == torch.float32 and value.device.type == "cpu" for value in masters.values())
    assert_same_tensors(masters, source)
    assert all(p.dtype == dtype for p in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
def test_computing_in_bfloat16_equals_a_bfloat16_model(family):
    """One micro-batch: its gradients are summed in fp32 from zero and rounded once, which changes nothing."""
    model = in_bfloat16(build(family, tie_word_embeddings=False))
    resident = copy.deepcopy(model).train()
    batch = plain(0)
    loss = resident(**batch, use_cache=False).loss
    loss.backward()
    expected = {name: p.grad.float() for name, p in resident.named_parameters()}
    with engine_for(model, compute_dtype="bfloat16") as engine:
        assert engine.step(batch).loss == pytest.approx(float(loss.detach()), rel=1e-5)
        assert_close_tensors(dict(engine.named_gradients()), expected, 2**-7)


def test_bfloat16_gradients_of_many_micro_batches_are_summed_in_fp32():
    """Sixteen equal micro-batches: a bfloat16 sum loses bits, a sum in fp32 is that of one of them."""
    model = in_bfloat16(build("llama"))
    gradients = []
    for count in (1, 16):
        with engine_for(model, compute_dtype="bfloat16") as engine:
            engine.forward_backward([plain(0)] * count)
            gradients.append(dict(engine.named_gradients()))
    assert_close_tensors(gradients[1], gradients[0], 1e-6)


def test_masters_move_at_a_learning_rate_where_bfloat16_weights_stand_still():
    model = in_bfloat16(build("llama"))
    before = {name: p.detach().float() for name, p in model.named_parameters()}
    pure_bfloat16, distances = Resident(model, lr=LOW_LR), []
    with engine_for(model, compute_dtype="bfloat16", optimizer=horizon.AdamW(lr=LOW_LR)) as engine:
        for seed in range(3):
            pure_bfloat16.step([plain(seed)])
            engine.step(plain(seed))
            masters = dict(engine.named_master_parameters())
            distances.append({name: float((masters[name] - value).abs().max()) for name, value in before.items()})
        trained = {name: gradient != 0 for name, gradient in engine.named_gradients()}  # tokens not seen have none
    for name, parameter in pure_bfloat16.named.items():
        stood_still, moved = parameter.detach().float() == before[name], masters[name] != before[name]
        assert stood_still[trained[name]].float().mean() > 0.95, name
        assert moved[trained[name]].float().mean() > 0.9, name
        first, second, third = (distance[name] for distance in distances)
        assert 0 < first < second < third <= 3.3 * LOW_LR, name
        assert first <= 1.1 * LOW_LR, name


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_masters_follow_torchs_fp32_adamw_fed_the_same_gradients(compute):
    model = build("qwen2")
    reference = Resident(model, lr=LOW_LR)
    with engine_for(model, compute_dtype=compute, optimizer=horizon.AdamW(lr=LOW_LR)) as engine:
        for seed in range(3):
            result = engine.step([plain(seed), plain(seed + 10)])
            for name, gradient in engine.named_gradients():
                reference.named[name].grad = gradient
            norm = torch.nn.utils.clip_grad_norm_(reference.named.values(), MAX_GRAD_NORM)
            assert float(norm) == result.grad_norm
            reference.optimizer.step()
            assert_same_tensors(dict(engine.named_master_parameters()), reference.weights())


def test_computing_in_fp32_uses_both_halves_of_the_master():
    """After steps too small for bfloat16, the loss is that of the moved masters, not of their high halves."""
    model = build("llama")
    with engine_for(model, optimizer=horizon.AdamW(lr=LOW_LR)) as engine:
        engine.step(plain(0))
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, value in engine.named_master_parameters():
                moved.get_parameter(name).copy_(value)
            expected = float(moved(**plain(1), use_cache=False).loss)
        assert engine.evaluate(plain(1)) == pytest.approx(expected, abs=2e-7)
        assert engine.evaluate(plain(1)) != float(model(**plain(1), use_cache=False).loss.detach())
