"""Gradients and activations that wait on nvme never change a bit, however slow the disk and however small the ring."""

import os
from contextlib import contextmanager

import pytest

from horizon import AdamW, MemoryConfig, TierRule
from horizon.config.schema import Tier
from horizon.errors import NonFiniteError
from horizon.plan.cost import DiskRates
from horizon.plan.disk import BOUNDARY_BUFFERS
from horizon.plan.traffic import least_traffic
from horizon.store import disk, gradients, nvme, offload
from horizon.store.host import HostStore
from horizon.stream.passes import Passes
from tests.covering import pairwise
from tests.parity.reference import (
    LR,
    Resident,
    assert_same,
    assert_same_tensors,
    engine_for,
    outcome,
    plain,
    streamed_step,
)
from tests.parity.undisturbed import DEPTH, SlowFile, assert_alike, deep, steps, undisturbed

HIDDEN, TOKENS = 32, 48  # of two micro-batches of two rows
GRADS = TierRule(state="grads", tier=Tier.nvme)
ACTIVATIONS = TierRule(state="activations", tier=Tier.nvme)
POLICIES = {
    "gradients": {"rules": [GRADS]},
    "some gradients": {"rules": [TierRule(state="grads", blocks="embed,2-3", tier=Tier.nvme)]},
    "activations": {"rules": [ACTIVATIONS]},
    "both": {"rules": [GRADS, ACTIVATIONS]},
    "all": {"policy": "nvme_all"},
}
ENGINES, DTYPE = ["direct", "tensorstore"], ["float32", "bfloat16"]


@contextmanager
def offloading(tied, policy, **settings):
    """An engine whose device has room for no boundary, so that all of them leave it."""
    size = 2 if settings.get("compute_dtype") == "bfloat16" else 4
    with engine_for(deep(tied), **settings) as engine:
        fixed = engine.plan.num_bytes("device")
    budget = f"{fixed + 3 * size * HIDDEN * TOKENS}B"  # entering and leaving a block, and the gradient
    with engine_for(deep(tied), memory=MemoryConfig(device_budget=budget, **policy), **settings) as engine:
        yield engine


def on_nvme(folder, policy, **settings):
    return {"nvme_dir": folder, **POLICIES[policy], **settings}


def assert_nothing_changes(tied, policy, **settings):
    with offloading(tied, {}, **settings) as engine:
        expected = undisturbed(engine)
    with offloading(tied, policy, **settings) as engine:
        assert_alike(undisturbed(engine), expected)


@pairwise(policy=POLICIES, engine=ENGINES, dtype=DTYPE, tied=[False, True])
def test_weights_are_those_that_dram_would_give(policy, engine, dtype, tied, folder):
    assert_nothing_changes(tied, on_nvme(folder, policy, nvme_engine=engine), compute_dtype=dtype)


@pytest.mark.parametrize("policy", ["activations", "all"])
@pytest.mark.parametrize("clip", [{"max_grad_norm": None}, {"clip": "lagged"}], ids=str)
def test_beside_a_ring_of_gradients(policy, clip, folder):
    assert_nothing_changes(True, on_nvme(folder, policy), **clip)


@pytest.mark.parametrize(("policy", "tied"), [("both", False), ("all", True)])
def test_training_equals_the_resident_models(policy, tied, folder):
    """Gradients by name, read while they are on disk, too."""
    resident = Resident(deep(tied))
    with offloading(tied, on_nvme(folder, policy)) as engine:
        for batches in steps():
            assert_same(streamed_step(engine, batches), resident.step(batches))


@pairwise(
    freeze=[["model.embed_tokens.*", "model.layers.[01].*"], ["lm_head.*", "*norm*"]],
    policy=["some gradients", "both"],
    ids=str,
)
def test_beside_frozen_parameters(freeze, policy, folder):
    assert_nothing_changes(False, on_nvme(folder, policy), freeze=freeze)


# ---- several backwards


@pairwise(policy=["both", "some gradients"], tied=[False, True], engine=ENGINES, dtype=DTYPE)
def test_sums_of_several_backwards(policy, tied, engine, dtype, folder):
    found = []
    for memory in ({}, on_nvme(folder, policy, nvme_engine=engine)):
        with offloading(tied, memory, compute_dtype=dtype) as one:
            seen = [one.step(plain(3)).loss]
            for batches in steps()[:3]:
                one.forward_backward(batches)
            seen.append(outcome(one, one.optimizer_step()))
            seen += [one.step(plain(4)).loss, one.evaluate(plain(3))]
            found.append(seen)
    (loss, done, *later), (moved_loss, moved_done, *moved_later) = found
    assert (moved_loss, moved_later) == (loss, later)
    assert_same(moved_done, done)


