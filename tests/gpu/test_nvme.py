"""States on nvme on a GPU: the weights are those that host memory would give, within the memory that was planned."""

import random
import time

import pytest
import torch

import horizon
from horizon.store import disk, nvme
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
        assert all(region.is_pinned() for region in found._runtime.store.loads._arena.regions)
    torch.cuda.empty_cache()
