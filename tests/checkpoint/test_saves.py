"""Checkpoints of an engine: what is on disk, what a damaged one says, and what a save that fails leaves behind."""

import dataclasses
import errno
import json
import os
import shutil
import threading
import time

import numpy as np
import pytest
import tensorstore
import torch

import horizon
from horizon.checkpoint import arrays
from horizon.checkpoint.manifest import checksum, read_manifest
from horizon.checkpoint.reader import Checkpoint
from horizon.checkpoint.snapshot import StateReader
from horizon.errors import BudgetError, CheckpointError, ConfigError
from tests.checkpoint.engines import build, load, make_batch, train


@pytest.fixture
def saved(tmp_path):
    with build(optimizer=horizon.AdamW(lr=1e-2)) as engine:
        train(engine, 1, 2)
        engine.save_checkpoint(tmp_path / "saved", run={"note": [1, None, "ä"]}).wait()
        engine.masters = dict(engine.named_master_parameters())
        moments = engine._runtime.store.moments["exp_avg"]
        engine.moments = {
            p.name: moments[layout.index][p.offset : p.end].view(p.spec.shape).clone()
            for layout in engine._runtime.store.layouts
            for p in layout.params
        }
        yield tmp_path / "saved", engine


def test_any_reader_of_zarr_finds_the_parameters_by_their_names(saved):
    path, engine = saved
    for name, expected in engine.masters.items():
        for kind, values in (("master", expected), ("exp_avg", engine.moments[name])):
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/arrays/{name}/{kind}/"}}
            found = tensorstore.open(spec).result().read().result()
            assert found.dtype == np.float32
            assert np.array_equal(found.view(np.int32), values.numpy().view(np.int32))


def test_the_manifest_tells_all_that_the_arrays_do_not(saved):
    path, engine = saved
    manifest = read_manifest(path)
    assert (manifest.step, manifest.passes, manifest.seed) == (2, 2, 0)
    assert manifest.run == {"note": [1, None, "ä"]}
    assert manifest.model["hidden_size"] == 32 and manifest.model_class == "LlamaForCausalLM"
    assert {spec.name for spec in manifest.arrays if spec.kind == "master"} == set(engine.masters)
    assert manifest.num_bytes == 12 * engine.plan.num_parameters
    whole = json.loads((path / "manifest.json").read_text())
    assert whole["checksum"] == checksum(whole["content"])
    assert not list(path.rglob("*.pkl")) and not list(path.rglob(".*"))


def test_a_save_says_what_it_took_and_returns_before_it_is_done(tmp_path, monkeypatch):
    slow = arrays.ArrayWriter.finish
    monkeypatch.setattr(arrays.ArrayWriter, "finish", lambda writer: (time.sleep(0.3), slow(writer)))
    with build() as engine:
        engine.plan_checkpoints()
        train(engine, 1, 1)
        began = time.perf_counter()
        save = engine.save_checkpoint(tmp_path / "saved")
        assert time.perf_counter() - began < 0.1 and not save.done
        train(engine, 2, 2)
        row = save.wait()
        assert save.done and row.seconds > 0.3 and row.num_bytes == 12 * engine.plan.num_parameters
        assert row.bytes_per_s == row.num_bytes / row.seconds
        assert 0 < row.stall_s < row.seconds and row.step == 1


def test_the_next_save_waits_for_the_one_before(tmp_path):
    with build() as engine:
        train(engine, 1, 1)
        first = engine.save_checkpoint(tmp_path / "first")
        second = engine.save_checkpoint(tmp_path / "second")
        assert first.done
        second.wait()
    for name in ("first", "second"):
        Checkpoint(tmp_path / name).verify()


def test_closing_the_engine_waits_for_the_save(tmp_path):
    with build() as engine:
        train(engine, 1, 1)
        engine.save_checkpoint(tmp_path / "saved")
    Checkpoint(tmp_path / "saved").verify()


