"""A model with a LoRA adapter trains as in memory, bit for bit: the adapter alone, whatever is kept or recomputed."""

import pytest
import torch

import horizon
from tests.parity.adapters import TARGETS, adapted
from tests.parity.reference import (
    Resident,
    assert_same,
    assert_same_tensors,
    assert_trains_the_same,
    engine_for,
    padded,
    plain,
    streamed_step,
)

STEPS = [[padded(seed, [12, 7]), plain(seed + 10)] for seed in range(2)]


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("recompute", ["full", "selective", "none"])
def test_every_step_is_that_of_the_resident_model(family, recompute):
    model = adapted(family, {"tie_word_embeddings": recompute == "full"})
    memory = horizon.MemoryConfig(recompute=recompute)
    before = {n: p.detach().clone() for n, p in model.get_base_model().named_parameters()}
    outcomes = assert_trains_the_same(model.get_base_model(), STEPS, memory=memory)
    trained = {name for name in before if "lora_" in name}
    assert trained and set(outcomes[-1].gradients) == trained
    assert_same_tensors(
        {n: w for n, w in outcomes[-1].weights.items() if n not in trained},
        {n: w for n, w in before.items() if n not in trained},
    )
    assert all(not torch.equal(outcomes[-1].weights[name], before[name]) for name in trained)


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_can_be_adapted(tied):
    model = adapted(base={"tie_word_embeddings": tied}, target_modules=["lm_head", "up_proj"])
    gradients = assert_trains_the_same(model.get_base_model(), STEPS)[0].gradients
    assert "lm_head.lora_A.default.weight" in gradients


def test_dropout_of_the_adapter_is_that_of_the_resident_model():
    model = adapted(lora_dropout=0.5).get_base_model()
    resident = Resident(model)
    with engine_for(model, seed=7) as engine:
        for number, batches in enumerate(STEPS, start=1):
            assert_same(streamed_step(engine, batches), resident.step(batches, 7 * 1_000_003 + number))


def test_the_frozen_base_has_neither_moments_nor_gradients():
    model = adapted()
    with engine_for(model) as engine:
        engine.step(plain(0))
        layouts, store = engine._runtime.model.layouts, engine._runtime.store
        trained = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
        prefixes = sum(layout.num_trainable for layout in layouts)
        padding = sum(64 * len(layout.trainable) + 2048 for layout in layouts)
        assert trained <= prefixes <= trained + padding
        lines = {line.purpose: line.num_bytes for line in engine.plan.lines if line.tier == "host"}
        assert lines["exp_avg, exp_avg_sq (fp32)"] == 8 * prefixes
        assert lines["gradients"] == 4 * prefixes
        slots = {line.purpose: line.num_bytes for line in engine.plan.lines if line.tier == "device"}
        assert slots["gradient slots"] == 2 * 4 * max(layout.num_trainable for layout in layouts)
        assert all(store.states(lay.index)["exp_avg"].numel() == lay.num_trainable for lay in layouts)
