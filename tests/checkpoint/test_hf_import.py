import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from horizon.checkpoint.hf_import import import_weights
from horizon.errors import CheckpointError
from horizon.models.skeleton import build_skeleton

MODELS = ["llama", "gpt2", "gpt_neox", "mixtral", "qwen3_moe", "gpt_oss", "gemma3_text", "deepseek_v3"]


def load(folder, skeleton=None):
    """Every tensor that an import hands on, by name; none of them twice."""
    skeleton = skeleton or build_skeleton(folder)
    written = {}

    def write(name, tensor):
        assert name not in written
        written[name] = tensor

    import_weights(folder, skeleton, write)
    return skeleton, written


def assert_loaded(folder, model):
    skeleton, written = load(folder)
    expected = dict(model.named_parameters())
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        assert written[name].dtype == value.dtype and torch.equal(written[name], value), name
    stored = model.state_dict().keys() & dict(model.named_buffers())
    for name in stored:
        assert torch.equal(skeleton.get_buffer(name), model.get_buffer(name)), name
    assert all(p.is_meta for p in skeleton.parameters())


@pytest.fixture
def llama(tiny_model, tmp_path):
    """Folder of a llama in one file, and its tensors."""
    tiny_model("llama").save_pretrained(tmp_path)
    return tmp_path, load_file(tmp_path / "model.safetensors")


def refused(folder, match):
    """The error of an import that must fail before it has written anything."""
    written = []
    with pytest.raises(CheckpointError, match=match) as caught:
        import_weights(folder, build_skeleton(folder), lambda name, _tensor: written.append(name))
    assert not written
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", MODELS)
def test_import_gives_what_transformers_saved(name, tiny_model, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    assert_loaded(tmp_path, model)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_as_stored(name, dtype, tiny_model, tmp_path):
    model = tiny_model(name, dtype)
    model.save_pretrained(tmp_path)
    assert_loaded(tmp_path, model)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_experts_and_layers_spread_over_shards(name, tiny_model, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_loaded(tmp_path, model)


def test_experts_already_merged_on_disk_load_too(tiny_model, tmp_path):
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path, save_original_format=False)
    assert_loaded(tmp_path, model)


def test_a_checkpoint_of_the_bare_model_loads_when_the_head_is_tied(tiny_model, tmp_path):
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path)
    model.transformer.save_pretrained(tmp_path)
    assert "wte.weight" in load_file(tmp_path / "model.safetensors")
    assert_loaded(tmp_path, model)


def test_a_checkpoint_of_the_bare_model_lacks_an_untied_head(tiny_model, tmp_path):
    model = tiny_model("llama")
    model.model.save_pretrained(tmp_path)
    assert "1 missing: lm_head.weight" in refused(tmp_path, "do not fit LlamaForCausalLM")


