"""Checkpoints of 2-byte masters: what is on disk, what reads it, and what is refused."""

import json

import pytest
import tensorstore
import torch
from safetensors.torch import load_file

import horizon
from horizon.checkpoint.manifest import checksum, read_manifest
from horizon.checkpoint.reader import Checkpoint
from horizon.cli import _dispatch
from horizon.config.schema import Tier
from horizon.errors import CheckpointError
from tests.checkpoint.engines import build, equal, load, make_batch, states, train

SPLIT = horizon.AdamW(lr=1e-2)
ROUNDED = horizon.AdamW(lr=1e-2, master="bf16_stochastic")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, masters) of each format after the same two steps."""
    found = {}
    for adamw in (SPLIT, ROUNDED):
        folder = tmp_path_factory.mktemp(adamw.master) / "step-00000002"
        with build(optimizer=adamw) as engine:
            train(engine, 1, 2)
            engine.save_checkpoint(folder).wait()
            found[str(adamw.master)] = folder, dict(engine.named_master_parameters())
    return found


def test_the_arrays_are_the_bf16_weights_and_the_manifest_says_so(saved):
    folder, masters = saved["bf16_stochastic"]
    manifest = read_manifest(folder)
    assert manifest.optimizer["master"] == "bf16_stochastic"
    assert {spec.dtype for spec in manifest.arrays if spec.kind == "master"} == {"bfloat16"}
    assert manifest.num_bytes == 10 * sum(value.numel() for value in masters.values())
    for name, expected in masters.items():
        path = f"{folder}/arrays/{name}/master/"
        array = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}).result()
        assert array.dtype.name == "bfloat16"
        assert (array.read().result().astype("float32") == expected.numpy()).all()
    raw = (folder / "arrays/model.norm.weight/master/c.0").read_bytes()  # little-endian bf16, then 4 bytes of crc32c
    assert raw[:-4] == masters["model.norm.weight"].bfloat16().view(torch.int16).numpy().astype("<i2").tobytes()


def test_the_rounding_goes_on_by_step_and_seed(saved):
    """Random bits are a function of (seed, step, block, element): a step later, or with another seed, they differ."""
    folder, _ = saved["bf16_stochastic"]
    found = []
    for seed in (0, 0, 1):
        with load(folder, optimizer=ROUNDED, seed=seed) as engine:
            train(engine, 3, 3)
            found.append(states(engine))
    assert equal(found[0], found[1]) and not equal(found[0], found[2])


def test_without_settings_it_goes_on_in_its_own_format(saved):
    for master, (folder, masters) in saved.items():
        with load(folder) as engine:
            assert engine._runtime.optimizer.master == master
            assert equal(dict(engine.named_master_parameters()), masters)


@pytest.mark.parametrize(("before", "after"), [("split", ROUNDED), ("bf16_stochastic", SPLIT)])
def test_the_other_format_is_refused_and_gets_the_weights_alone(before, after, saved):
    folder, masters = saved[before]
    with build(optimizer=after) as engine:
        message = rf"optim\.master: '{before}' when it was saved, '{after.master}' now; set .*resume_weights_only=true"
        with pytest.raises(CheckpointError, match=message):
            engine.restore(folder)
        engine.restore(folder, weights_only=True)
        expected = {name: value.bfloat16().float() for name, value in masters.items()}
        found = dict(engine.named_master_parameters())
        # a split master is rounded half away from zero, not to even: the same but for ties
        assert all(torch.allclose(found[name], value, rtol=2**-8, atol=0) for name, value in expected.items())
        assert before == "split" or equal(found, masters)
        assert engine.num_steps == 0
        train(engine, 1, 2)


def test_one_without_the_field_is_of_split_masters(saved, tmp_path):
    folder, masters = saved["split"]
    whole = json.loads((folder / "manifest.json").read_text())
    del whole["content"]["optimizer"]["master"]
    old = tmp_path / "old"
    old.mkdir()
    (old / "arrays").symlink_to(folder / "arrays")
    (old / "manifest.json").write_text(json.dumps({**whole, "schema": 1, "checksum": checksum(whole["content"])}))
    assert read_manifest(old).optimizer == read_manifest(folder).optimizer
    with load(old, optimizer=SPLIT) as engine:
        assert engine.num_steps == 2
        assert equal(dict(engine.named_master_parameters()), masters)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_commands_read_it(dtype, saved, tmp_path, capsys):
    folder, masters = saved["bf16_stochastic"]
    _dispatch(["checkpoint", "verify", str(folder)])
    _dispatch(["export", str(folder), str(tmp_path / "model"), f"dtype={dtype}"])
    tensors = load_file(tmp_path / "model/model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float32 if dtype == "fp32" else torch.bfloat16}
    assert equal({name: value.float() for name, value in tensors.items()}, masters)
    _dispatch(["import", str(tmp_path / "model"), str(tmp_path / "imported")])
    with load(tmp_path / "imported", optimizer=ROUNDED) as engine:
        assert equal(dict(engine.named_master_parameters()), masters)
        expected = engine.evaluate(make_batch(5))
    with load(folder) as engine:
        assert engine.evaluate(make_batch(5)) == expected
    capsys.readouterr()
    assert _dispatch(["checkpoint", "diff", str(folder), str(folder)]) == 0
    assert _dispatch(["checkpoint", "diff", str(folder), str(saved["split"][0])]) == 1
    said = capsys.readouterr().out
    assert "optim.master: 'bf16_stochastic' in the first, 'split' in the second" in said
    assert "model.norm.weight (master): bfloat16 [32] in the first, float32 [32] in the second" in said
    _dispatch(["checkpoint", "ls", str(folder.parent)])
    assert "float32 moments, bf16 masters" in capsys.readouterr().out


def test_on_nvme_too(saved, tmp_path):
    folder, _ = saved["bf16_stochastic"]
    memory = horizon.MemoryConfig(nvme_dir=str(tmp_path), rules=[horizon.TierRule(state="*", tier=Tier.nvme)])
    with load(folder) as engine:
        expected, final = train(engine, 3, 5), states(engine)
    with load(folder, memory=memory) as engine:
        engine.save_checkpoint(tmp_path / "again")
        assert train(engine, 3, 5) == expected
        assert equal(states(engine), final)
    one, other = Checkpoint(folder), Checkpoint(tmp_path / "again")
    assert all(torch.equal(one.read(s.name, s.kind), other.read(s.name, s.kind)) for s in one.manifest.arrays)
