"""A disk that is full, broken or gone: the first error stops the run and says what is lost; nothing hangs."""

import errno
import shutil
from unittest import mock

import pytest

from horizon import TierRule
from horizon.config.schema import Tier
from horizon.errors import BudgetError, ConfigError, TierError

# ---- before training


def test_no_room_on_the_disk(build, fails, memory):
    with (
        mock.patch("os.posix_fallocate", side_effect=OSError(errno.ENOSPC, "No space left on device")),
        fails(BudgetError, r"memory.nvme_dir=.*nvme has no room for .* of states \(No space left on device\)"),
    ):
        build(memory=memory())


def test_a_budget_that_is_too_small(build, fails, memory):
    with fails(BudgetError, r"needs .* of nvme space \(weights .* the smallest memory.nvme_budget that works is 1MiB"):
        build(memory=memory(nvme_budget="100KiB"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nvme_dir": None}, "memory.policy=nvme_all needs a folder on a local disk; set memory.nvme_dir"),
        ({"nvme_dir": "/nowhere/at/all"}, "memory.nvme_dir=/nowhere/at/all is not a folder that can be written to"),
        ({"policy": "auto", "nvme_dir": None, "nvme_budget": "1GiB"}, "nvme_budget=1GiB without memory.nvme_dir"),
        ({"nvme_engine": "fast"}, "memory.nvme_engine='fast': expected one of"),
        ({"hbm_blocks": 2}, "memory.hbm_blocks=2 with memory.policy=nvme_all, which has none there"),
        ({"policy": "dram", "rules": ["weights"]}, r"memory.rules\[0\]='weights': expected a horizon.TierRule"),
        ({"rules": [TierRule(tier="disk")]}, r"memory.rules\[0\].tier='disk': expected one of hbm, dram, cxl, nvme"),
        (
            {"policy": "auto", "nvme_dir": None, "rules": [TierRule(tier=Tier.nvme)]},
            "tier=nvme in memory.rules needs a folder",
        ),
        ({"policy": "hbm_first", "rules": [TierRule()]}, "memory.rules with memory.policy=hbm_first"),
        (
            {"rules": [TierRule(state="exp_avg*"), TierRule(state="exp_avg", tier=Tier.nvme)]},
            r"memory.rules\[1\] \(state=exp_avg, blocks=\*, tier=nvme\) decides nothing",
        ),
        (
            {"rules": [TierRule(state="momentum", tier=Tier.nvme)]},
            r"memory.rules\[0\] .* states are weights, residual,",
        ),
        ({"rules": [TierRule(blocks="9-12", tier=Tier.nvme)]}, r"blocks 0 to 4 or embed, layers.0, ..., head"),
        (
            {"rules": [TierRule(state="weights", blocks="1", tier=Tier.hbm)]},
            "put a part of block layers.0 in hbm, but its residual on nvme; hbm holds all states of a block or none",
        ),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other(build, fails, memory, settings, message):
    with fails(ConfigError, message):
        build(memory=memory(**settings))


def test_a_tied_head_in_hbm_without_its_embedding(build, fails, tools, memory):
    rules = [TierRule(blocks="head", tier=Tier.hbm)]
    with fails(ConfigError, "put block head in hbm without block 0, whose model.embed_tokens.weight it shares"):
        build({**tools.LLAMA, "tie_word_embeddings": True}, memory=memory(policy="dram", rules=rules))


def test_speculation_would_cross_the_disk_twice(build, fails, memory):
    with fails(
        ConfigError, "clip=speculative takes updates back, which would bring states on nvme over the disk twice"
    ):
        build(memory=memory(policy="nvme_optimizer"), clip="speculative")


# ---- in the middle


CLIPS = {"exact": {}, "none": {"max_grad_norm": None}, "lagged": {"clip": "lagged"}}


@pytest.mark.parametrize("call", ["preadv", "pwritev"])
@pytest.mark.parametrize("policy", ["nvme_optimizer", "nvme_all"])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("number", [1, 9])
def test_a_broken_disk_stops_the_run_with_its_error(
    build, fails, tools, memory, break_disk, call, policy, clip, number
):
    engine = build(memory=memory(policy=policy), **CLIPS[clip])
    engine.step(tools.make_batch(0))
    engine.evaluate(tools.make_batch(0))
    break_disk(call, number)
    doing = {"preadv": "reading", "pwritev": "writing"}[call]
    message = rf"{doing} \w+ of block \d in memory.nvme_dir=.* failed \(Input/output error\): .* the last checkpoint"
    with fails(TierError, message) as first:
        for seed in range(1, 5):
            engine.step(tools.make_batch(seed))
    for again in (lambda: engine.step(tools.make_batch(9)), lambda: engine.evaluate(tools.make_batch(9))):
        with fails(TierError, message) as later:
            again()
        assert str(later.value) == str(first.value)


def test_weights_are_not_saved_after_the_disk_broke(build, fails, tools, memory, break_disk, tmp_path):
    engine = build(memory=memory())
    engine.step(tools.make_batch(0))
    engine._runtime.wait_for_updates()
    break_disk("preadv", 1)
    with fails(TierError, "reading .* failed"):
        engine.save_pretrained(tmp_path / "model")


def test_a_disk_that_fills_up_behind_the_page_cache(build, fails, tools, memory, break_disk):
    engine = build(memory=memory())
    break_disk("pwritev", 3, errno.ENOSPC)
    with fails(TierError, r"writing \w+ of block \d .* failed \(No space left on device\)"):
        for seed in range(3):
            engine.step(tools.make_batch(seed))


def test_a_folder_that_is_deleted_takes_nothing_along(build, tools, healthy, memory):
    engine = build(memory=memory())
    shutil.rmtree(memory().nvme_dir)
    losses, masters = tools.train(engine)
    assert losses == healthy[0]
    assert tools.equal(masters, healthy[1])


def test_the_disk_breaks_while_weights_are_loaded_at_first(build, fails, memory, break_disk):
    break_disk("pwritev", 5)
    with fails(TierError, r"writing \w+ of block \d .* failed"):
        build(memory=memory())
