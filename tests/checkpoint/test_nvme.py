"""States on nvme are saved and restored like those in dram, while updates overwrite them, whatever the disk's pace."""

import threading
import time
from contextlib import closing

import pytest
import torch

import horizon
from horizon import MemoryConfig, TierRule
from horizon.checkpoint.format import list_arrays
from horizon.checkpoint.reader import Checkpoint
from horizon.checkpoint.saves import saving_bytes
from horizon.checkpoint.snapshot import Snapshot, StateReader
from horizon.config.schema import Moments, Tier
from horizon.layout import ParamSpec, place_block
from horizon.plan import disk as disk_plan
from horizon.store import disk, nvme
from horizon.store.host import HostStore
from horizon.stream.streams import Streams
from tests.checkpoint.engines import LLAMA, build, equal, load, states, train

POLICIES = {
    "all": {"policy": "nvme_all"},
    "optimizer": {"policy": "nvme_optimizer"},
    "weights alone": {"rules": [TierRule(state="weights", tier=Tier.nvme)]},
    "some blocks": {"rules": [TierRule(state="*", blocks="embed, layers.1", tier=Tier.nvme)]},
    "beside hbm": {
        "rules": [TierRule(blocks="embed, layers.0", tier=Tier.hbm), TierRule(blocks="layers.2", tier=Tier.nvme)]
    },
}
CLIPS = {
    "exact": {"max_grad_norm": 0.5},
    "lagged": {"max_grad_norm": 0.5, "clip": "lagged"},
    "none": {"max_grad_norm": None},
}
ADAMW = horizon.AdamW(lr=1e-2)
LARGER = {**LLAMA, "hidden_size": 128, "intermediate_size": 384, "vocab_size": 1200}  # several pages a block


@pytest.fixture
def on_nvme(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("nvme"))
    return lambda policy, **settings: MemoryConfig(nvme_dir=folder, **POLICIES[policy], **settings)


@pytest.fixture
def small_pages(monkeypatch):
    """The smallest pages of whole disk blocks."""
    from horizon.optim import chunks, updater

    for module in (disk_plan, chunks, updater):
        monkeypatch.setattr(module, "PAGE_ELEMENTS", 1 << 16)


class SlowToWrite(disk.DirectFile):
    def write(self, place, offset, data):
        time.sleep(0.005)
        super().write(place, offset, data)


@pytest.fixture(scope="module")
def in_dram(tmp_path_factory):
    """(settings) -> folder of a checkpoint of step 3, what the steps to the 6th say, states after the 3rd and 6th."""
    made = {}

    def run(model=LLAMA, **settings):
        key = repr((model, settings))
        if key not in made:
            folder = tmp_path_factory.mktemp("dram") / "saved"
            with build(model, **settings) as engine:
                train(engine, 1, 3)
                engine.save_checkpoint(folder).wait()
                saved, results = states(engine), train(engine, 4, 6)
                made[key] = folder, results, saved, states(engine)
        return made[key]

    return run


def assert_arrays_are(folder, expected):
    one, other = Checkpoint(folder), Checkpoint(expected)
    assert [s for s in one.manifest.arrays if s not in other.manifest.arrays] == []
    for spec in other.manifest.arrays:
        assert torch.equal(one.read(spec.name, spec.kind), other.read(spec.name, spec.kind)), (spec.name, spec.kind)


@pytest.mark.parametrize(
    ("policy", "clip"),
    [
        ("all", "exact"),
        ("optimizer", "none"),
        ("weights alone", "lagged"),
        ("some blocks", "exact"),
        ("beside hbm", "none"),
    ],
)
def test_from_dram_to_nvme_and_back_bit_for_bit(policy, clip, on_nvme, in_dram, tmp_path):
    settings = {"optimizer": ADAMW, **CLIPS[clip]}
    folder, results, saved, final = in_dram(**settings)
    with load(folder, memory=on_nvme(policy), **settings) as engine:
        assert engine.num_steps == 3
        assert equal(states(engine), saved)
        save = engine.save_checkpoint(tmp_path / "moved")
        assert train(engine, 4, 6) == results  # while it is written
        save.wait()
        assert equal(states(engine), final)
    assert_arrays_are(tmp_path / "moved", folder)
    with load(tmp_path / "moved", **settings) as engine:
        assert train(engine, 4, 6) == results
        assert equal(states(engine), final)


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
@pytest.mark.parametrize("engine_name", ["direct", "tensorstore"])
def test_either_engine_and_any_moments(moments, engine_name, on_nvme, in_dram, tmp_path):
    settings = {"optimizer": horizon.AdamW(lr=1e-2, moments=moments)}
    folder, results, _, final = in_dram(**settings)
    with load(folder, memory=on_nvme("all", nvme_engine=engine_name), **settings) as engine:
        save = engine.save_checkpoint(tmp_path / "moved")
        assert train(engine, 4, 6) == results
        save.wait()
        assert equal(states(engine), final)
    assert_arrays_are(tmp_path / "moved", folder)


