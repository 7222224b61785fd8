"""A disk that fails while gradients and activations wait on it, and settings that could not have them there."""

import errno
import os
import time
from unittest import mock

import pytest
import torch

from horizon import TierRule
from horizon.config.schema import SimulatedCxl, Tier
from horizon.errors import BudgetError, ConfigError, TierError
from horizon.store import disk, gradients, nvme, offload

GRADS, ACTIVATIONS = (TierRule(state=state, tier=Tier.nvme) for state in ("grads", "activations"))
NOTHING_STAYS = 3 * 4 * 32 * 32  # device bytes of the hidden states at work: 32 tokens of 32 fp32 numbers
ENGINES = pytest.mark.parametrize("engine", ["direct", "tensorstore"])


@pytest.fixture
def build_spilling(build, memory, monkeypatch):
    """An engine whose gradients wait on nvme, and whose boundaries all do, with one buffer."""
    monkeypatch.setattr(offload, "BOUNDARY_BUFFERS", 1)

    def build_spilling(rules=(GRADS, ACTIVATIONS), **settings):
        with build() as engine:
            budget = f"{engine.plan.num_bytes('device') + NOTHING_STAYS}B"
        placed = memory(policy="dram", rules=list(rules), device_budget=budget, **settings)
        return build(memory=placed)

    return build_spilling


# ---- before training


@pytest.mark.parametrize(
    ("rule", "settings", "message"),
    [
        (
            {"state": "activations", "tier": Tier.hbm},
            {},
            r"memory.rules\[0\] .*activations that leave the device go to",
        ),
        ({"state": "activations", "tier": Tier.cxl}, {}, "go to dram or nvme .to cxl with memory.policy=cxl_aware"),
        ({"state": "act*", "blocks": "1-2", "tier": Tier.nvme}, {}, "those of all blocks alike.*use blocks=. and tier"),
        (
            {"state": "grads", "tier": Tier.nvme},
            {"max_grad_norm": None},
            r"decides nothing: .*exp_avg_sq, activations \(no grads, which do not wait with this clipping\)",
        ),
        ({"state": "grads", "tier": Tier.nvme}, {"clip": "lagged"}, r"no grads, which do not wait"),
        ({"state": "grads", "tier": Tier.hbm}, {}, "put a part of block embed in hbm, but its weights on dram"),
        ({"state": "grads", "tier": Tier.nvme}, {"clip": "speculative"}, "clip=speculative takes updates back"),
    ],
    ids=str,
)
def test_rules_that_cannot_be_followed(build, fails, memory, rule, settings, message):
    simulated = {"cxl_simulated": SimulatedCxl(size="1GiB")} if rule["tier"] is Tier.cxl else {}
    with fails(ConfigError, message):
        build(memory=memory(policy="dram", rules=[TierRule(**rule)], **simulated), **settings)


def test_a_block_in_hbm_with_its_gradient_elsewhere(build, fails, memory):
    rules = [GRADS, TierRule(blocks="embed", tier=Tier.hbm)]
    with fails(ConfigError, "put a part of block embed in hbm, but its grads on nvme"):
        build(memory=memory(policy="dram", rules=rules))


def test_a_budget_that_is_too_small(build_spilling, fails, tools):
    with fails(
        BudgetError, r"needs .* of nvme space \(gradients .* the smallest memory.nvme_budget that works is 1MiB"
    ):
        build_spilling(nvme_budget="10KiB")
    engine = build_spilling([ACTIVATIONS], nvme_budget="10KiB")
    with fails(BudgetError, r"needs 12 KiB of nvme space \(offloaded activations 12 KiB\) but 10 KiB is allowed"):
        engine.step(tools.make_batch(0))


@ENGINES
def test_a_disk_that_has_filled_up_when_boundaries_need_it(build_spilling, fails, tools, healthy, engine):
    """The engine can go on once there is room."""
    found = build_spilling(nvme_engine=engine)
    with (
        mock.patch("os.posix_fallocate", side_effect=OSError(errno.ENOSPC, "No space left on device")),
        mock.patch("shutil.disk_usage", lambda folder: mock.Mock(free=0)),
        fails(BudgetError, r"memory.nvme_dir=.* has no room for 12 KiB"),
    ):
        found.step(tools.make_batch(0))
    losses, masters = tools.train(found)
    assert losses == healthy[0]
    assert tools.equal(masters, healthy[1])


# ---- in the middle


@pytest.mark.parametrize("call", ["preadv", "pwritev"])
@pytest.mark.parametrize("rule", [GRADS, ACTIVATIONS], ids=["gradients", "activations"])
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("fault", [errno.EIO, errno.ENOSPC, 0], ids=["broken", "full", "short"])
def test_a_broken_disk_stops_the_run_with_its_error(
    build_spilling, fails, tools, break_disk, monkeypatch, call, rule, number, fault
):
    engine = build_spilling([rule])
    engine.step(tools.make_batch(0))
    engine.evaluate(tools.make_batch(0))
    if fault:
        break_disk(call, number, fault)
    else:
        monkeypatch.setattr(os, call, lambda *args: 0)
    doing = {"preadv": "reading", "pwritev": "writing"}[call]
    what = {"grads": "grads", "activations": r"activations\.0"}[rule.state]
    message = rf"{doing} {what} of block \d in memory.nvme_dir=.* failed \(.*\): .* the last checkpoint"
    with fails(TierError, message) as first:
        for seed in range(1, 4):
            engine.step(tools.make_batch(seed))
    with fails(TierError, message) as later:
        engine.step(tools.make_batch(9))
    assert str(later.value) == str(first.value)


def test_an_engine_is_closed_while_gradients_come_back(build_spilling, tools, monkeypatch):
    class SlowFile(disk.DirectFile):
        def read(self, place, offset, into):
            time.sleep(0.05)
            super().read(place, offset, into)

    monkeypatch.setattr(nvme, "DirectFile", SlowFile)
    monkeypatch.setattr(gradients, "RING_BUFFERS", 1)
    engine = build_spilling([GRADS], update_threads=3)
    engine.step(tools.make_batch(0))
    engine.close()


def test_files_that_are_deleted_are_not_taken_for_zeros(build_spilling, fails, tools, tmp_path):
    engine = build_spilling([GRADS], nvme_engine="tensorstore")
    engine.step(tools.make_batch(0))
    engine._runtime.wait_for_updates()
    store = engine._runtime.store
    before = {name: store.read_master(name) for name in store.names()}
    engine.forward_backward(tools.make_batch(1))
    engine._runtime.buffers._spill.begin()
    for path in (tmp_path / "nvme").rglob("c/*"):
        path.unlink()
    with fails(TierError, r"reading grads of block \d in memory.nvme_dir=.* failed"):
        engine.forward_backward(tools.make_batch(2))
    assert all(torch.equal(store.read_master(name), value) for name, value in before.items())
