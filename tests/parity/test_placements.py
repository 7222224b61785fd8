"""Where the states of blocks live, on the host or in HBM (here: another part of memory), never changes a bit."""

import time
from dataclasses import replace

import pytest
import torch

from horizon import MemoryConfig
from horizon.errors import NonFiniteError
from horizon.optim import updater
from tests.covering import pairwise
from tests.parity.reference import (
    Resident,
    assert_same,
    assert_same_tensors,
    build,
    engine_for,
    outcome,
    plain,
    streamed_step,
)
from tests.parity.undisturbed import DEPTH, assert_alike, deep, steps, undisturbed

ALL = DEPTH + 2
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
CLIP = [0.5, None]  # gradients are kept, or go through a ring
DTYPE = ["float32", "bfloat16"]
FREEZE = {
    "embedding": ["model.embed_tokens.*"],
    "a middle layer": ["model.layers.2.*"],
    "norms": ["*norm*"],
    "all but the embedding": ["model.layers.*", "model.norm.*", "lm_head.*"],
    "all but the last layer": ["model.embed_tokens.*", "model.layers.[012].*", "model.norm.*", "lm_head.*"],
}


def in_hbm(num_blocks, **settings):
    return MemoryConfig(policy="hbm_first", hbm_blocks=num_blocks, **settings)


def trained(model, num_blocks, memory=None, **settings):
    with engine_for(model, memory=memory or in_hbm(num_blocks), **settings) as engine:
        assert len(engine._runtime.store.in_hbm) == num_blocks
        return undisturbed(engine)


def assert_nothing_changes(model, num_blocks, memory=None, **settings):
    assert_alike(trained(model, num_blocks, memory, **settings), trained(model, 0, **settings))


@pytest.mark.parametrize(("tied", "num_blocks"), [(False, 1), (True, 2), (True, ALL - 1), (False, ALL)])
def test_training_equals_the_resident_models(tied, num_blocks):
    resident = Resident(deep(tied))
    with engine_for(deep(tied), memory=in_hbm(num_blocks)) as engine:
        for batches in steps():
            assert_same(streamed_step(engine, batches), resident.step(batches))


@pairwise(num_blocks=[1, 2, ALL - 1, ALL], tied=[False, True], clip=CLIP, dtype=DTYPE)
def test_weights_are_those_that_the_host_would_hold(tied, num_blocks, clip, dtype):
    assert_nothing_changes(deep(tied), num_blocks, max_grad_norm=clip, compute_dtype=dtype)


@pairwise(
    settings=[
        {"recompute": "none"},
        {"recompute": "selective", "weight_slots": 1},
        {"weight_slots": 3, "update_threads": 1},
    ],
    num_blocks=[2, ALL],
    tied=[False, True],
    dtype=DTYPE,
    ids=str,
)
def test_beside_other_settings_of_memory(settings, num_blocks, tied, dtype):
    assert_nothing_changes(deep(tied), num_blocks, in_hbm(num_blocks, **settings), compute_dtype=dtype)


@pairwise(what=FREEZE, num_blocks=[2, ALL], clip=CLIP)
def test_frozen_blocks_on_either_tier(what, num_blocks, clip):
    tied = what == "norms"
    assert_nothing_changes(deep(tied), num_blocks, max_grad_norm=clip, freeze=FREEZE[what])


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gemma2"])
def test_other_architectures(family):
    """Biases and tables of positions, experts that no token reaches, several norms; dropout in the first."""
    changes = {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1} if family == "gpt2" else {}
    for num_blocks in (1, 4):
        assert_nothing_changes(build(family, **changes), num_blocks)


# ---- accumulation


@pairwise(tied=[False, True], num_blocks=[2, ALL], dtype=DTYPE)
def test_accumulated_gradients(tied, num_blocks, dtype):
    outcomes = []
    for num in (0, num_blocks):
        with engine_for(deep(tied), memory=in_hbm(num), compute_dtype=dtype, max_grad_norm=None) as engine:
            engine.step(plain(5))  # through the ring, which then gives way
            for batches in steps()[:3]:
                engine.forward_backward(batches)
            outcomes.append(outcome(engine, engine.optimizer_step()))
            engine.step(plain(6))
            outcomes.append(outcome(engine, engine.step(plain(8))))
    assert_same(outcomes[2], outcomes[0])
    assert_same(outcomes[3], outcomes[1])


# ---- what is not a step


@pairwise(tied=[False, True], num_blocks=[2, ALL], dtype=DTYPE)
def test_evaluation_and_export_see_the_updated_weights(tied, num_blocks, dtype, tmp_path):
    found = []
    for num in (0, num_blocks):
        with engine_for(deep(tied), memory=in_hbm(num), compute_dtype=dtype) as engine:
            before = engine.evaluate(plain(3))
            engine.step(plain(3))
            logits = engine.next_token_logits({"input_ids": plain(3)["input_ids"]})
            engine.save_pretrained(tmp_path / str(num))
            found.append((before, engine.evaluate(plain(3)), logits))
    (before, after, logits), (moved_before, moved_after, moved_logits) = found
    assert (moved_before, moved_after) == (before, after) and after != before
    assert torch.equal(logits, moved_logits)
    name = "model.safetensors"
    assert (tmp_path / "0" / name).read_bytes() == (tmp_path / str(num_blocks) / name).read_bytes()