@pytest.mark.parametrize("clip", [{"max_grad_norm": None}, {"clip": "lagged"}], ids=str)
def test_gradients_that_were_no_sums_before_wait_on_disk_from_the_first_accumulation_on(clip, folder):
    """With lagged clipping they are then updated as they land, in whatever order the disk gives them back."""
    found = []
    for memory in ({}, {"nvme_dir": folder, "policy": "nvme_all"}):
        with engine_for(deep(True), memory=MemoryConfig(**memory), **clip) as engine:
            assert "gradient ring" in [line.purpose for line in engine.plan.lines]
            losses = [engine.step(plain(0)).loss, engine.forward_backward(plain(1)), engine.forward_backward(plain(2))]
            assert bool(engine._runtime.buffers.on_nvme) is bool(memory)
            engine.optimizer_step()
            losses += [engine.step(plain(seed)).loss for seed in range(3)]
            found.append((losses, dict(engine.named_master_parameters())))
    assert found[0][0] == found[1][0]
    assert_same_tensors(found[1][1], found[0][1])


# ---- slow disks and small rings


@pairwise(policy=["both", "all"], tied_ring=[(False, 1), (True, 2), (True, 3)], threads=[1, 3])
def test_with_delays_and_little_staging(policy, tied_ring, threads, folder, monkeypatch):
    tied, ring = tied_ring
    monkeypatch.setattr(nvme, "DirectFile", SlowFile)
    monkeypatch.setattr(gradients, "RING_BUFFERS", ring)
    monkeypatch.setattr(offload, "BOUNDARY_BUFFERS", ring)
    assert_nothing_changes(tied, on_nvme(folder, policy, update_threads=threads), optimizer=AdamW(lr=LR))


def test_a_dropped_step_leaves_nothing_behind(folder):
    """What it has sent to disk is overwritten, though some of it was still on its way."""
    broken = plain(5)

    def infinite(logits, batch):
        return logits.float().sum() * float("inf")

    found = []
    for memory in ({}, on_nvme(folder, "both")):
        with offloading(True, memory, on_nonfinite="skip") as engine:
            losses = [engine.step(plain(0)).loss]
            assert engine.step(broken, infinite).skipped
            losses += [engine.step(batches).loss for batches in steps()]
            found.append((losses, dict(engine.named_master_parameters())))
        with offloading(True, memory) as engine:
            engine.step(plain(0))
            with pytest.raises(NonFiniteError):
                engine.step(broken, infinite)
            found[-1][0].append(engine.step(plain(1)).loss)
    assert found[0][0] == found[1][0]
    assert_same_tensors(found[1][1], found[0][1])


def test_a_step_that_fails_half_way_leaves_nothing_behind(folder, monkeypatch):
    def failing(*args):
        raise RuntimeError("my loss is broken")

    backward = Passes.backward

    def failing_in_the_middle(*args):
        return (failing if args[1][0] == 2 else backward)(*args)

    found = []
    for memory in ({}, on_nvme(folder, "both")):
        with offloading(False, memory) as engine:
            losses = [engine.step(plain(0)).loss]
            with pytest.raises(RuntimeError, match="my loss is broken"):
                engine.step(steps()[0], failing)
            with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="my loss is broken"):
                patch.setattr(Passes, "backward", failing_in_the_middle)
                engine.step(steps()[0])
            losses += [engine.step(batches).loss for batches in steps()]
            found.append((losses, dict(engine.named_master_parameters())))
    assert found[0][0] == found[1][0]
    assert_same_tensors(found[1][1], found[0][1])


# ---- memory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files_and_staging_are_as_large_as_planned(dtype, folder):
    with offloading(True, on_nvme(folder, "both"), compute_dtype=dtype) as engine:
        engine.step(steps()[0])
        buffers, plan = engine._runtime.buffers, engine.plan
        planned = {(line.tier, line.purpose): line.num_bytes for line in (*plan.lines, *plan.activations)}
        boundaries = engine._runtime.planner._activations._file._spill
        for spill, name, size in (
            (buffers._spill, "gradients", "gradients"),
            (boundaries, "offloaded activations", "activations"),
        ):
            found = os.fstat(spill._tier._engine._fd)
            assert found.st_size == planned["nvme", name]
            assert found.st_blocks * 512 >= found.st_size  # taken now, not when it is written
            staged = sum(region.numel() for region in spill._arena.regions)
            assert staged == planned["host", f"nvme staging, {size}"]
        assert ("host", "gradients") not in {key for key, num_bytes in planned.items() if num_bytes}
        assert buffers._in_memory.num_bytes <= 1 << 16
        assert len(boundaries._arena.regions) == BOUNDARY_BUFFERS < 2 * DEPTH


