import copy

import pytest
import torch
from torch import nn

from horizon.check import materialised
from horizon.errors import ConfigError, UnsupportedModelError
from horizon.models.blocks import BlockModel, block_parameters
from horizon.models.linear import Linears
from horizon.models.skeleton import build_skeleton

TINY = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 4},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "gpt_neox": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "max_position_embeddings": 131072},
}


class Sums(dict):
    def add_product(self, name, grad, x):
        self[name] = self.get(name, 0) + grad.t() @ x


def skeleton(family="llama", **changes):
    return build_skeleton({**TINY, **FAMILIES[family], **changes, "model_type": family.split(",")[0]})


def blocks(family="llama", **changes):
    return BlockModel(skeleton(family, **changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_placed_exactly_once_in_the_block_that_uses_it(family):
    model = blocks(family)
    placed = [p.name for lay in model.layouts for p in lay.params]
    assert sorted(placed) == sorted(model.parameter_names) == sorted(set(placed))
    assert [lay.name for lay in model.layouts] == ["embed", "layers.0", "layers.1", "head"]
    assert [lay.index for lay in model.layouts] == [0, 1, 2, 3]
    for layout in model.layouts:
        owner = model.structure.layers[layout.index - 1] if layout.index in (1, 2) else model.skeleton
        for p in layout.params:
            assert owner.get_parameter(p.spec.local_name) is model.skeleton.get_parameter(p.name)
            assert tuple(owner.get_parameter(p.spec.local_name).shape) == p.spec.shape


def test_the_blocks_of_a_llama():
    names = [[p.name for p in lay.params] for lay in blocks("llama").layouts]
    assert names[0] == ["model.embed_tokens.weight"]
    assert names[3] == ["model.norm.weight", "lm_head.weight"]
    assert len(names[1]) == 9 and all(name.startswith("model.layers.0.") for name in names[1])


def test_position_embeddings_belong_to_the_embedding_and_the_final_norm_to_the_head():
    layouts = blocks("gpt2").layouts
    assert [p.name for p in layouts[0].params] == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert [p.name for p in layouts[3].params] == ["transformer.ln_f.weight", "transformer.ln_f.bias"]


def test_a_tied_head_borrows_the_embeddings_weight_and_others_borrow_nothing():
    tied, untied = blocks("llama, tied"), blocks("llama")
    (borrowed,) = tied.layouts[3].borrowed
    assert (borrowed.local_name, borrowed.owner) == ("lm_head.weight", 0)
    assert borrowed.param == tied.layouts[0].params[0]
    assert not any(lay.borrowed for lay in (*tied.layouts[:3], *untied.layouts))


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_decay_is_for_matrices_not_for_norms_biases_and_vectors(family):
    undecayed = {p.name for lay in blocks(family).layouts for p in lay.params if not p.spec.decay}
    model = skeleton(family)
    for name, parameter in model.named_parameters():
        is_norm = "norm" in type(model.get_submodule(name.rpartition(".")[0])).__name__.lower()
        assert (name in undecayed) == (parameter.dim() < 2 or is_norm or "bias" in name), name
    assert any("norm" in name or ".ln_" in name for name in undecayed)


def test_weight_decay_of_a_layer_by_name():
    decayed = [p.spec.local_name for p in blocks("gpt2").layouts[1].params if p.spec.decay]
    assert decayed == ["attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"]
    two_dimensional_bias = "mlp.experts.gate_up_proj_bias"
    flags = {p.spec.local_name: p.spec.decay for p in blocks("gpt_oss").layouts[1].params}
    assert (flags[two_dimensional_bias], flags["mlp.experts.gate_up_proj"]) == (False, True)


def test_frozen_parameters_follow_the_trained_ones():
    model = BlockModel(skeleton(), freeze=["*.self_attn.*", "model.embed_tokens.weight"])
    frozen = {p.name for lay in model.layouts for p in lay.params if not p.spec.trainable}
    expected = {n for n in model.parameter_names if ".self_attn." in n} | {"model.embed_tokens.weight"}
    assert frozen == expected
    assert model.layouts[0].num_trainable == 0
    for layout in model.layouts:
        assert all((p.offset >= layout.num_trainable) == (p.name in frozen) for p in layout.params)


def test_a_pattern_that_freezes_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"model.freeze='layers.0.*' matches no parameter; names look like 'model\."):
        BlockModel(skeleton(), freeze=["model.norm.*", "layers.0.*"])


def test_freezing_everything_is_refused():
    with pytest.raises(ConfigError, match="leaves no parameter to train"):
        BlockModel(skeleton(), freeze=["*"])


def test_dropping_whole_layers_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"config.layerdrop=0.1: dropping whole layers is not supported"):
        blocks("opt", layerdrop=0.1)


def test_layers_that_share_parameters_are_refused_by_name():
    model = skeleton()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(UnsupportedModelError, match=r"shared in a way blocks cannot express: model\.layers\.1\.mlp"):
        BlockModel(model)


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {}, False),
        ("llama", {"attention_dropout": 0.1}, True),
        ("gpt2", {"resid_pdrop": 0.1}, True),
        ("mixtral", {"router_jitter_noise": 0.1}, True),
    ],
)
def test_random_numbers_in_a_forward_are_known(family, changes, expected):
    assert blocks(family, **changes).uses_dropout() is expected


