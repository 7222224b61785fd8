"""States on nvme on a GPU: the weights are those that host memory would give, within the memory that was planned."""

import random
import time

import pytest
import torch

import horizon
from horizon.store import disk, nvme, offload
from tests.gpu.models import EAGER, batches, build, differing, engine

pytestmark = pytest.mark.gpu

POLICIES = ["nvme_optimizer", "nvme_all"]
CLIPS = {"exact": {}, "lagged": {"clip": "lagged"}, "none": {"max_grad_norm": None}}


class SlowFile(disk.DirectFile):
    """Delays every move, differently each time."""

    random = random.Random(0)

    def read(self, place, offset, into):
        time.sleep(self.random.random() * 0.01)
        super().read(place, offset, into)

    def write(self, place, offset, data):
        time.sleep(self.random.random() * 0.01)
        super().write(place, offset, data)


def trained(memory, **settings):
    """Losses and masters of a few steps that follow each other at once."""
    with engine(build("llama, tied", **EAGER), memory=memory, **settings) as found:
        losses = [found.step(batches(2, seed=seed)).loss for seed in range(4)]
        return losses, dict(found.named_master_parameters())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("master", ["split", "bf16_stochastic"])
def test_weights_are_those_of_host_memory(policy, clip, dtype, master, tmp_path, monkeypatch):
    monkeypatch.setattr(nvme, "DirectFile", SlowFile)
    settings = {**CLIPS[clip], "compute_dtype": dtype, "optimizer": horizon.AdamW(lr=1e-3, master=master)}
    losses, weights = trained(horizon.MemoryConfig(policy="dram"), **settings)
    found, others = trained(horizon.MemoryConfig(policy=policy, nvme_dir=str(tmp_path)), **settings)
    assert found == losses
    assert differing(others, weights) == []


RULES = {state: [horizon.TierRule(state=state, tier="nvme")] for state in ("grads", "activations")}
RULES["both"] = [*RULES["grads"], *RULES["activations"]]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("num_buffers", [2, 4])
def test_gradients_and_activations_come_back_as_they_left(
    rules, dtype, num_buffers, tmp_path, monkeypatch, offload_everything
):
    """All boundaries leave, two backwards add up, and a step follows at once."""
    offload_everything()
    monkeypatch.setattr(nvme, "DirectFile", SlowFile)
    monkeypatch.setattr(offload, "BOUNDARY_BUFFERS", num_buffers)
    found = []
    for memory in ({}, {"rules": RULES[rules], "nvme_dir": str(tmp_path)}):
        placed = horizon.MemoryConfig(policy="dram", **memory)
        with engine(build("llama, tied", **EAGER), memory=placed, compute_dtype=dtype) as one:
            losses = [one.step(batches(3, seed=seed)).loss for seed in range(3)]
            losses += [one.forward_backward(batches(3, seed=seed)) for seed in (3, 4)]
            gradients = dict(one.named_gradients())
            one.optimizer_step()
            losses.append(one.step(batches(3, seed=5)).loss)
            if memory and rules != "activations":
                assert all(region.is_pinned() for region in one._runtime.buffers._spill._arena.regions)
            found.append((losses, gradients, dict(one.named_master_parameters())))
    (losses, gradients, weights), (other_losses, other_gradients, other_weights) = found
    assert other_losses == losses
    assert differing(other_gradients, gradients) == []
    assert differing(other_weights, weights) == []


def test_peaks_are_those_of_the_plan(tmp_path):
    shape = {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8,
    }  # fmt: skip
    memory = horizon.MemoryConfig(policy="nvme_all", nvme_dir=str(tmp_path))
    with horizon.Engine.from_config(shape, memory=memory, device="cuda", self_check=False) as found:
        rows = found.plan_micro_batch(8, 256)
        for seed in range(3):
            found.step(batches(8 // rows, rows, 256, 32000, seed))
        plan = found.plan
        assert found.device_bytes <= plan.num_bytes("device") * 1.03 + (256 << 20)
        assert found.host_bytes <= plan.num_bytes("host") * 1.03 + (256 << 20)
        for staging in (found._runtime.store.loads, found._runtime.buffers._spill):
            assert all(region.is_pinned() for region in staging._arena.regions)
    torch.cuda.empty_cache()