@pytest.mark.parametrize(("policy", "clip"), [("all", "exact"), ("optimizer", "none")])
def test_a_save_right_behind_a_step_holds_that_step_whatever_the_disk_does(
    policy, clip, on_nvme, in_dram, small_pages, monkeypatch, tmp_path
):
    settings = {"optimizer": ADAMW, "compute_dtype": "bfloat16", **CLIPS[clip]}
    expected, results, _, final = in_dram(LARGER, **settings)
    monkeypatch.setattr(nvme, "DirectFile", SlowToWrite)
    memory = on_nvme(policy, update_threads=2)
    with build(LARGER, memory=memory, **settings) as engine:
        engine.plan_checkpoints("auto")
        train(engine, 1, 3)
        save = engine.save_checkpoint(tmp_path / "saved")
        assert train(engine, 4, 6) == results
        save.wait()
        assert equal(states(engine), final)
    assert_arrays_are(tmp_path / "saved", expected)


def test_moments_are_read_when_they_are_on_disk_though_more_pages_were_announced(tmp_path, monkeypatch):
    """A version is published before states that no load reads are written, and the next update is announced then."""
    allowed = threading.Event()

    class Held(disk.DirectFile):
        def write(self, place, offset, data):
            allowed.wait(30)
            super().write(place, offset, data)

    monkeypatch.setattr(nvme, "DirectFile", Held)
    layout = place_block(0, "block", [ParamSpec("a", "a", (32, 64))])
    with closing(
        HostStore([layout], False, False, placed={("exp_avg", 0): Tier.nvme}, nvme_dir=str(tmp_path))
    ) as store:
        store.pages.announce(0)
        store.pages.acquire(0, 0)["exp_avg"].fill_(3.0)
        store.pages.release(0, 0)
        with closing(StateReader(store, Streams.on(torch.device("cpu")))) as reader:
            reader.make_room()
            reader.begin()
            store.pages.announce(0)  # waits for the snapshot
            (array,) = (a for a in list_arrays([layout], Moments.float32) if a.spec.kind == "exp_avg")
            out = torch.empty(32 * 64)
            reading = threading.Thread(target=reader.read, args=(array, array.spec.chunks[0], out), daemon=True)
            reading.start()
            reading.join(0.1)
            assert reading.is_alive()
            allowed.set()
            reading.join(30)
            assert not reading.is_alive()
            assert (out == 3).all()


def test_an_update_sets_aside_what_it_is_about_to_overwrite(on_nvme, small_pages, tmp_path, monkeypatch):
    """Where no thread copies ahead of it."""
    with build(LARGER, optimizer=ADAMW, memory=on_nvme("all")) as engine:
        train(engine, 1, 2)
        expected = states(engine)
        copy_all, trained = Snapshot.copy_all, threading.Event()

        def late(snapshot, num_threads):
            trained.wait(30)
            copy_all(snapshot, num_threads)

        monkeypatch.setattr(Snapshot, "copy_all", late)
        save = engine.save_checkpoint(tmp_path / "saved")
        train(engine, 3, 4)
        trained.set()
        save.wait()
    with load(tmp_path / "saved", optimizer=ADAMW) as engine:
        assert engine.num_steps == 2
        assert equal(states(engine), expected)


def test_a_live_engine_takes_weights_alone_and_begins_anew(on_nvme, in_dram):
    folder, _, saved, _ = in_dram(optimizer=ADAMW)
    with build(optimizer=ADAMW, memory=on_nvme("all")) as engine:
        train(engine, 7, 9)
        engine.restore(folder, weights_only=True)
        for (block, name), found in states(engine).items():
            expected = saved[block, name] if name in ("weights", "residual") else torch.zeros_like(found)
            assert torch.equal(found, expected), (block, name)
        found = train(engine, 1, 2)
    with load(folder, optimizer=ADAMW, weights_only=True) as engine:
        assert train(engine, 1, 2) == found


def test_what_a_save_reads_through_is_in_the_plan(on_nvme):
    with build(memory=on_nvme("all")) as engine, build() as twin:
        for one in (engine, twin):
            one.plan_checkpoints("auto")
        arrays, size = engine._runtime.saves._arrays, engine._runtime.saves._staging_bytes
        assert engine._runtime.needs.saving == saving_bytes(arrays, size, on_gpu=False, on_nvme=True)
        assert twin._runtime.needs.saving == saving_bytes(arrays, size, on_gpu=False, on_nvme=False)
        assert engine._runtime.needs.saving > twin._runtime.needs.saving + nvme.BOUNCE


def test_a_disk_that_breaks_fails_the_save_and_the_run_with_one_error(on_nvme, tmp_path, monkeypatch):
    class Broken(disk.DirectFile):
        is_broken = False

        def read(self, place, offset, into):
            if Broken.is_broken:
                raise OSError(5, "Input/output error")
            super().read(place, offset, into)

    monkeypatch.setattr(nvme, "DirectFile", Broken)
    with build(memory=on_nvme("all")) as engine:
        train(engine, 1, 1)
        engine._runtime.wait_for_updates()
        Broken.is_broken = True
        save = engine.save_checkpoint(tmp_path / "saved")
        with pytest.raises(horizon.errors.TierError, match=r"reading \w+ of block \d+ in memory.nvme_dir=.* failed"):
            save.wait()
        with pytest.raises(horizon.errors.TierError, match="go on from the last checkpoint"):
            train(engine, 2, 3)
    assert not (tmp_path / "saved").exists()