def test_a_store_without_states_on_nvme_has_no_file_there(folder):
    with engine_for(deep(False), memory=MemoryConfig(**on_nvme(folder, "both"))) as engine:
        store = engine._runtime.store
        assert store._nvme is store.pages is store.loads is None and not store.on_nvme


def test_checkpoints_are_made_and_restored_beside_gradients_on_nvme(folder, tmp_path):
    """Under another placement, and in the middle of training."""
    batches = steps()
    with engine_for(deep(True)) as engine:
        losses = [engine.step(step).loss for step in batches]
        weights = dict(engine.named_master_parameters())
    found = []
    with offloading(True, on_nvme(folder, "both")) as engine:
        found += [engine.step(step).loss for step in batches[:2]]
        engine.save_checkpoint(tmp_path / "saved").wait()
        engine.step(batches[0])
        engine.restore(tmp_path / "saved")
        found += [engine.step(step).loss for step in batches[2:]]
        assert found == losses
        assert_same_tensors(dict(engine.named_master_parameters()), weights)


def test_batches_of_other_shapes_have_the_file_made_anew_only_where_they_find_no_room(folder):
    files = []
    with offloading(True, on_nvme(folder, "activations")) as engine, engine_for(deep(True)) as twin:
        for rows in (1, 1, 2, 1):
            batches = [plain(rows), plain(rows + 1, rows=rows)]
            assert engine.step(batches).loss == twin.step(batches).loss
            files.append(engine._runtime.planner._activations._file._spill)
            assert files[-1]._tier._engine._fd >= 0
    assert files[0] is files[1] is not files[2] is files[3]


@pytest.mark.parametrize("policy", ["gradients", "some gradients", "all"])
def test_a_step_moves_the_least_over_the_disk(policy, folder, monkeypatch):
    moved = {"read": 0, "write": 0}

    class CountingFile(disk.DirectFile):
        def read(self, place, offset, into):
            moved["read"] += len(into)
            super().read(place, offset, into)

        def write(self, place, offset, data):
            moved["write"] += len(data)
            super().write(place, offset, data)

    monkeypatch.setattr(nvme, "DirectFile", CountingFile)
    settings = {"memory": MemoryConfig(**on_nvme(folder, policy, weight_slots=2))}
    with engine_for(deep(False), compute_dtype="bfloat16", **settings) as engine:
        engine.step(plain(0))
        engine._runtime.wait_for_updates()
        if engine._runtime.store.pages is not None:
            engine._runtime.store.pages.wait_written()
        moved.update(read=0, write=0)
        engine.step(plain(1))
        engine._runtime.wait_for_updates()
        if engine._runtime.store.pages is not None:
            engine._runtime.store.pages.wait_written()
        least = least_traffic(engine._runtime.needs)
    assert moved["write"] == least["disk", "write"]
    assert moved["read"] == least["disk", "read"]


@pytest.mark.parametrize("policy", ["gradients", "activations", "all"])
def test_a_step_on_a_slow_disk_is_predicted_to_take_what_that_moves(policy, folder, monkeypatch):
    slow = DiskRates(read=2e5, write=1e5)
    monkeypatch.setattr(HostStore, "measure_disk", lambda store: None if store._nvme is None else slow)
    monkeypatch.setattr("horizon.runtime.probe_disk", lambda *arguments: slow)
    with offloading(False, on_nvme(folder, policy)) as engine:
        engine.plan_micro_batch(2, TOKENS // 2)
        said, moves = engine.plan.prediction, least_traffic(engine._runtime.needs)
    written, read = (moves.get(("disk", way), 0) for way in ("write", "read"))
    if policy != "gradients":
        written += DEPTH * -(-4 * HIDDEN * TOKENS // 4096) * 4096  # boundaries, in whole disk blocks
    least = written / slow.write + read / slow.read
    assert said.bound == "disk" and said.seconds >= least * (1 - 1e-9) > 0.1
    assert said.disk_s > 0.9 * (said.seconds - said.arithmetic_s)