def test_ctrl_c_does_not_wait_for_the_save(tmp_path, monkeypatch):
    gate = threading.Event()
    finish = arrays.ArrayWriter.finish
    monkeypatch.setattr(arrays.ArrayWriter, "finish", lambda writer: (gate.wait(0.2), finish(writer)))
    with pytest.raises(KeyboardInterrupt), build() as engine:
        train(engine, 1, 1)
        engine.save_checkpoint(tmp_path / "saved")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_staging_is_in_the_plan_and_is_kept_to(tmp_path):
    with build() as engine:
        before = engine.plan.num_bytes("host")
        engine.plan_checkpoints("128KiB")
        line = next(line for line in engine.plan.lines if line.purpose == "checkpoint staging")
        assert engine.plan.num_bytes("host") == before + line.num_bytes
        assert line.num_bytes == (128 << 10) + arrays.writing_bytes(engine._runtime.saves.num_bytes + 10**9) - (
            arrays.CHUNKS_IN_FLIGHT * arrays.CHUNK_BYTES
        ) + min(arrays.CHUNKS_IN_FLIGHT * arrays.CHUNK_BYTES, chunk_bytes(engine))
        assert "checkpoint staging" in engine.plan.table()
        train(engine, 1, 1)
        engine.save_checkpoint(tmp_path / "saved")
        train(engine, 2, 3)
        assert engine._runtime.saves._staging.num_bytes == 128 << 10
    Checkpoint(tmp_path / "saved").verify()


def test_more_staging_waits_for_what_is_written_from_the_old(tmp_path, monkeypatch):
    write = arrays.ArrayWriter._do
    monkeypatch.setattr(arrays.ArrayWriter, "_do", lambda writer, job: (time.sleep(0.02), write(writer, job)))
    with build() as engine:
        engine.plan_checkpoints("512KiB")
        train(engine, 1, 1)
        expected = dict(engine.named_master_parameters())
        save = engine.save_checkpoint(tmp_path / "saved")
        engine._runtime.saves.settle()  # all is set aside, little is written
        engine.plan_checkpoints("1MiB")
        save.wait()
        assert engine._runtime.saves._staging.num_bytes > 512 << 10
    found = Checkpoint(tmp_path / "saved")
    assert all(torch.equal(found.read(name, "master"), value) for name, value in expected.items())


