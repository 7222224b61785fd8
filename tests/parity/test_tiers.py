"""Which tier holds which state never changes a bit, however slow the disk and however little staging there is."""

import os
import time

import pytest
import torch

from horizon import AdamW, MemoryConfig, TierRule
from horizon.config.schema import Tier
from horizon.plan import disk as disk_plan
from horizon.plan import memory as memory_plan
from horizon.store import disk, host
from tests.covering import pairwise
from tests.parity.reference import (
    LR,
    Resident,
    assert_same,
    assert_same_tensors,
    build,
    engine_for,
    outcome,
    plain,
    streamed_step,
)
from tests.parity.undisturbed import DEPTH, SlowFile, assert_alike, deep, steps, undisturbed

POLICIES = {
    "optimizer": {"policy": "nvme_optimizer"},
    "all": {"policy": "nvme_all"},
    "weights alone": {"rules": [TierRule(state="weights", tier=Tier.nvme)]},
    "some of each": {
        "rules": [
            TierRule(state="*", blocks="embed", tier=Tier.nvme),
            TierRule(state="exp_avg_sq*", blocks="2-3", tier=Tier.nvme),
            TierRule(state="weights", blocks="head, layers.2", tier=Tier.nvme),
        ]
    },
}
CLIPS = {
    "exact": {"max_grad_norm": 0.5},
    "lagged": {"max_grad_norm": 0.5, "clip": "lagged"},
    "none": {"max_grad_norm": None},
}


def paged(tied):
    """A model whose embedding and layers have several pages of the smallest size."""
    return build(
        "llama", num_hidden_layers=2, tie_word_embeddings=tied, hidden_size=128, intermediate_size=384, vocab_size=1200
    )


def trained(model, moments="float32", **settings):
    with engine_for(model, optimizer=AdamW(lr=LR, moments=moments), **settings) as engine:
        return undisturbed(engine)


def assert_nothing_changes(model, policy, folder, **settings):
    memory = MemoryConfig(nvme_dir=folder, **policy)
    assert_alike(trained(model, memory=memory, **settings), trained(model, **settings))


@pairwise(
    policy=POLICIES,
    clip=CLIPS,
    moments=["float32", "bfloat16", "int8"],
    dtype=["float32", "bfloat16"],
    tied=[False, True],
)
def test_weights_are_those_that_dram_would_hold(policy, clip, moments, dtype, tied, folder):
    settings = {**CLIPS[clip], "moments": moments, "compute_dtype": dtype}
    assert_nothing_changes(deep(tied), POLICIES[policy], folder, **settings)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_training_equals_the_resident_models(policy, tied, folder):
    resident = Resident(deep(tied))
    with engine_for(deep(tied), memory=MemoryConfig(nvme_dir=folder, **POLICIES[policy])) as engine:
        for batches in steps():
            assert_same(streamed_step(engine, batches), resident.step(batches))


@pytest.mark.parametrize(
    ("slots", "freeze"),
    [(1, []), (2, ["model.embed_tokens.*", "model.layers.1.*"]), (3, ["*norm*", "lm_head.*"]), (5, [])],
    ids=str,
)
def test_beside_other_slots_and_frozen_parameters(slots, freeze, folder):
    policy = {**POLICIES["all"], "weight_slots": slots}
    assert_nothing_changes(deep(False), policy, folder, freeze=freeze)


@pytest.mark.parametrize("policy", ["all", "some of each"])
def test_the_portable_engine(policy, folder):
    assert_nothing_changes(paged(True), {**POLICIES[policy], "nvme_engine": "tensorstore"}, folder, moments="int8")


# ---- slow disks and little staging


@pytest.fixture
def little_staging(monkeypatch):
    for module in (disk_plan, host, memory_plan):
        monkeypatch.setattr(module, "UPDATE_PAGES", 1)
        monkeypatch.setattr(module, "LOAD_BUFFERS", 1)


@pytest.fixture
def small_pages(monkeypatch):
    """The smallest pages of whole disk blocks."""
    from horizon.optim import chunks, updater

    for module in (disk_plan, chunks, updater):
        monkeypatch.setattr(module, "PAGE_ELEMENTS", 1 << 16)


@pairwise(policy=["optimizer", "all"], clip=CLIPS, threads=[1, 3])
def test_with_delays_and_little_staging(policy, clip, threads, folder, little_staging, small_pages, monkeypatch):
    from horizon.store import nvme

    monkeypatch.setattr(nvme, "DirectFile", SlowFile)
    moments = {1: "float32", 3: "int8"}[threads]
    policy = {**POLICIES[policy], "update_threads": threads}
    assert_nothing_changes(paged(True), policy, folder, moments=moments, **CLIPS[clip])


# ---- what is not a step


@pytest.mark.parametrize(("policy", "dtype"), [("all", "bfloat16"), ("some of each", "float32")])
def test_evaluation_accumulation_and_export(policy, dtype, folder, tmp_path):
    found = []
    for name, memory in (("dram", {}), ("nvme", {"nvme_dir": folder, **POLICIES[policy]})):
        with engine_for(deep(True), memory=MemoryConfig(**memory), compute_dtype=dtype) as engine:
            seen = [engine.evaluate(plain(3))]
            engine.step(plain(3))
            seen.append(engine.next_token_logits({"input_ids": plain(3)["input_ids"]}).sum().item())
            for batch in steps()[:2]:
                engine.forward_backward(batch)
            done = outcome(engine, engine.optimizer_step())
            engine.save_pretrained(tmp_path / name)
            found.append((seen, engine.evaluate(plain(3)), done))
    (seen, after, done), (moved_seen, moved_after, moved_done) = found
    assert (moved_seen, moved_after) == (seen, after)
    assert_same(moved_done, done)
    file = "model.safetensors"
    assert (tmp_path / "dram" / file).read_bytes() == (tmp_path / "nvme" / file).read_bytes()


