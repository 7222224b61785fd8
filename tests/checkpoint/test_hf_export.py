import json
import shutil
from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from horizon.checkpoint import hf_export
from horizon.checkpoint.conversion import as_meta
from horizon.checkpoint.hf_export import export_model
from horizon.checkpoint.hf_import import import_weights
from horizon.checkpoint.shards import write_shard
from horizon.errors import CheckpointError
from horizon.models.skeleton import build_skeleton, skeleton_from_instance

MODELS = ["llama", "gpt2", "gpt_neox", "mixtral", "qwen3_moe", "gpt_oss", "gemma3_text", "deepseek_v3"]


def reader(model):
    return dict(model.named_parameters()).__getitem__


def export(folder, model, dtype=torch.float32, **options):
    export_model(folder, skeleton_from_instance(model), reader(model), dtype, **options)


def same_files(folder, model, tmp_path, dtype=torch.float32):
    """The tensors on disk are those that transformers writes, under its names."""
    model.to(dtype).save_pretrained(tmp_path / "reference")
    ours, theirs = ({}, {})
    for path, tensors in ((folder, ours), (tmp_path / "reference", theirs)):
        for file in path.glob("*.safetensors"):
            tensors.update(load_file(file))
            with safe_open(file, framework="pt") as opened:
                assert opened.metadata() == {"format": "pt"}
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_model_is_what_transformers_loads(name, tiny_model, tmp_path):
    model = tiny_model(name)
    export(tmp_path / "out", model)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(loaded) is type(model)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    same_files(tmp_path / "out", model, tmp_path)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(name, dtype, tiny_model, tmp_path):
    model = tiny_model(name)
    export(tmp_path / "out", model, dtype)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype)[6:]
    same_files(tmp_path / "out", model, tmp_path, dtype)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == dtype


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_shards_are_bounded_and_indexed(name, tiny_model, tmp_path):
    model = tiny_model(name)
    limit = 60_000
    export(tmp_path / "out", model, max_shard_size=limit)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored = {name: file for file in files for name in load_file(tmp_path / "out" / file)}
    assert index["weight_map"] == stored
    sizes = [sum(t.nbytes for t in load_file(tmp_path / "out" / file).values()) for file in files]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert len(files) > 1
    largest = max(p.nbytes for p in model.parameters())  # one parameter is not cut
    assert max(sizes) <= max(limit, largest)
    same_files(tmp_path / "out", model, tmp_path)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "mixtral", "gpt2"])
def test_export_and_import_are_inverse(name, tiny_model, tmp_path):
    model = tiny_model(name)
    export(tmp_path / "out", model, max_shard_size=30_000)
    written = {}
    import_weights(tmp_path / "out", build_skeleton(tmp_path / "out"), written.__setitem__)
    assert written.keys() == dict(model.named_parameters()).keys()
    for key, value in model.named_parameters():
        assert torch.equal(written[key], value), key


def test_each_parameter_is_read_once_and_freed(tiny_model, tmp_path):
    model = tiny_model("qwen3_moe")
    reads = []

    def read(name):
        reads.append(name)
        return model.get_parameter(name).detach()

    export_model(tmp_path / "out", skeleton_from_instance(model), read, torch.bfloat16, max_shard_size=60_000)
    assert sorted(reads) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("name", ["mixtral", "gpt_neox"])
def test_an_instance_that_was_loaded_from_files_is_written_as_such_files(name, tiny_model, tmp_path):
    tiny_model(name).save_pretrained(tmp_path / "source")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    export(tmp_path / "out", loaded)
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "source"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_generation_config_and_tokenizer_go_along(tiny_model, tmp_path):
    model = tiny_model("llama")
    model.generation_config = GenerationConfig(temperature=0.25, do_sample=False)  # save_pretrained would refuse this

    class Tokenizer:
        def save_pretrained(self, folder):
            (tmp_path / folder / "tokenizer.json").write_text("{}")

    export(tmp_path / "out", model, tokenizer=Tokenizer())
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.25
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert build_skeleton(tmp_path / "out").generation_config.temperature == 0.25


def test_parameters_kept_in_fp32_by_the_class_stay_exact(tiny_model, tmp_path):
    model = tiny_model("llama")
    skeleton = skeleton_from_instance(model)
    skeleton._keep_in_fp32_modules_strict = {"model.norm"}
    export_model(tmp_path / "out", skeleton, reader(model), torch.bfloat16)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["model.norm.weight"], model.model.norm.weight)
    assert stored["lm_head.weight"].dtype == torch.bfloat16