@pairwise(num_blocks=[2, ALL], clip=CLIP)
def test_a_step_that_is_not_finite_moves_nothing(num_blocks, clip):
    def broken(logits, batch):
        return logits.sum() * float("nan")

    with engine_for(deep(True), memory=in_hbm(num_blocks), max_grad_norm=clip) as engine:
        engine.step(plain(0))
        before = dict(engine.named_master_parameters())
        with pytest.raises(NonFiniteError):
            engine.step(plain(1), loss_fn=broken)
        assert_same_tensors(dict(engine.named_master_parameters()), before)
        engine.step(plain(2))
        twin = Resident(deep(True), max_grad_norm=clip or 1e9)
        twin.step([plain(0)])
        assert_same_tensors(dict(engine.named_master_parameters()), twin.step([plain(2)]).weights)


# ---- blocks that move


def needed(tied, num_blocks, tokens, **settings):
    """A device budget for steps of so many tokens with exactly so many blocks in HBM."""
    with engine_for(deep(tied), memory=in_hbm(num_blocks), **settings) as engine:
        engine.plan_micro_batch(tokens // 12, 12)
        return engine.plan.num_bytes("device")


@TIED
@pytest.mark.parametrize("policy", ["hbm_first", "dram"])
def test_blocks_move_to_hbm_as_far_as_activations_leave_room(tied, policy):
    resident, num_blocks = Resident(deep(tied)), 3
    budget = needed(tied, num_blocks, tokens=24)
    memory = MemoryConfig(policy=policy, device_budget=f"{budget}B")
    with engine_for(deep(tied), memory=memory) as engine:
        assert_same(streamed_step(engine, [plain(0)]), resident.step([plain(0)]))
        assert not engine._runtime.store.in_hbm  # the shape of later steps is not known
        engine.plan_micro_batch(2, 12)
        assert len(engine._runtime.store.in_hbm) == (num_blocks if policy == "hbm_first" else 0)
        assert engine.plan.num_bytes("device") <= budget
        for seed in (1, 2):
            assert_same(streamed_step(engine, [plain(seed)]), resident.step([plain(seed)]))


@pairwise(tied=[False, True], clip=CLIP)
def test_a_larger_batch_sends_blocks_back_to_the_host(tied, clip):
    memory = MemoryConfig(policy="hbm_first", device_budget=f"{needed(tied, 3, tokens=24, max_grad_norm=clip)}B")
    batches = [plain(0), plain(1, rows=9), plain(2), plain(3, rows=9)]
    with engine_for(deep(tied), max_grad_norm=clip) as engine:
        expected = [engine.step(batch).loss for batch in batches]
        weights = dict(engine.named_master_parameters())
    with engine_for(deep(tied), memory=memory, max_grad_norm=clip) as engine:
        engine.plan_micro_batch(2, 12)
        placed, found = [], []
        for batch in batches:
            found.append(engine.step(batch).loss)
            placed.append(len(engine._runtime.store.in_hbm))
            assert engine.plan.num_bytes("device") <= engine.plan.limits.device
        assert placed[0] > placed[1] == placed[2] == placed[3]
        assert found == expected
        assert_same_tensors(dict(engine.named_master_parameters()), weights)


@pairwise(tied=[False, True], clip=CLIP)
def test_blocks_do_not_move_while_their_update_is_under_way(tied, clip, monkeypatch):
    update = updater.load_update()

    def slow(*arguments):
        time.sleep(0.01)
        update(*arguments)

    expected, weights = trained(deep(tied), 0, max_grad_norm=clip)
    monkeypatch.setattr(updater, "load_update", lambda *_: slow)
    with engine_for(deep(tied), memory=MemoryConfig(policy="hbm_first"), max_grad_norm=clip) as engine:
        runtime, found = engine._runtime, []
        for batches, in_hbm in zip(steps(), ({0, 1}, {5}, set(), {0}), strict=True):
            found.append(engine.step(batches))
            runtime.rearrange(replace(runtime.needs, in_hbm=frozenset(in_hbm if not tied else in_hbm - {5})))
        assert [(r.loss, r.grad_norm) for r in found] == expected
        assert_same_tensors(dict(engine.named_master_parameters()), weights)


@TIED
def test_boundaries_on_the_host_beside_blocks_in_hbm(tied):
    """They borrow the gradient buffers of blocks on the host only."""
    batches = [plain(seed, rows=3, tokens=60) for seed in range(3)]
    found = []
    for num_blocks in (0, 3):
        with engine_for(deep(tied), memory=in_hbm(num_blocks)) as engine:
            boundary = 4 * 32 * 180  # fp32, hidden size 32, 180 tokens
            budget = engine.plan.num_bytes("device") + 4 * boundary
        with engine_for(deep(tied), memory=in_hbm(num_blocks, device_budget=f"{budget}B")) as engine:
            found.append([outcome(engine, engine.step(batch)) for batch in batches])
            assert "boundaries of 1 blocks" in [line.purpose for line in engine.plan.activations]
            runtime = engine._runtime
            idle = runtime.planner.idle_bytes(runtime.needs, borrow=True)
            assert [idle[b] for b in runtime.store.in_hbm] == [0] * num_blocks
            assert any(idle)
    for one, other in zip(*found, strict=True):
        assert_same(other, one)


@TIED
def test_gradients_that_wait_move_with_their_block(tied):
    memory = MemoryConfig(policy="hbm_first", device_budget=f"{2 * needed(tied, 3, tokens=24)}B")
    batches = [plain(0), plain(1, rows=40), plain(2)]
    outcomes = []
    for settings in ({}, {"memory": memory}):
        with engine_for(deep(tied), **settings) as engine:
            engine.plan_micro_batch(2, 12)
            placed = []
            for batch in batches:
                engine.forward_backward(batch)
                placed.append(len(engine._runtime.store.in_hbm))
            outcomes.append(outcome(engine, engine.optimizer_step()))
    assert placed[0] > placed[1] == placed[2]
    assert_same(outcomes[1], outcomes[0])
