"""Tiny engines, their steps, and every bit of their states, for the tests of checkpoints."""

import torch

import horizon

LLAMA = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
DROPOUT = {
    "model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def make_batch(seed, rows=2, tokens=16):
    ids = torch.randint(3, 63, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def build(model=LLAMA, **settings):
    return horizon.Engine.from_pretrained(model, **{"device": "cpu", "self_check": False, **settings})


def load(folder, **settings):
    return horizon.Engine.load_checkpoint(folder, **{"device": "cpu", "self_check": False, **settings})


def train(engine, first, last):
    """What the steps from `first` to `last` say."""
    results = [engine.step(make_batch(seed)) for seed in range(first, last + 1)]
    return [(r.loss, r.grad_norm, r.clip_scale, r.skipped, r.corrected_blocks) for r in results]


def states(engine):
    """Every state of every block, bit for bit."""
    runtime = engine._runtime
    runtime.wait_for_updates()
    return {
        (block, name): runtime.store.read_state(name, block).view(torch.uint8)
        for block in range(len(runtime.model.layouts))
        for name in runtime.store.states(block)
    }


def equal(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[key], other[key]) for key in one)