@pytest.mark.parametrize("present", [("head",), ("embedding",), ("embedding", "head")])
def test_a_tied_weight_may_be_stored_under_either_name_or_both(present, tiny_model, tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    weight = tensors.pop("model.embed_tokens.weight")
    names = {"head": "lm_head.weight", "embedding": "model.embed_tokens.weight"}
    save_file(tensors | {names[key]: weight.clone() for key in present}, tmp_path / "model.safetensors")
    assert_loaded(tmp_path, model)


def test_a_tied_weight_that_is_absent_is_missed_once(tiny_model, tmp_path):
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert refused(tmp_path, "1 missing").endswith("1 missing: model.embed_tokens.weight")


def test_tied_weights_that_differ_are_refused(tiny_model, tmp_path):
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    refused(tmp_path, "model.embed_tokens.weight and lm_head.weight.*tie_word_embeddings=false")


def test_missing_unexpected_and_misshapen_tensors_are_named_in_one_line(llama):
    folder, tensors = llama
    for index in range(2):
        del tensors[f"model.layers.{index}.mlp.up_proj.weight"], tensors[f"model.layers.{index}.mlp.down_proj.weight"]
    tensors["model.norm.weight"] = torch.zeros(31)
    tensors["model.vision.weight"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors")
    message = refused(folder, "do not fit LlamaForCausalLM")
    assert "4 missing: model.layers.0.mlp.up_proj.weight, model.layers.0.mlp.down_proj.weight, " in message
    assert ", ...; 1 unexpected: model.vision.weight; " in message
    assert "1 of another shape: model.norm.weight ([31] on disk, [32] in the model)" in message


def test_a_missing_expert_is_noticed(tiny_model, tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    del tensors["model.layers.0.block_sparse_moe.experts.3.w3.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    message = refused(tmp_path, "2 of another shape")
    assert "model.layers.1.mlp.experts.down_proj ([3, 32, 48] on disk, [4, 32, 48] in the model)" in message
    assert "model.layers.0.mlp.experts.gate_up_proj (from 7 tensors: " in message


def test_leftovers_that_the_class_declares_are_ignored(tiny_model, tmp_path):
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_loaded(tmp_path, model)


def test_stored_rotary_buffers_of_old_checkpoints_are_ignored(llama):
    folder, tensors = llama
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, folder / "model.safetensors")
    skeleton, written = load(folder)
    assert len(written) == len(dict(skeleton.named_parameters()))
    assert skeleton.model.rotary_emb.inv_freq[0] == 1.0


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_integers_and_fp8_are_refused_for_parameters(dtype, llama):
    folder, tensors = llama
    tensors["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(32, 32).to(dtype)
    save_file(tensors, folder / "model.safetensors")
    message = refused(folder, "1 of a dtype that is not trained")
    assert f"model.layers.1.self_attn.q_proj.weight ({str(dtype)[6:]})" in message


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_named(keep, llama):
    folder, _ = llama
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:keep])
    refused(folder, r"model\.safetensors is truncated or damaged")


def test_a_damaged_header_is_named(llama):
    folder, _ = llama
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[8:16] = b"\xff" * 8
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, r"model\.safetensors is truncated or damaged")


def test_a_folder_without_weights_is_refused(llama):
    folder, _ = llama
    (folder / "model.safetensors").unlink()
    refused(folder, r"has neither model\.safetensors nor model\.safetensors\.index\.json")


@pytest.fixture
def sharded(tiny_model, tmp_path):
    """Folder of a llama in several shards, and its index."""
    tiny_model("llama").save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model", json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())


def rewrite(folder, index):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_an_index_may_not_leave_the_folder(sharded):
    folder, index = sharded
    shard = index["weight_map"]["model.norm.weight"]
    shutil.copy(folder / shard, folder.parent / "outside.safetensors")
    absolute = str(folder.parent / "outside.safetensors")
    for path in ("../outside.safetensors", absolute, "a/../../outside.safetensors", "", 3):
        index["weight_map"]["model.norm.weight"] = path
        rewrite(folder, index)
        refused(folder, "places model.norm.weight in .* not a file of the folder")


def test_faults_of_an_index_are_named(sharded):
    folder, index = sharded
    shard = index["weight_map"]["model.norm.weight"]
    rewrite(folder, index | {"weight_map": index["weight_map"] | {"model.extra.weight": shard}})
    refused(folder, f"{shard} lacks model.extra.weight")
    shutil.copy(folder / shard, folder / "copy.safetensors")
    rewrite(folder, index | {"weight_map": index["weight_map"] | {"model.norm.weight": "copy.safetensors"}})
    refused(folder, f"is both in .*{shard} and in .*copy.safetensors")
    rewrite(folder, index)
    (folder / shard).unlink()
    refused(folder, f"{shard} is missing")
    rewrite(folder, {"metadata": {}})
    refused(folder, "has no weight_map")
    (folder / "model.safetensors.index.json").write_text("{")
    refused(folder, "cannot be read as JSON")


def test_an_error_of_the_store_passes_through(llama):
    folder, _ = llama

    def write(_name, _tensor):
        raise MemoryError("full")

    with pytest.raises(MemoryError, match="full"):
        import_weights(folder, build_skeleton(folder), write)
