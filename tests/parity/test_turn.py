"""How many layers micro-batches pass one by one, there and straight back, never changes a bit."""

from fnmatch import fnmatch

import pytest
import torch

from horizon import AdamW, MemoryConfig
from horizon.errors import ConfigError
from tests.parity.reference import (
    FAMILIES,
    assert_same_tensors,
    assert_trains_the_same,
    build,
    engine_for,
    packed,
    padded,
    plain,
)

LAYERS = 4


def ragged(seed):
    """Three micro-batches of different shapes."""
    return [padded(seed, [12, 7]), padded(seed + 10, [3, 6, 4], tokens=6), plain(seed + 20)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    model = build(family)
    layers = len(model.model.layers) if hasattr(model, "model") and hasattr(model.model, "layers") else 2
    memory = MemoryConfig(turn_layers=layers)
    assert_trains_the_same(model, [ragged(seed) for seed in range(2)], memory=memory)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("turn_layers", [1, 2, LAYERS])
def test_any_number_of_layers_with_any_slots(turn_layers, tied):
    model = build("llama", num_hidden_layers=LAYERS, tie_word_embeddings=tied)
    for slots in (1, 3):
        memory = MemoryConfig(turn_layers=turn_layers, weight_slots=slots)
        assert_trains_the_same(model, [ragged(seed) for seed in range(3)], memory=memory)


@pytest.mark.parametrize("recompute", ["selective", "none"])
@pytest.mark.parametrize("clip", ["speculative", "lagged"])
def test_beside_what_other_layers_keep_and_with_updates_on_landing(recompute, clip):
    model = build("llama", num_hidden_layers=LAYERS)
    of = {"max_grad_norm": 1e9, "clip": clip}

    def run(turn_layers):
        memory = MemoryConfig(turn_layers=turn_layers, recompute=recompute)
        with engine_for(model, memory=memory, optimizer=AdamW(lr=1e-2), **of) as engine:
            return [engine.step(ragged(seed)).loss for seed in range(3)], dict(engine.named_master_parameters())

    (losses, weights), (expected, others) = run(2), run(0)
    assert losses == expected
    assert_same_tensors(weights, others)


def test_bf16_gradients_that_are_added_to_on_the_host():
    model = build("llama", num_hidden_layers=LAYERS)

    def run(turn_layers):
        settings = {"memory": MemoryConfig(turn_layers=turn_layers), "compute_dtype": "bfloat16"}
        with engine_for(model, **settings) as engine:
            for seed in range(2):
                engine.forward_backward(ragged(seed))
                engine.forward_backward(ragged(seed + 5))
                engine.optimizer_step()
            return dict(engine.named_master_parameters())

    assert_same_tensors(run(3), run(0))


def test_packed_rows_and_frozen_layers():
    steps = [[packed(seed, [[5, 3, 4], [2, 9, 1]]), packed(seed + 3, [[12], [6, 6]])] for seed in range(2)]
    model = build("qwen3", num_hidden_layers=LAYERS)
    frozen = ["model.embed_tokens.*", "model.layers.[01].*"]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(fnmatch(name, pattern) for pattern in frozen))
    assert_trains_the_same(model, steps, memory=MemoryConfig(turn_layers=2), freeze=frozen)
    with pytest.raises(ConfigError, match=r"memory.turn_layers=3: expected null, or 0 to 2"):
        engine_for(model, memory=MemoryConfig(turn_layers=3), freeze=frozen)


def test_dropout_masks_are_those_without_a_turn():
    model = build("gpt2", resid_pdrop=0.2, attn_pdrop=0.0, embd_pdrop=0.1)

    def run(turn_layers):
        with engine_for(model, memory=MemoryConfig(turn_layers=turn_layers)) as engine:
            return [engine.step(ragged(seed)).loss for seed in range(2)], dict(engine.named_master_parameters())

    (losses, weights), (expected, others) = run(2), run(0)
    assert losses == expected
    assert_same_tensors(weights, others)
    assert torch.tensor(losses).isfinite().all()
