"""Folders, configs and live models that cannot be trained: refused by name, whatever had been loaded given back."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from horizon import Engine
from horizon.errors import CheckpointError, ConfigError, UnsupportedModelError


@pytest.fixture
def model(tools):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**tools.LLAMA))


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(model, tmp_path):
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    return tmp_path / "sharded"


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def cut(path, num_bytes):
    path.write_bytes(path.read_bytes()[:num_bytes])


def test_a_folder_that_is_not_there_is_named(fails, tmp_path):
    with fails(CheckpointError, "no such folder: model.path=.*nowhere' does not exist"):
        Engine.from_pretrained(tmp_path / "nowhere")


def test_a_folder_without_a_config_is_named(fails, tmp_path):
    with fails(CheckpointError, "has no config.json; expected a Hugging Face model folder"):
        Engine.from_pretrained(str(tmp_path))


def test_a_file_is_no_folder(fails, folder):
    with fails(CheckpointError, "is a file; expected a folder"):
        Engine.from_pretrained(folder / "config.json")


@pytest.mark.parametrize("kept", [0, 7, 300, -1], ids=["empty", "no length", "half a header", "a byte short"])
def test_a_truncated_file_is_named(fails, folder, kept):
    cut(folder / "model.safetensors", kept)
    with fails(CheckpointError, "model.safetensors is truncated or damaged"):
        Engine.from_pretrained(folder)


def test_a_truncated_last_shard_is_named(fails, sharded):
    cut(shards(sharded)[-1], -100)
    with fails(CheckpointError, f"{shards(sharded)[-1].name} is truncated or damaged"):
        Engine.from_pretrained(sharded)


def test_a_missing_shard_is_named(fails, sharded):
    shards(sharded)[1].unlink()
    with fails(CheckpointError, "is missing, though model.safetensors.index.json names it"):
        Engine.from_pretrained(sharded)


def test_a_config_that_is_no_json_is_named(fails, folder):
    (folder / "config.json").write_text('{"model_type": "llama",')
    with fails(CheckpointError, "config.json cannot be read as JSON"):
        Engine.from_pretrained(folder)


def test_weights_of_another_shape_are_named(fails, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 52}))
    with fails(CheckpointError, r"9 of another shape: model.layers.0.mlp.*\[48, 32\] on disk, \[52, 32\] in the model"):
        Engine.from_pretrained(folder)


def test_pickles_are_not_loaded(fails, model, folder):
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with fails(CheckpointError, "pytorch_model.bin is a pickle, which is not loaded; convert it to safetensors"):
        Engine.from_pretrained(folder)


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        ({"model_type": "lama"}, UnsupportedModelError, "model_type 'lama' .* is unknown to transformers"),
        ({"vocab_size": 64}, UnsupportedModelError, "names no model_type"),
        ({"model_type": "t5"}, UnsupportedModelError, "'t5' is an encoder-decoder"),
        ({"model_type": "bert"}, UnsupportedModelError, "attends in both directions"),
        ({"model_type": "clip"}, UnsupportedModelError, "has a vision_config, so it is not a plain language model"),
        ({"model_type": "qwen2_vl"}, UnsupportedModelError, "has a vision_config"),
        ({"model_type": "gpt2", "n_head": 5}, UnsupportedModelError, "'gpt2' model cannot be built"),
        ({"model_type": "llama", "num_hidden_layer": 2}, ConfigError, "did you mean num_hidden_layers"),
    ],
    ids=str,
)
def test_an_architecture_that_cannot_be_streamed_is_refused_with_the_reason(fails, config, kind, message):
    with fails(kind, message):
        Engine.from_config(config)


def test_a_quantized_model_is_refused(fails, folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps(config))
    with fails(UnsupportedModelError, r"is quantized \(gptq\)"):
        Engine.from_pretrained(folder)


def test_a_live_model_without_values_is_refused(fails, tools):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tools.LLAMA))
    with fails(UnsupportedModelError, r"has no values for model.embed_tokens.weight \(meta device\)"):
        Engine.from_pretrained(model)


@pytest.mark.parametrize(
    "register",
    [
        lambda model: model.model.layers[1].mlp.register_forward_hook(lambda *_: None),
        lambda model: model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: None),
        lambda model: model.model.layers[1].mlp.register_full_backward_hook(lambda *_: None),
    ],
    ids=["forward", "forward pre", "backward"],
)
def test_a_hook_on_a_module_is_refused(fails, model, register):
    register(model)
    with fails(UnsupportedModelError, "LlamaForCausalLM has a hook on module model.layers.1.mlp; remove it"):
        Engine.from_pretrained(model)


def test_a_hook_on_a_parameter_is_refused(fails, model):
    model.lm_head.weight.register_hook(lambda gradient: gradient * 0)
    with fails(UnsupportedModelError, "has a hook on lm_head.weight"):
        Engine.from_pretrained(model)


def test_hooks_that_transformers_leaves_on_a_used_model_are_no_obstacle(build, model, tools):
    fresh = build(model).step(tools.make_batch(0))
    model(input_ids=torch.tensor([[3, 4]]), output_hidden_states=True)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    assert any(module._forward_hooks for module in model.modules())
    used = build(model).step(tools.make_batch(0))
    assert (used.loss, used.grad_norm) == (fresh.loss, fresh.grad_norm)


@pytest.mark.parametrize("thing", [None, 3, torch.nn.Linear(2, 2)], ids=repr)
def test_what_is_no_model_is_refused(fails, thing):
    with fails(UnsupportedModelError, "is not a transformers model; expected a causal LM or a folder"):
        Engine.from_pretrained(thing)


def test_a_model_without_a_head_is_refused(fails, tools):
    with fails(UnsupportedModelError, "has no language-model head"):
        Engine.from_pretrained(AutoModel.from_config(AutoConfig.for_model(**tools.LLAMA)))