def test_inputs_that_the_model_does_not_take_are_refused():
    blocks("llama").check_inputs(["attention_mask", "input_ids", "position_ids"])
    with pytest.raises(ConfigError, match=r"BloomForCausalLM does not take 'position_ids'.*data.packing=false"):
        blocks("bloom").check_inputs(["input_ids", "position_ids"])


def values_of(model, reference):
    """Per block its parameters by local name, leaves that ask for gradients, from an ordinary model."""
    of = dict(reference.named_parameters())
    found = []
    for layout in model.layouts:
        own = {p.spec.local_name: of[p.name] for p in layout.params}
        own |= {b.local_name: of[b.param.name] for b in layout.borrowed}
        found.append({name: value.detach().clone().requires_grad_() for name, value in own.items()})
    return found


def inputs():
    tokens = torch.randint(3, 96, (2, 6), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}


@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_gives_the_models_logits_bit_for_bit_and_leaves_no_trace(family):
    source = skeleton(family)
    reference, model = materialised(source).eval(), BlockModel(source)
    model.train(False)
    before = {name: (id(p), p.is_meta) for name, p in model.skeleton.named_parameters()}
    params = values_of(model, reference)
    with torch.no_grad():
        hidden, calls = model.embed(params[0], inputs())
        for block in (1, 2):
            hidden = model.layer(block, params[block], hidden, calls[block - 1])
        logits = model.logits(params[3], hidden)
        expected = reference(**inputs(), use_cache=False).logits
    assert torch.equal(logits, expected)
    assert {name: (id(p), p.is_meta) for name, p in model.skeleton.named_parameters()} == before
    assert "forward" not in vars(model.structure.owner)
    assert tuple(model.skeleton.get_submodule(model.structure.layers_path)) == model.structure.layers


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recomputation_has_the_gradients_of_the_forward(family):
    source = skeleton(family)
    model, reference = BlockModel(source), materialised(source)
    params = values_of(model, reference)
    hidden, calls = model.embed(params[0], inputs())
    generator = torch.Generator().manual_seed(1)
    hidden = hidden.detach().requires_grad_()
    grad_output = torch.randn(hidden.shape, generator=generator)
    wanted = [hidden, *params[1].values()]
    expected = torch.autograd.grad(model.layer(1, params[1], hidden, calls[0]), wanted, grad_output, allow_unused=True)
    kept = []
    with torch.no_grad():
        model.layer(1, params[1], hidden, calls[0], kept)
    for outputs in ((), (), kept):  # the first one may learn what the second leaves out
        sums = Sums()
        output = model.recompute(1, params[1], hidden, calls[0], sums, outputs)
        found = torch.autograd.grad(output, wanted, grad_output, allow_unused=True)
        for name, value, wish in zip(["hidden", *params[1]], found, expected, strict=True):
            value = sums.get(name, value)
            assert (value is None and wish is None) or torch.equal(value, wish), name


def test_kept_outputs_are_not_multiplied_again(monkeypatch):
    source = skeleton()
    model = BlockModel(source)
    params = values_of(model, materialised(source))
    hidden, calls = model.embed(params[0], inputs())
    kept = []
    with torch.no_grad():
        model.layer(1, params[1], hidden, calls[0], kept)
    model.recompute(1, params[1], hidden, calls[0], Sums(), kept)  # finds the last projection
    products = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: products.append(args) or linear(*args))
    model.recompute(1, params[1], hidden, calls[0], Sums(), kept)
    assert len(kept) == 7 and products == []
    model.recompute(1, params[1], hidden, calls[0], Sums())
    assert len(products) == 6  # all but the last projection


def test_an_output_that_is_overwritten_later_is_kept_as_it_was():
    class Overwriting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

        def forward(self, x):
            y = self.one(x)
            z = self.two(y)
            y.data.mul_(2)  # as a fused kernel does, unseen by autograd
            return z + y

    module, x = Overwriting(), torch.randn(2, 3)
    linears = Linears(module, {"one.weight", "two.weight"})
    with torch.no_grad():
        expected = [module.one(x), module.two(module.one(x))]
        for _ in range(2):  # the first run finds out which
            kept = []
            with linears.keeping(kept, tail=None):
                module(x)
            assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))


def test_a_failing_block_leaves_the_model_as_it_was():
    source = skeleton()
    model, params = BlockModel(source), values_of(BlockModel(copy.deepcopy(source)), materialised(source))
    hidden, calls = model.embed(params[0], inputs())
    with pytest.raises(RuntimeError):
        model.layer(1, params[1], hidden[..., :5], calls[0])
    with pytest.raises(RuntimeError):
        model.logits(params[3], hidden[..., :5])
    with pytest.raises(IndexError):
        model.embed(params[0], {"input_ids": torch.full((1, 2), 96)})
    assert all(p.is_meta for p in model.skeleton.parameters())
    assert "forward" not in vars(model.structure.owner)
    assert tuple(model.skeleton.get_submodule(model.structure.layers_path)) == model.structure.layers


def test_parameters_are_views_of_the_flat_slot():
    layout = blocks("llama, tied").layouts[3]
    flat = torch.arange(layout.num_slot_elements, dtype=torch.float32)
    views = block_parameters(layout, flat)
    for name, offset, shape in layout.slot_ranges():
        assert torch.equal(
            views[name].flatten(), torch.arange(offset, offset + nn.Parameter(torch.empty(shape)).numel())
        )
        assert views[name].untyped_storage().data_ptr() == flat.data_ptr()