def test_custom_code_goes_along(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    auto_map = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
             "num_attention_heads": 1}  # fmt: skip
    (source / "config.json").write_text(json.dumps(sizes | {"model_type": "mine", "auto_map": auto_map}))
    skeleton = build_skeleton(source, trust_remote_code=True)
    values = {name: torch.randn(p.shape) for name, p in skeleton.named_parameters()}
    export_model(tmp_path / "out", skeleton, values.__getitem__, torch.float32)
    shutil.rmtree(source)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(loaded).__name__ == "MineForCausalLM"
    for name, value in values.items():
        assert torch.equal(loaded.get_parameter(name), value), name


def test_an_earlier_model_is_replaced_whole(tiny_model, tmp_path):
    model = tiny_model("llama")
    export(tmp_path / "out", model, max_shard_size=30_000)
    with torch.no_grad():
        model.lm_head.weight += 1
    export(tmp_path / "out", model)
    assert sorted(path.name for path in (tmp_path / "out").glob("model*")) == ["model.safetensors"]
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"], model.lm_head.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("files", [["notes.txt"], ["config.json", "metrics.jsonl"], ["model.safetensors"]])
def test_a_folder_of_something_else_is_refused(files, tiny_model, tmp_path):
    (tmp_path / "out").mkdir()
    for name in files:
        (tmp_path / "out" / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=f"out holds {files[-1]}, so it is not replaced"):
        export(tmp_path / "out", tiny_model("llama"))
    assert contents(tmp_path) == before


def test_a_file_in_the_way_is_refused_and_an_empty_folder_is_used(tiny_model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file is a file"):
        export(tmp_path / "file", tiny_model("llama"))
    with pytest.raises(CheckpointError, match="could not be written"):
        export(tmp_path / "file" / "below", tiny_model("llama"))
    (tmp_path / "empty").mkdir()
    export(tmp_path / "empty", tiny_model("llama"))
    assert (tmp_path / "empty" / "model.safetensors").is_file()


@pytest.mark.parametrize("earlier", [False, True])
def test_a_failure_leaves_what_was_there(earlier, tiny_model, tmp_path):
    model = tiny_model("llama")
    if earlier:
        export(tmp_path / "out", model)
    before = contents(tmp_path)
    parameters = dict(model.named_parameters())

    def read(name):
        if name == "model.norm.weight":
            raise RuntimeError("a worker died")
        return parameters[name]

    with pytest.raises(RuntimeError, match="a worker died"):
        export_model(tmp_path / "out", skeleton_from_instance(model), read, torch.float32)
    assert contents(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == earlier


def test_a_rename_that_fails_brings_the_earlier_model_back(tiny_model, tmp_path, monkeypatch):
    model = tiny_model("llama")
    export(tmp_path / "out", model)
    before = contents(tmp_path)
    rename = hf_export.Path.rename

    def fail_for_the_new(self, target):
        if self.name == ".out.partial":
            raise OSError("device gone")
        return rename(self, target)

    monkeypatch.setattr(hf_export.Path, "rename", fail_for_the_new)
    with pytest.raises(CheckpointError, match=r"could not be written to .*out: device gone"):
        export(tmp_path / "out", model)
    assert contents(tmp_path) == before


def test_leftovers_of_a_killed_export_do_not_matter(tiny_model, tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model.safetensors").write_text("half")
    export(tmp_path / "out", tiny_model("llama"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_room_is_checked_before_anything_is_written(tiny_model, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(0, 0, 1 << 20))
    with pytest.raises(CheckpointError, match=r"needs 64\.\d MiB in .* but 1 MiB is free"):
        export(tmp_path / "out", tiny_model("llama"))
    assert not list(tmp_path.iterdir())


@settings(max_examples=40, deadline=None)
@given(
    tensors=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.lists(st.integers(0, 5), max_size=3),
            st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8]),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_any_tensors_survive_a_shard(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("shard") / "x.safetensors"
    ordered = sorted(tensors.items(), key=lambda item: -item[1][1].itemsize)
    values = {name: torch.randint(0, 2, shape).to(dtype) for name, (shape, dtype) in ordered}
    write_shard(path, {name: as_meta(t.shape, t.dtype) for name, t in values.items()}, values.items())
    loaded = load_file(path)
    assert loaded.keys() == values.keys()
    for name, value in values.items():
        assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value), name
