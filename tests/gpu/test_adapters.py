"""LoRA adapters on a GPU: plain autograd's gradients, a base that nothing touches, the host's bits from the kernel."""

import copy

import pytest
import torch

import horizon
from tests.gpu.models import DEVICE, EAGER, assert_close, batches, build, differing, engine, plain_gradients, resident

pytestmark = pytest.mark.gpu
peft = pytest.importorskip("peft")


def adapted(family="llama", **changes):
    torch.manual_seed(1)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
    model = peft.get_peft_model(build(family, **EAGER), peft.LoraConfig(**lora))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05).copy_(parameter.bfloat16())
    return model.get_base_model().train()


def is_adapter(name):
    return "lora_" in name


@pytest.mark.parametrize("turn_layers", [0, 2])
@pytest.mark.parametrize("family", ["llama", "llama, tied"])
def test_gradients_are_a_resident_models_and_the_base_stays(family, turn_layers):
    model, step = adapted(family), batches(2)
    expected_loss, expected = plain_gradients(resident(model), step)
    memory = horizon.MemoryConfig(turn_layers=turn_layers)
    with engine(model, compute_dtype="float32", memory=memory) as streamed:
        result = streamed.step(step)
        found, weights = dict(streamed.named_gradients()), dict(streamed.named_master_parameters())
    assert result.loss == pytest.approx(expected_loss, rel=1e-5)
    assert all(map(is_adapter, found))
    assert_close(found, {n: g for n, g in expected.items() if is_adapter(n)}, 2e-5)
    moved = differing(weights, dict(model.named_parameters()))
    assert sorted(moved) == sorted(found)


@pytest.mark.parametrize("master", ["fp32", "bf16"])
@pytest.mark.parametrize("writeback_every", [1, 3])
def test_zeroth_order_steps_move_the_adapter_alone_and_replay_to_the_same_bits(tmp_path, master, writeback_every):
    model, weights = adapted("llama, tied"), []
    zeroth = horizon.ZerothOrder(lr=1e-2, eps=1e-3, seed=5, master=master, writeback_every=writeback_every)
    of = {"optimizer": zeroth, "kernels": "torch", "self_check": False}
    log = tmp_path / "replay.jsonl"
    with horizon.Engine.from_pretrained(copy.deepcopy(model), device=DEVICE, **of) as streamed:
        streamed.log_steps(log)
        for seed in range(4):
            streamed.step(batches(1, seed=seed))
        weights.append(dict(streamed.named_master_parameters()))
    with horizon.Engine.from_pretrained(model, device="cpu", **of) as host:
        host.replay(log)
        weights.append(dict(host.named_master_parameters()))
    assert differing(*weights) == []
    moved = differing(weights[0], dict(model.named_parameters()))
    assert moved and all(map(is_adapter, moved))
