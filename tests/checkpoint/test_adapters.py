"""Checkpoints of a model with a LoRA adapter: resumed bit for bit, exported as peft's folder, used as they are."""

import json

import pytest
import torch

import horizon
from horizon.checkpoint.convert import import_model
from horizon.checkpoint.manifest import read_manifest
from horizon.commands.checkpoint import export_command
from horizon.data.tokenizer import byte_tokenizer
from horizon.errors import CheckpointError
from horizon.models.source import resolve_model
from tests.parity.adapters import adapted, peft
from tests.parity.reference import assert_same_tensors, build, engine_for, plain


def run(engine, first, last):
    for step in range(first, last + 1):
        engine.step(plain(step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder with the base and a checkpoint of step 2, weights after step 4)"""
    folder = tmp_path_factory.mktemp("adapted")
    build("llama").save_pretrained(folder / "base")
    lora = horizon.LoraConfig(rank=4, dropout=0.25, targets=["q_proj", "up_proj"])
    with engine_for(str(folder / "base"), lora=lora, seed=3) as engine:
        run(engine, 1, 2)
        engine.save_checkpoint(folder / "checkpoint").wait()
        run(engine, 3, 4)
        return folder, dict(engine.named_master_parameters())


@pytest.mark.parametrize("base", [None, "base"])
def test_a_resumed_run_is_the_uninterrupted_one(saved, base):
    folder, expected = saved
    source = {"model": str(folder / base)} if base else {}
    settings = {"max_grad_norm": 0.5, "device": "cpu", "compute_dtype": "float32", "self_check": False}
    with horizon.Engine.load_checkpoint(folder / "checkpoint", **source, **settings) as engine:
        engine.lr = 1e-2
        run(engine, 3, 4)
        assert_same_tensors(dict(engine.named_master_parameters()), expected)


def test_another_adapter_is_refused_by_name(saved):
    folder, _ = saved
    lora = horizon.LoraConfig(rank=4, dropout=0.25, alpha=3, targets=["q_proj", "up_proj"])
    with (
        engine_for(str(folder / "base"), lora=lora) as engine,
        pytest.raises(CheckpointError, match=r"adapter lora_alpha: 8 when it was saved, 3"),
    ):
        engine.restore(folder / "checkpoint")
    with (
        engine_for(str(folder / "base")) as engine,
        pytest.raises(CheckpointError, match=r"adapter |lora_A"),
    ):
        engine.restore(folder / "checkpoint")


def test_export_gives_pefts_folder_and_inference_the_same_logits(saved, tmp_path):
    folder, _ = saved
    assert export_command([str(folder / "checkpoint"), str(tmp_path / "adapter"), "dtype=fp32"]) == 0
    model = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "adapter").eval()
    expected = model(input_ids=plain(9)["input_ids"]).logits[:, -1]
    settings = {"device": "cpu", "compute_dtype": "float32", "self_check": False}
    with horizon.InferenceEngine.load_checkpoint(folder / "checkpoint", **settings) as engine:
        torch.testing.assert_close(engine.next_token_logits(plain(9)), expected, rtol=0, atol=1e-6)
    with horizon.InferenceEngine.from_pretrained(model, **settings) as engine:
        torch.testing.assert_close(engine.next_token_logits(plain(9)), expected, rtol=0, atol=1e-6)
        prompt = plain(9)["input_ids"]
        found = engine.generate(prompt, max_new_tokens=4, do_sample=False)
        assert torch.equal(found, model.generate(prompt, max_new_tokens=4, do_sample=False))


def test_the_manifest_says_what_the_adapter_is(saved):
    manifest = read_manifest(saved[0] / "checkpoint")
    assert manifest.adapter is not None
    assert (manifest.adapter["r"], manifest.adapter["target_modules"]) == (4, ["q_proj", "up_proj"])
    assert "model.layers.0.self_attn.q_proj.base_layer.weight" in manifest.frozen
    moments = {spec.name for spec in manifest.arrays if spec.kind == "exp_avg"}
    assert moments and all("lora_" in name for name in moments)


def test_a_live_model_with_an_adapter_is_saved_and_resumed(tmp_path):
    model = adapted()
    with engine_for(model) as engine:
        run(engine, 1, 1)
        engine.save_checkpoint(tmp_path / "checkpoint").wait()
        run(engine, 2, 2)
        expected = dict(engine.named_master_parameters())
    with engine_for(model) as engine:
        engine.restore(tmp_path / "checkpoint")
        run(engine, 2, 2)
        assert_same_tensors(dict(engine.named_master_parameters()), expected)


# ---- peft's folder as a model


@pytest.fixture
def adapter(tmp_path):
    """A folder of peft's, beside its base."""
    build("llama").save_pretrained(tmp_path / "base")
    model = adapted()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model


def rewrite(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_of_pefts_is_the_adapter_on_its_base_and_trains_on(adapter):
    folder, model = adapter
    with engine_for(model) as engine:
        run(engine, 1, 2)
        expected = dict(engine.named_master_parameters())
    with engine_for(str(folder)) as engine:
        run(engine, 1, 2)
        assert_same_tensors(dict(engine.named_master_parameters()), expected)
    source, base = resolve_model(str(folder)), folder.parent / "base"
    assert (source.named, source.folder, source.tokenizer_folder) == (folder, base, base)


def test_the_tokenizer_beside_an_adapter_is_its_own(adapter):
    folder, _ = adapter
    byte_tokenizer().save_pretrained(str(folder))
    assert resolve_model(str(folder)).tokenizer_folder == folder


def test_another_models_adapter_is_refused_by_tensor(adapter):
    folder, _ = adapter
    rewrite(folder, target_modules=["q_proj"])
    with pytest.raises(
        CheckpointError, match=r"adapter_model.safetensors: .*mlp.down_proj.* is not in the adapter of this"
    ):
        engine_for(str(folder))
    rewrite(folder, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], r=2)
    with pytest.raises(CheckpointError, match=r"lora_A.weight has shape \(4, 32\), expected \(2, 32\)"):
        engine_for(str(folder))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (None, r"names no base model"),
        ("/nowhere", r"is an adapter of /nowhere, .*no such folder"),
    ],
)
def test_without_its_base_an_adapter_is_refused(base, message, adapter):
    folder, _ = adapter
    rewrite(folder, base_model_name_or_path=base)
    with pytest.raises(CheckpointError, match=message):
        resolve_model(str(folder))


def test_a_pickled_adapter_is_refused(adapter):
    folder, _ = adapter
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"is an adapter without adapter_model.safetensors; save it as"):
        resolve_model(str(folder))


def test_an_adapter_alone_is_not_imported(adapter):
    folder, _ = adapter
    with pytest.raises(CheckpointError, match=r"is an adapter of .*base; expected a Hugging Face folder"):
        import_model(folder, folder.parent / "checkpoint")
