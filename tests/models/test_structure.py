import pytest
import torch
from torch import nn

from horizon.errors import UnsupportedModelError
from horizon.models.skeleton import build_skeleton
from horizon.models.structure import LastLayerReached, find_structure, tapped

TINY = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# model type -> (further settings, layers, what follows them, layers return tuples, used before the first layer)
FAMILIES = {
    "llama": ({}, "model.layers", ["LlamaRMSNorm"], False, {"model.embed_tokens.weight"}),
    "gemma2": ({"head_dim": 8}, "model.layers", ["Gemma2RMSNorm"], False, {"model.embed_tokens.weight"}),
    "gpt2": ({}, "transformer.h", ["LayerNorm"], False, {"transformer.wte.weight", "transformer.wpe.weight"}),
    "opt": (
        {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "model.decoder.layers",
        ["LayerNorm"],
        False,
        {"model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"},
    ),
    "bloom": (
        {"n_layer": 3, "n_head": 4},
        "transformer.h",
        ["LayerNorm"],
        True,
        {f"transformer.word_embeddings{end}" for end in (".weight", "_layernorm.weight", "_layernorm.bias")},
    ),
    "mixtral": ({"num_local_experts": 4}, "model.layers", ["MixtralRMSNorm"], False, {"model.embed_tokens.weight"}),
}


def skeleton(family):
    return build_skeleton({**TINY, **FAMILIES[family][0], "model_type": family})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_of_a_family_are_found(family):
    _, path, tail, returns_tuple, early = FAMILIES[family]
    model = skeleton(family)
    found = find_structure(model)
    assert found.layers_path == path
    assert found.layers == tuple(model.get_submodule(path)) and len(found.layers) == 3
    assert [type(module).__name__ for module in found.tail] == tail
    assert (found.returns_tuple, found.early) == (returns_tuple, early)


def everything(model):
    """What an analysis could leave behind."""
    modules = {
        name: (id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()
    }
    attributes = {name: sorted(vars(m)) for name, m in model.named_modules()}
    parameters = {name: (id(p), p.is_meta, p.requires_grad) for name, p in model.named_parameters()}
    return modules, attributes, parameters, {name: (id(b), b.clone()) for name, b in model.named_buffers()}


def assert_same(before, after):
    assert before[:3] == after[:3]
    assert before[3].keys() == after[3].keys()
    for name, (identity, value) in before[3].items():
        assert after[3][name][0] == identity and torch.equal(after[3][name][1], value), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_left_as_it_was(family):
    model = skeleton(family)
    before = everything(model)
    find_structure(model)
    assert_same(before, everything(model))


def test_taps_see_every_layers_call_and_leave_when_the_last_one_is_reached():
    model = skeleton("llama")
    structure, before, log = find_structure(model), everything(model), []
    values = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    with tapped(structure, log), pytest.raises(LastLayerReached):
        torch.func.functional_call(model, values, (), {"input_ids": torch.zeros(1, 4, dtype=torch.long)})
    assert [hidden.shape for hidden, _ in log] == [(1, 4, 32)] * 3
    assert all("position_embeddings" in call.kwargs for _, call in log)
    assert_same(before, everything(model))


class Toy(nn.Module):
    """A stack whose forward is given; not a transformers model, which the analysis does not need."""

    def __init__(self, walk, num_lists=1):
        super().__init__()
        self.config = type("Config", (), {"num_hidden_layers": 3})
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        if num_lists == 2:
            self.adapters = nn.ModuleList(nn.Linear(8, 1) for _ in range(3))
        self.norm = nn.LayerNorm(8)
        self.walk = walk

    def forward(self, input_ids, use_cache):
        return (self.walk(self, self.embed(input_ids)),)


def chain(m, h):
    for layer in m.layers:
        h = layer(h)
    return m.norm(h)


def chain_of_tuples(m, h):
    for layer in m.layers:
        h = layer(h)[0]
    return m.norm(h)


def skip_connections(m, h):
    first = h
    for layer in m.layers:
        h = layer(h) + first
    return m.norm(h)


def scaled_between_layers(m, h):
    for i, layer in enumerate(m.layers):
        h = layer(2 * h if i == 1 else h)
    return m.norm(h)


def every_layer_twice(m, h):
    for layer in (*m.layers, *m.layers):
        h = layer(h)
    return m.norm(h)


def only_two_layers(m, h):
    for layer in m.layers[:2]:
        h = layer(h)
    return m.norm(h)


def a_branch_beside_the_norm(m, h):
    for layer in m.layers:
        h = layer(h)
    return m.norm(h) + h


def scaled_after_the_norm(m, h):
    return 2 * chain(m, h)


def reads_a_layers_own_weight(m, h):
    for layer in m.layers:
        h = layer(h)
        if not layer.absent:
            break
    return m.norm(h)


@pytest.mark.parametrize(("walk", "returns_tuple"), [(chain, False), (chain_of_tuples, True)])
def test_a_plain_chain_is_taken(walk, returns_tuple):
    model = Toy(walk)
    found = find_structure(model)
    assert (found.layers_path, found.returns_tuple) == ("layers", returns_tuple)
    assert (found.tail, found.early) == ((model.norm,), {"embed.weight"})


def test_of_two_lists_the_one_with_more_parameters_holds_the_layers():
    assert find_structure(Toy(chain, num_lists=2)).list_name == "layers"


@pytest.mark.parametrize(
    "walk",
    [
        skip_connections,
        scaled_between_layers,
        every_layer_twice,
        only_two_layers,
        a_branch_beside_the_norm,
        scaled_after_the_norm,
    ],
)
def test_layers_that_are_no_chain_are_refused(walk):
    model = Toy(walk)
    before = everything(model)
    with pytest.raises(
        UnsupportedModelError, match=r"^Toy: its 3 layers in \.layers are not a chain in which each one"
    ):
        find_structure(model)
    assert_same(before, everything(model))


def test_a_forward_that_stumbles_over_a_tap_is_refused_with_its_error():
    model = Toy(reads_a_layers_own_weight)
    before = everything(model)
    with pytest.raises(UnsupportedModelError, match=r"not a chain .*its forward fails with AttributeError.*absent"):
        find_structure(model)
    assert_same(before, everything(model))


def test_a_forward_that_fails_before_the_first_layer_is_refused_with_its_error():
    def fails(m, h):
        raise ValueError("needs pixel_values")

    with pytest.raises(
        UnsupportedModelError, match="Toy: its forward fails before the first layer: needs pixel_values"
    ):
        find_structure(Toy(fails))


def test_a_model_without_a_list_of_that_many_layers_is_refused():
    model = Toy(chain)
    model.config.num_hidden_layers = 7
    with pytest.raises(
        UnsupportedModelError, match=r"Toy: found no list of 7 decoder layers \(config.num_hidden_layers"
    ):
        find_structure(model)