def test_states_are_read_and_written_wherever_they_are(folder):
    with engine_for(deep(False), memory=MemoryConfig(nvme_dir=folder, policy="nvme_all")) as engine:
        engine.step(plain(0))
        engine._runtime.wait_for_updates()
        store = engine._runtime.store
        with engine_for(deep(False)) as twin:
            twin.step(plain(0))
            twin._runtime.wait_for_updates()
            for block in range(DEPTH + 2):
                for name, expected in twin._runtime.store.states(block).items():
                    assert torch.equal(store.read_state(name, block), expected), (name, block)
                    assert torch.equal(twin._runtime.store.read_state(name, block), expected)
                    store.write_state(name, block, torch.ones_like(expected))
                    assert (store.read_state(name, block) == 1).all()


def test_masters_are_read_when_their_residual_is_on_disk(folder, monkeypatch):
    """The weights are published before the residual, which no load reads, is written."""
    from horizon.store import nvme

    class SlowToWrite(disk.DirectFile):
        def write(self, place, offset, data):
            time.sleep(0.05)
            super().write(place, offset, data)

    memory = MemoryConfig(nvme_dir=folder, policy="nvme_optimizer")
    found = []
    for slow in (False, True):
        monkeypatch.setattr(nvme, "DirectFile", SlowToWrite if slow else disk.DirectFile)
        with engine_for(deep(False), memory=memory, compute_dtype="bfloat16") as engine:
            engine.step(plain(0))
            found.append(dict(engine.named_master_parameters()))
    assert_same_tensors(found[1], found[0])


# ---- where states go


def bytes_on(store, tier):
    """Bytes of all states that are on a tier of the host."""
    sizes = {place: kind.num_bytes(store.layouts[place[1]]) for place, kind in _places(store)}
    return sum(size for place, size in sizes.items() if (place in store.on_nvme) is (tier is Tier.nvme))


def _places(store):
    return [((name, lay.index), kind) for name, kind in store._kinds.items() for lay in store.layouts]


@pytest.mark.parametrize("share", [0.9, 0.5, 0.1])
def test_auto_moves_to_nvme_what_dram_does_not_hold(share, folder, little_staging, small_pages, monkeypatch):
    monkeypatch.setattr("horizon.runtime.host_overhead", lambda device: 0)
    with engine_for(paged(False), optimizer=AdamW(lr=LR), memory=MemoryConfig(policy="nvme_all", nvme_dir=folder)) as e:
        least = e.plan.num_bytes("host")
    with engine_for(paged(False), optimizer=AdamW(lr=LR), memory=MemoryConfig(nvme_dir=folder)) as e:
        whole = e.plan.num_bytes("host")
        assert e.plan.num_bytes("nvme") == 0 and "nvme" not in e.plan.table()
        expected = [e.step(batches).loss for batches in steps()]
        weights = dict(e.named_master_parameters())
    assert least < whole
    memory = MemoryConfig(nvme_dir=folder, host_budget=str(int(least + share * (whole - least))))
    with engine_for(paged(False), optimizer=AdamW(lr=LR), memory=memory) as e:
        store = e._runtime.store
        assert e.plan.num_bytes("host") <= e.plan.limits.host
        assert 0 < bytes_on(store, Tier.nvme) <= e.plan.num_bytes("nvme")
        held = [tensor.nbytes for lay in store.layouts for tensor in store.states(lay.index).values()]
        assert bytes_on(store, Tier.dram) == sum(held) <= sum(store.num_bytes.values())
        assert [e.step(batches).loss for batches in steps()] == expected
        assert_same_tensors(dict(e.named_master_parameters()), weights)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_file_and_the_staging_are_as_large_as_planned(policy, folder):
    with engine_for(paged(True), memory=MemoryConfig(nvme_dir=folder, **POLICIES[policy])) as engine:
        store, plan = engine._runtime.store, engine.plan
        found = os.fstat(store._nvme._engine._fd)
        gradients = sum(line.num_bytes for line in plan.lines if (line.tier, line.purpose) == ("nvme", "gradients"))
        assert found.st_size == plan.num_bytes("nvme") - gradients  # which have a file of their own
        assert abs(found.st_blocks * 512 - found.st_size) <= 1 << 16  # taken now, not when it is written
        planned = {line.purpose: line.num_bytes for line in plan.lines}
        for part, purpose in ((store.pages, "nvme staging, updates"), (store.loads, "nvme staging, loads")):
            held = 0 if part is None else sum(region.numel() for region in part._arena.regions)
            assert held == planned[purpose], purpose


def test_blocks_in_hbm_beside_states_on_nvme(folder):
    """Rules that name a block's tier decide for good: nothing moves, whatever activations need."""
    rules = [TierRule(blocks="embed,layers.0", tier=Tier.hbm), TierRule(blocks="layers.2", tier=Tier.nvme)]
    for dtype in ("float32", "bfloat16"):
        assert_nothing_changes(deep(False), {"rules": rules}, folder, compute_dtype=dtype)
    with engine_for(deep(False), memory=MemoryConfig(nvme_dir=folder, rules=rules)) as engine:
        engine.plan_micro_batch(2, 12)
        assert engine._runtime.store.in_hbm == {0, 1}
