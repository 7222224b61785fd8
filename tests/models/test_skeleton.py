import copy
import fnmatch
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from horizon.errors import CheckpointError, ConfigError, UnsupportedModelError
from horizon.models.skeleton import build_skeleton, init_parameters, skeleton_from_instance, tied_aliases
from horizon.models.sources import resolve_model

TINY = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5,
    "original_max_position_embeddings": 32,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
MODELS = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, llama3 rope": {"rope_parameters": LLAMA3},
    "llama, yarn rope": {"rope_parameters": YARN},
    "llama, dynamic rope": {"rope_parameters": DYNAMIC},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "gpt2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi3": {},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "max_position_embeddings": 131072},
    "deepseek_v3": {
        "n_routed_experts": 8, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "qk_nope_head_dim": 8, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    },
    "gpt_neox": {},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "bloom": {"n_layer": 2, "n_head": 4},
    "olmo2": {},
    "cohere": {},
    "starcoder2": {},
    "falcon": {},
    "stablelm": {},
}  # fmt: skip


def settings(name, **changes):
    return {**TINY, **MODELS[name], **changes, "model_type": name.split(",")[0]}


def real_model(name):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings(name)), dtype=torch.float32)


def named(tensors):
    return {name: (tuple(t.shape), t.dtype, t.requires_grad) for name, t in tensors}


@pytest.mark.parametrize("name", MODELS)
def test_skeleton_is_the_real_model_without_weights(name):
    real, skeleton = real_model(name), build_skeleton(AutoConfig.for_model(**settings(name)))
    assert type(skeleton) is type(real)
    assert skeleton.config._attn_implementation == real.config._attn_implementation
    assert all(p.is_meta for p in skeleton.parameters())
    assert named(skeleton.named_parameters()) == named(real.named_parameters())
    assert tied_aliases(skeleton) == tied_aliases(real)
    assert skeleton.state_dict().keys() == real.state_dict().keys()
    buffers = dict(skeleton.named_buffers())
    assert buffers.keys() == dict(real.named_buffers()).keys()
    for key, expected in real.named_buffers():
        assert buffers[key].device.type == "cpu" and buffers[key].dtype == expected.dtype, key
        assert torch.equal(buffers[key], expected), key


def test_tied_weights_are_one_parameter():
    tied = build_skeleton(settings("llama, tied"))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert tied_aliases(tied) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert tied_aliases(build_skeleton(settings("llama"))) == {}


