"""A model's shape: taken from its code once, kept, and the same when it is read again."""

import json

import pytest

from horizon.errors import CheckpointError
from horizon.forecast import shapes
from horizon.forecast.shapes import open_shape
from horizon.models.blocks import BlockModel
from horizon.models.skeleton import build_skeleton
from tests.forecast.conftest import SMALL, settings
from tests.forecast.test_imagined import MODELS


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "horizon" / "shapes"


@pytest.fixture
def looked(monkeypatch):
    """Counts the models that were taken apart."""
    calls, look = [], shapes._look
    monkeypatch.setattr(shapes, "_look", lambda *arguments: calls.append(arguments) or look(*arguments))
    return calls


@pytest.mark.parametrize("freeze", [[], ["*norm*"]], ids=["all trained", "partly frozen"])
@pytest.mark.parametrize("name", MODELS)
def test_a_kept_shape_is_that_of_the_model(looked, name, freeze):
    config = settings(MODELS[name], model__freeze=freeze)
    first, again = open_shape(config), open_shape(config)
    assert len(looked) == 1 and again == first
    model = BlockModel(build_skeleton(MODELS[name]), freeze)
    assert again.layouts == model.layouts and again.max_positions == model.max_positions
    assert again.num_parameters == model.num_parameters
    assert again.num_trainable == sum(p.numel() for p in model.skeleton.parameters() if p.requires_grad)
    assert (again.hidden_size, again.vocab_size) == (model.hidden_size, model.vocab_size)
    assert again.buffer_bytes == sum(buffer.nbytes for buffer in model.skeleton.buffers())
    assert again.architecture == type(model.skeleton).__name__


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "\x00" * 40,
        lambda text: "[]",
        lambda text: text.replace('"head": ', '"head": 1'),
    ],
    ids=["cut", "empty", "zeros", "a list", "another number"],
)
def test_a_damaged_file_is_made_again(looked, own_cache, damage):
    first = open_shape(settings())
    (path,) = own_cache.iterdir()
    whole = path.read_text()
    path.write_text(damage(whole))
    assert open_shape(settings()) == first and len(looked) == 2
    assert path.read_text() == whole


def test_another_model_library_or_code_is_looked_at_anew(looked, own_cache, monkeypatch):
    open_shape(settings())
    open_shape(settings(SMALL | {"hidden_act": "relu"}))
    open_shape(settings(model__freeze=["*norm*"]))
    monkeypatch.setattr(shapes.metadata, "version", lambda library: "99.0")
    open_shape(settings())
    monkeypatch.setattr(shapes, "_digest", lambda file: "other code")
    open_shape(settings())
    assert len(looked) == len(list(own_cache.iterdir())) == 5


def test_code_that_comes_with_a_model_is_looked_at_every_time(looked, own_cache):
    for _ in range(2):
        open_shape(settings(model__trust_remote_code=True))
    assert len(looked) == 2 and not own_cache.exists()


def test_where_nothing_can_be_kept_the_model_is_looked_at(looked, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert open_shape(settings()) == open_shape(settings()) and len(looked) == 2


def test_a_preset_without_a_vocabulary_gets_the_tokenizers():
    config = settings({key: value for key, value in SMALL.items() if key != "vocab_size"})
    config.data.vocab_size = 777
    assert open_shape(config).vocab_size == 777
    config.data.tokenizer = "bytes"
    assert 256 <= open_shape(config).vocab_size < 300


def test_a_folder_is_known_by_its_config_and_its_weights_are_not_read(tmp_path, looked):
    config_file = tmp_path / "config.json"
    config_file.write_text(json.dumps(SMALL | {"architectures": ["LlamaForCausalLM"]}))
    (tmp_path / "model.safetensors").write_bytes(b"no weights at all")
    config = settings()
    config.model.path, config.model.config = str(tmp_path), {}
    assert open_shape(config) == open_shape(config) and len(looked) == 1
    assert open_shape(config).architecture == "LlamaForCausalLM"
    config_file.write_text(json.dumps(SMALL | {"num_hidden_layers": 2}))
    assert len(open_shape(config).layouts) == 4 and len(looked) == 2
    config_file.unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_shape(config)
