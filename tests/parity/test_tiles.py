"""Long micro-batches: the MLP in tiles of tokens gives what it gives at once."""

import pytest
import torch

from horizon import AdamW, MemoryConfig
from horizon.models import tiles
from horizon.models.blocks import BlockModel
from tests.parity.reference import (
    Resident,
    assert_close_tensors,
    build,
    engine_for,
    padded,
    plain,
)

TILED = ["llama", "qwen2", "qwen3", "gemma2", "phi3", "gpt_neox"]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 5)


@pytest.mark.parametrize("family", TILED)
@pytest.mark.parametrize("recompute", ["full", "selective", "none"])
def test_gradients_are_those_of_the_resident_model(family, recompute):
    """Up to the order in which tokens are summed."""
    model = build(family)
    assert all(tiles.find_mlp(layer) for layer in BlockModel(model).structure.layers)
    with engine_for(model, optimizer=AdamW(lr=0.0), memory=MemoryConfig(recompute=recompute)) as engine:
        for seed in range(2):  # the first step learns what the second leaves out
            batches, resident = [plain(seed), padded(seed, [12, 7])], Resident(model)
            expected = resident.backward(batches)
            assert engine.step(batches).loss == pytest.approx(float(expected), rel=1e-6)
            assert_close_tensors(dict(engine.named_gradients()), resident.gradients(), 2e-5)


def test_tiles_cover_every_token_once():
    assert [(t.start, t.stop) for t in tiles.tiles(12)] == [(0, 5), (5, 10), (10, 12)]


def test_an_mlp_that_is_the_layers_end_runs_once_in_a_recomputation(monkeypatch):
    model = build("llama")
    products = []
    linear = torch.nn.functional.linear
    with engine_for(model) as engine:
        engine.step([plain(0)])
        monkeypatch.setattr(
            torch.nn.functional, "linear", lambda x, w, b=None: products.append(tuple(w.shape)) or linear(x, w, b)
        )
        engine.step([plain(1)])
    hidden, inner = model.config.hidden_size, model.config.intermediate_size
    layers, rows = model.config.num_hidden_layers, len(tiles.tiles(plain(0)["input_ids"].numel()))
    assert products.count((inner, hidden)) == 2 * layers * 2 * rows  # gate and up: forward and once more
    assert products.count((hidden, inner)) == layers * rows  # down: forward only