def chunk_bytes(engine):
    return sum(len(s.chunks) * (-(-s.chunk_file_bytes // 4096) * 4096) for s in engine._runtime.saves.specs)


def test_staging_that_does_not_fit_is_refused(tmp_path):
    with build() as engine:
        with pytest.raises(ConfigError, match=r"checkpoint\.staging=4KiB must be at least 24 KiB for this model"):
            engine.plan_checkpoints("4KiB")
        with pytest.raises(ConfigError, match=r"checkpoint\.staging='lots' is not a size"):
            engine.plan_checkpoints("lots")
    need = horizon.MemoryConfig(host_budget="40MiB")
    with pytest.raises(BudgetError), build(memory=need) as engine:
        engine.plan_checkpoints()


def test_buffers_of_the_state_dict_come_along(tmp_path, tiny_model):
    model = tiny_model("deepseek_v3")
    with build(model) as engine:
        engine.save_checkpoint(tmp_path / "saved").wait()
    buffers = {s.name: s for s in read_manifest(tmp_path / "saved").arrays if s.kind == "buffer"}
    assert buffers
    with load(tmp_path / "saved") as engine:
        found = dict(engine._runtime.model.skeleton.named_buffers())
    state = model.state_dict()
    for name in buffers:
        assert torch.equal(found[name].cpu(), state[name])


def test_blocks_that_are_to_move_wait_until_they_were_read(tmp_path, monkeypatch):
    """`forward_backward` has the buffers rearranged, and with them the blocks between tiers."""
    read = StateReader.read
    monkeypatch.setattr(StateReader, "read", lambda *arguments: (time.sleep(0.002), read(*arguments)))
    with build(memory=horizon.MemoryConfig(hbm_blocks=3)) as engine:
        train(engine, 1, 2)
        masters = dict(engine.named_master_parameters())
        save = engine.save_checkpoint(tmp_path / "saved")
        engine._runtime.rearrange(dataclasses.replace(engine._runtime.needs, in_hbm=frozenset({1})))
        for block in range(5):
            engine._runtime.store.weights[block].fill_(7)  # what the freed memory may be used for
        save.wait()
    checkpoint = Checkpoint(tmp_path / "saved")
    assert all(torch.equal(checkpoint.read(name), value) for name, value in masters.items())


def test_a_file_system_without_direct_writes_will_do(tmp_path, monkeypatch):
    real = os.open

    def refuse(path, flags, *arguments, **keywords):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *arguments, **keywords)

    monkeypatch.setattr(os, "open", refuse)
    with build() as engine:
        engine.save_checkpoint(tmp_path / "saved").wait()
    Checkpoint(tmp_path / "saved").verify()
    assert not arrays.can_be_direct(tmp_path / "saved")


# ---- damage


def flip(path, at=0.4):
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 16
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("kind", ["master", "exp_avg_sq"])
def test_a_flipped_bit_is_refused_naming_the_array(saved, kind):
    path, _ = saved
    name = "model.layers.1.mlp.up_proj.weight"
    flip(path / "arrays" / name / kind / "c.0.0")
    for read in (lambda: Checkpoint(path).verify(), lambda: load(path)):
        with pytest.raises(CheckpointError, match=rf"damaged at {name} \({kind}\): .*checksum.*earlier checkpoint"):
            read()


def test_an_engine_into_which_a_damaged_checkpoint_was_read_says_so_from_then_on(saved):
    path, _ = saved
    flip(path / "arrays/model.norm.weight/exp_avg/c.0")
    with build(optimizer=horizon.AdamW(lr=1e-2)) as engine:
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight \(exp_avg\)"):
            engine.restore(path)
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight \(exp_avg\)"):
            engine.step(make_batch(0))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda p: shutil.rmtree(p / "arrays/lm_head.weight/exp_avg"),
            r"lm_head\.weight \(exp_avg\): c\.0\.0: No such",
        ),
        (
            lambda p: (p / "arrays/lm_head.weight/master/c.0.0").unlink(),
            r"lm_head\.weight \(master\): c\.0\.0: No such",
        ),
        (lambda p: os.truncate(p / "arrays/lm_head.weight/master/c.0.0", 99), r"lm_head.* 99 bytes instead of 8196"),
        (lambda p: (p / "arrays/lm_head.weight/master/zarr.json").unlink(), r"lm_head\.weight \(master\)"),
        (lambda p: flip(p / "arrays/lm_head.weight/master/zarr.json", 0.2), r"lm_head\.weight \(master\)"),
        (lambda p: os.truncate(p / "manifest.json", 3000), r"manifest\.json is truncated or damaged"),
        (lambda p: os.truncate(p / "manifest.json", 0), r"manifest\.json is truncated or damaged"),
        (lambda p: (p / "manifest.json").unlink(), r"is no checkpoint: it has no manifest\.json"),
        (lambda p: rewrite(p, "step", 7), r"manifest\.json is damaged: its checksum does not match"),
        (lambda p: (p / "manifest.json").write_text("[]"), r"is not a manifest of a Horizon checkpoint"),
    ],
)
def test_what_is_missing_or_cut_short_is_refused(saved, damage, message):
    path, _ = saved
    damage(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def rewrite(path, key, value):
    whole = json.loads((path / "manifest.json").read_text())
    whole["content"][key] = value
    (path / "manifest.json").write_text(json.dumps(whole))


def test_a_newer_schema_is_refused_naming_the_version(saved):
    path, _ = saved
    whole = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**whole, "schema": 4}))
    with pytest.raises(CheckpointError, match=r"has schema 4 and this Horizon reads 3; use the version that wrote it"):
        Checkpoint(path)


@pytest.mark.parametrize("name", ["../../outside", "/etc/hosts", "..", "a/../../b"])
def test_names_in_a_manifest_never_lead_out_of_the_folder(saved, tmp_path, name):
    path, _ = saved
    whole = json.loads((path / "manifest.json").read_text())
    whole["content"]["arrays"][0]["name"] = name
    whole["checksum"] = checksum(whole["content"])
    (path / "manifest.json").write_text(json.dumps(whole))
    spec = read_manifest(path).arrays[0]
    place = os.path.realpath(path / spec.folder)
    assert os.path.dirname(os.path.dirname(place)) == str(path / "arrays")
    with pytest.raises(CheckpointError):
        Checkpoint(path)


@pytest.mark.parametrize(
    "entry", [{"kind": "../x"}, {"kind": 3}, {"dtype": "object"}, {"shape": [-1]}, {"shape": ["a"]}, {"bytes": 5}]
)
def test_an_array_that_cannot_be_is_refused(saved, entry):
    path, _ = saved
    whole = json.loads((path / "manifest.json").read_text())
    whole["content"]["arrays"][0] |= entry
    whole["checksum"] = checksum(whole["content"])
    (path / "manifest.json").write_text(json.dumps(whole))
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        read_manifest(path)