def test_skeleton_of_a_folder_keeps_its_dtype_and_generation_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(settings("llama", dtype="bfloat16")))
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.25, "do_sample": True}))
    assert resolve_model(str(tmp_path)).has_weights is False
    skeleton = build_skeleton(tmp_path)
    assert skeleton.config.dtype == torch.bfloat16
    assert skeleton.generation_config.temperature == 0.25
    assert {p.dtype for p in skeleton.parameters()} == {torch.float32}
    assert skeleton.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "gemma3"}, "vision_config"),
        ({"model_type": "bert"}, "both directions"),
        ({"model_type": "clip_text_model"}, "no causal language model"),
        ({"model_type": "llamma"}, "'llamma'.*unknown to transformers 5"),
        ({"model_type": None}, "names no model_type"),
        ({"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "m.M"}}, "trust_remote_code"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, r"quantized \(mxfp4\)"),
        ({"output_router_logits": True}, "output_router_logits=false"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": 30}, "multiple of the number of attention heads"),
        ({"hidden_act": "sillu"}, "cannot be built.*sillu"),
    ],
)
def test_an_unsupported_model_is_refused_with_the_reason(changes, reason):
    config = {key: value for key, value in (TINY | {"model_type": "llama"} | changes).items() if value is not None}
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        build_skeleton(config)
    assert "\n" not in str(caught.value)


def test_a_misspelt_setting_is_named():
    with pytest.raises(ConfigError, match=r"model.config.hiden_size .*did you mean hidden_size\?"):
        build_skeleton({"model_type": "llama", "hiden_size": 32})
    legacy = {"rope_theta": 5e5, "torch_dtype": "bfloat16", "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    build_skeleton(settings("llama") | legacy)
    build_skeleton(settings("gpt2") | {"n_embd": 32, "n_layer": 2})


@pytest.mark.parametrize("name", ["llama", "llama, tied", "gemma3_text", "gpt2", "opt", "mixtral", "gpt_oss", "bloom"])
def test_initial_values_follow_the_models_own_distribution(name):
    """Constants are equal; random values have the mean and the spread of a real model's."""
    torch.manual_seed(0)
    real = dict(real_model(name).named_parameters())
    skeleton = build_skeleton(settings(name))
    drawn = dict(init_parameters(skeleton, seed=3))
    assert list(drawn) == list(real)
    for key, expected in real.items():
        assert drawn[key].dtype == torch.float32 and drawn[key].shape == expected.shape
        if expected.std() == 0 or expected.numel() == 1:
            assert torch.equal(drawn[key], expected), key
        else:
            assert not torch.equal(drawn[key], expected), key
            tolerance = 4 / drawn[key].numel() ** 0.5
            assert torch.allclose(drawn[key].std(), expected.std(), rtol=tolerance), key
            assert abs(drawn[key].mean()) < tolerance * drawn[key].std(), key


def test_special_initial_values_are_kept():
    gpt2 = dict(init_parameters(build_skeleton(settings("gpt2", initializer_range=0.5, num_hidden_layers=8)), seed=0))
    assert 0.4 < gpt2["transformer.h.7.mlp.c_fc.weight"].std() < 0.6
    assert 0.1 < gpt2["transformer.h.7.mlp.c_proj.weight"].std() < 0.15  # scaled by 1 / sqrt(2 * n_layer)
    opt = dict(init_parameters(build_skeleton(settings("opt")), seed=0))
    assert not opt["model.decoder.embed_tokens.weight"][0].any()  # the padding row, though the head is tied to it
    assert opt["model.decoder.embed_tokens.weight"][1:].any(dim=1).all()


def test_initial_values_depend_on_the_seed_and_not_on_the_selection():
    skeleton = build_skeleton(settings("llama"))
    everything = dict(init_parameters(skeleton, seed=1))
    torch.manual_seed(123)
    state = torch.get_rng_state()
    layer = dict(init_parameters(skeleton, "model.layers.1", seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert list(layer) == [name for name in everything if name.startswith("model.layers.1.")]
    some = dict(init_parameters(skeleton, ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"], seed=1))
    for name, value in (layer | some).items():
        assert torch.equal(value, everything[name]), name
    other = dict(init_parameters(skeleton, seed=2))
    assert not torch.equal(other["lm_head.weight"], everything["lm_head.weight"])
    first, second = (everything[f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 1))
    assert not torch.equal(first, second)
    with pytest.raises(KeyError, match=r"model\.nowhere"):
        next(init_parameters(skeleton, ["model.nowhere"]))


def test_drawing_leaves_the_skeleton_as_it_was():
    skeleton = build_skeleton(settings("deepseek_v3"))
    skeleton.lm_head.weight.requires_grad_(False)
    skeleton.model.layers[1].mlp.gate.e_score_correction_bias.fill_(7.0)  # a persistent buffer, as if just loaded
    parameters = dict(skeleton.named_parameters())
    for _ in init_parameters(skeleton):
        assert all(p is parameters[name] and p.is_meta for name, p in skeleton.named_parameters())
    assert not skeleton.lm_head.weight.requires_grad
    assert skeleton.model.layers[1].mlp.gate.e_score_correction_bias.eq(7.0).all()
    assert not any(hasattr(tensor, "_is_hf_initialized") for tensor in skeleton.parameters())


def test_a_parameter_that_the_model_never_initialises_is_refused():
    skeleton = build_skeleton(settings("llama"))
    skeleton.model.extra = torch.nn.Parameter(torch.empty(3, device="meta"))
    with pytest.raises(UnsupportedModelError, match=r"model\.extra"):
        list(init_parameters(skeleton))
    assert skeleton.model.extra.is_meta


@pytest.mark.gpu
def test_initial_values_are_drawn_on_the_device():
    skeleton = build_skeleton(settings("mixtral"))
    first = dict(init_parameters(skeleton, device="cuda", seed=1))
    assert {value.device.type for value in first.values()} == {"cuda"}
    for name, value in init_parameters(skeleton, device="cuda", seed=1):
        assert torch.equal(value, first[name]), name


def test_skeleton_of_an_instance_keeps_what_the_user_changed():
    model = real_model("gemma3_text")
    weights = copy.deepcopy(model.state_dict())
    model.model.layers[0].requires_grad_(False)
    model.model.embed_tokens.embed_scale.fill_(3.0)
    model.model.layers[1].self_attn.scaling = 0.125
    model.gradient_checkpointing_enable()
    skeleton = skeleton_from_instance(model)
    assert type(skeleton) is type(model)
    assert all(p.is_meta for p in skeleton.parameters())
    assert named(skeleton.named_parameters()) == named(model.named_parameters())
    assert tied_aliases(skeleton) == tied_aliases(model)
    for (name, ours), (_, theirs) in zip(skeleton.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr(), name
    assert skeleton.model.layers[1].self_attn.scaling == 0.125
    assert model.is_gradient_checkpointing and not skeleton.is_gradient_checkpointing
    for name, value in model.state_dict().items():
        if "embed_scale" not in name:
            assert torch.equal(value, weights[name]), name


def test_an_instance_in_bfloat16_gets_fp32_masters():
    skeleton = skeleton_from_instance(real_model("llama").bfloat16())
    assert {p.dtype for p in skeleton.parameters()} == {torch.float32}


def test_an_instance_without_values_or_head_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"model\.embed_tokens\.weight \(meta"):
        skeleton_from_instance(build_skeleton(settings("llama")))
    with pytest.raises(UnsupportedModelError, match="no language-model head"):
        skeleton_from_instance(real_model("llama").model)
    with pytest.raises(UnsupportedModelError, match="Linear is not a transformers model"):
        skeleton_from_instance(torch.nn.Linear(2, 2))


def test_a_folder_says_what_is_wrong_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "file").touch()
    for path in ("nowhere", "./no/where", "models/llama", "/no/where", "~/no/where/at/all", "file"):
        with pytest.raises(CheckpointError, match="no such folder"):
            resolve_model(path)
    with pytest.raises(CheckpointError, match=r"models has no config\.json"):
        resolve_model("models")
    (tmp_path / "models" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON"):
        build_skeleton("models")
    (tmp_path / "models" / "training_args.bin").touch()
    assert resolve_model("models").has_weights is False
    (tmp_path / "models" / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle.*safetensors"):
        resolve_model("models")
    (tmp_path / "models" / "consolidated.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"has consolidated\.safetensors but neither"):
        resolve_model("models")
    (tmp_path / "models" / "model.safetensors").touch()
    assert resolve_model("models").has_weights is True


def test_a_hub_id_is_downloaded_without_pickles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = {}

    def fake_download(hub_id, **options):
        asked.update(options, hub_id=hub_id)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake_download)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        resolve_model("org/name")
    (tmp_path / "model.safetensors").touch()
    assert resolve_model("org/name", revision="v1").folder == tmp_path
    assert (asked["hub_id"], asked["revision"]) == ("org/name", "v1")
    wanted = [fnmatch.filter(["pytorch_model.bin", "x.pt", "x.py"], pattern) for pattern in asked["allow_patterns"]]
    assert not any(wanted)


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fail(*_args, **_kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"'org/name' is no folder here.*no route to host$"):
        resolve_model("org/name")


def test_custom_code_is_used_when_it_is_trusted(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    auto_map = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"model_type": "mine", "auto_map": auto_map}))
    with pytest.raises(UnsupportedModelError, match="trust_remote_code=true"):
        build_skeleton(tmp_path)
    assert type(build_skeleton(tmp_path, trust_remote_code=True)).__name__ == "MineForCausalLM"
