"""Generation on the GPU: transformers' tokens in fp32, and memory within the budget."""

import pytest
import torch

import horizon
from horizon.units import MIB
from tests.gpu.models import DEVICE, build, resident

pytestmark = pytest.mark.gpu

VOCAB, NEW = 128, 24
MEDIUM = {
    "model_type": "llama", "vocab_size": 2048, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 4096,
}  # fmt: skip


def prompts(rows=3, tokens=19, vocab=VOCAB):
    """Prompts of different lengths, padded on the left."""
    ids = torch.randint(3, vocab, (rows, tokens), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(tokens) >= torch.arange(rows)[:, None] % (tokens // 2)).long()
    return ids.where(mask.bool(), torch.tensor(0)), mask


@pytest.mark.parametrize("family", ["llama", "llama, tied", "qwen3", "gemma2", "gpt2", "mixtral"])
@pytest.mark.parametrize("policy", ["dram", "auto"])
def test_greedy_tokens_are_those_of_transformers(family, policy):
    model = build(family)
    ids, mask = prompts()
    reference = resident(model).eval()
    want = reference.generate(
        ids.to(DEVICE), attention_mask=mask.to(DEVICE), max_new_tokens=NEW, eos_token_id=None
    ).cpu()
    memory = horizon.MemoryConfig(policy=policy)
    settings = {"device": DEVICE, "compute_dtype": "float32", "kernels": "torch", "self_check": False, "memory": memory}
    for kind in (horizon.InferenceEngine, horizon.Engine):
        with kind.from_pretrained(model, **settings) as engine:
            assert torch.equal(engine.generate(ids, mask, max_new_tokens=NEW, eos_token_id=None), want)


def test_the_devices_peak_stays_in_the_budget_with_keys_and_values_on_the_host():
    """In fp32: in bf16 two runs of the same settings may differ, where two tokens are as likely as each other."""
    ids, mask = prompts(rows=16, tokens=512, vocab=2048)
    arguments = {"max_new_tokens": 32, "eos_token_id": None}
    settings = {"device": DEVICE, "compute_dtype": "float32", "kernels": "torch", "self_check": False}
    found = []
    for tight in (False, True):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        budget = str(found[0][1] - 128 * MIB) if tight else "auto"  # keys and values are 16 x 544 x 8 x 8 KiB: 544 MiB
        memory = horizon.MemoryConfig(device_budget=budget, policy="dram")
        with horizon.InferenceEngine.from_pretrained(MEDIUM, memory=memory, **settings) as engine:
            planned = engine.plan_generation(*ids.shape, **arguments)
            tokens = engine.generate(ids, mask, **arguments)
            measured = engine.device_bytes
        away = sum(line.num_bytes for line in planned.activations if line.tier == "host")
        assert (away > 0) == tight
        assert measured <= min(planned.limits.device, planned.num_bytes("device") + 256 * MIB)
        found.append((tokens, planned.num_bytes("device")))
    assert torch.equal(found[0][0], found[1][0])


def test_a_generation_between_steps_changes_no_step():
    model = build("llama")
    ids, mask = prompts()
    batch = {"input_ids": ids, "labels": ids, "attention_mask": mask}
    losses = []
    for generates in (False, True):
        settings = {"device": DEVICE, "compute_dtype": "float32", "kernels": "torch", "self_check": False}
        with horizon.Engine.from_pretrained(model, optimizer=horizon.AdamW(lr=1e-3), **settings) as engine:
            losses.append([])
            for _ in range(3):
                losses[-1].append(engine.step(batch).loss)
                if generates:
                    engine.generate(ids, mask, max_new_tokens=4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_closed_engine_leaves_nothing_on_the_device():
    ids, mask = prompts()
    settings = {"device": DEVICE, "kernels": "torch", "self_check": False}
    left = []
    for _ in range(3):
        engine = horizon.InferenceEngine.from_pretrained(build("llama"), **settings)
        engine.generate(ids, mask, max_new_tokens=4)
        engine.close()
        left.append(torch.cuda.memory_allocated(DEVICE))
    assert left[2] <= left[1]  # what libraries keep may shrink
