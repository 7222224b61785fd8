"""Which adapters a model may have, and what it is given."""

import builtins
import importlib.util
import math
import sys

import pytest
import torch

import horizon
from horizon.errors import ConfigError, UnsupportedModelError
from horizon.models.adapters import Adapted, adapter_of, attach, draw_adapter, saved_form
from horizon.models.skeleton import build_skeleton, open_model, skeleton_from_instance
from tests.parity.adapters import adapted, peft
from tests.parity.reference import BASE, build, engine_for

CONFIG = {"model_type": "llama", **BASE}


def two_adapters():
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    return model


def merged():
    model = adapted()
    model.merge_adapter()
    return model


def disabled():
    model = adapted()
    model.base_model.disable_adapter_layers()
    return model


def unfrozen():
    model = adapted()
    model.get_parameter("base_model.model.model.norm.weight").requires_grad_(True)
    return model


REFUSED = {
    "part of the base": (unfrozen, r"model.norm.weight is trained, but not saved with the adapter; freeze it"),
    "two adapters": (two_adapters, r"has 2 adapters \(default, other\); delete all but one"),
    "merged": (merged, r"the adapter of model.layers.0.self_attn.q_proj is merged; unmerge"),
    "disabled": (disabled, r"is disabled; unmerge and enable it"),
    "DoRA": (lambda: adapted(use_dora=True), r"q_proj is a variant of LoRA \(DoRA or such\); only plain LoRA"),
    "an embedding": (lambda: adapted(target_modules=["embed_tokens"]), r"embed_tokens adapts an embedding"),
    "whole modules": (
        lambda: adapted(modules_to_save=["lm_head"]),
        r"lm_head is ModulesToSaveWrapper; only plain LoRA",
    ),
    "biases": (lambda: adapted("gpt2", bias="all"), r"bias='all' trains biases of the base"),
    "experts": (
        lambda: adapted("mixtral", target_parameters=["experts.down_proj"]),
        r"experts adapts down_proj; name targets that are linear layers",
    ),
    "another method": (
        lambda: peft.get_peft_model(build("llama"), peft.IA3Config(task_type="CAUSAL_LM")),
        r"has an adapter of kind IA3; only LORA is supported",
    ),
    "another method's layers": (
        lambda: peft.inject_adapter_in_model(peft.IA3Config(), build("llama")),
        r"is Linear; only plain LoRA",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_other_adapters_are_refused_by_name(make, message):
    with pytest.raises(UnsupportedModelError, match=message):
        open_model(make())


def test_an_adapter_that_is_loaded_to_be_used_has_nothing_to_train(tmp_path):
    adapted().save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(build("llama"), tmp_path)
    with pytest.raises(ConfigError, match=r"requires a gradient; load adapters with is_trainable=True"):
        engine_for(model)
    with engine_for(peft.PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True)):
        pass


def test_the_skeleton_of_a_peft_model_is_the_model_inside_and_leaves_it_as_it_is():
    model = adapted()
    skeleton, weights = open_model(model)
    assert weights is model.get_base_model()
    assert {n: p.requires_grad for n, p in skeleton.named_parameters()} == {
        n: p.requires_grad for n, p in weights.named_parameters()
    }
    assert all(p.is_meta for p in skeleton.parameters()) and not any(p.is_meta for p in model.parameters())


def test_settings_give_a_skeleton_the_adapter_that_peft_would_give_the_model():
    lora = horizon.LoraConfig(rank=4, alpha=6, dropout=0.1, targets=["q_proj", "down_proj"])
    skeleton, weights = open_model(CONFIG, lora=lora)
    theirs = adapted(lora_alpha=6, lora_dropout=0.1, target_modules=["q_proj", "down_proj"]).get_base_model()
    assert isinstance(weights, Adapted)
    found, expected = (
        {n: (p.shape, p.requires_grad) for n, p in model.named_parameters()} for model in (skeleton, theirs)
    )
    assert found == expected
    layers = [m.get_submodule("model.layers.1.mlp.down_proj") for m in (skeleton, theirs)]
    assert layers[0].scaling == layers[1].scaling == {"default": 1.5}
    assert layers[0].lora_dropout["default"].p == 0.1
    assert weights.names["model.norm.weight"] == "model.norm.weight"
    assert weights.names["model.layers.0.mlp.down_proj.weight"] == "model.layers.0.mlp.down_proj.base_layer.weight"


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),
        ("mixtral", {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ],
)
def test_without_targets_all_linear_layers_but_the_head_are_adapted(family, expected):
    skeleton, _ = open_model(build(family), lora=horizon.LoraConfig(rank=2))
    name, config = adapter_of(skeleton)
    assert (name, set(config.target_modules), config.lora_alpha) == ("default", expected, 4)
    assert len(saved_form(skeleton)) == sum("lora_" in n for n, _ in skeleton.named_parameters())


def test_a_new_adapter_does_nothing_and_depends_on_the_seed_alone():
    skeleton, _ = open_model(CONFIG, lora=horizon.LoraConfig(rank=16))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, again, other = (dict(draw_adapter(skeleton, seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert list(one) == [n for n, p in skeleton.named_parameters() if p.requires_grad]
    for name, value in one.items():
        assert torch.equal(value, again[name]) and value.shape == skeleton.get_parameter(name).shape
        if "lora_B" in name:
            assert not value.any()
        else:
            bound = 1 / math.sqrt(value.shape[1])  # of peft's own initial values
            assert 0.95 * bound < float(value.abs().max()) <= bound and not torch.equal(value, other[name])
    assert len({value.flatten()[0].item() for name, value in one.items() if "lora_A" in name}) == len(one) // 2


BAD = {
    "rank": ({"rank": 0}, r"model.lora: rank=0"),
    "alpha": ({"rank": 2, "alpha": -1.0}, r"alpha=-1.0"),
    "dropout": ({"rank": 2, "dropout": 1.0}, r"dropout=1.0: expected"),
    "target": ({"rank": 2, "targets": ["qproj"]}, r"peft refuses the adapter: .*qproj"),
    "no rank": ({"alpha": 4.0}, r"model.lora.alpha=4.0 has no use with model.lora.rank=null"),
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        engine_for(CONFIG, lora=horizon.LoraConfig(**settings))


def test_zeroth_order_has_no_dropout():
    lora = horizon.LoraConfig(rank=2, dropout=0.1)
    with pytest.raises(ConfigError, match=r"model.lora.dropout=0.1: zeroth-order steps have no dropout"):
        engine_for(CONFIG, lora=lora, optimizer=horizon.ZerothOrder(), max_grad_norm=None)


def test_a_model_is_given_one_adapter_only():
    with pytest.raises(UnsupportedModelError, match="has an adapter already"):
        engine_for(adapted(), lora=horizon.LoraConfig(rank=2))


def test_initial_values_that_are_not_drawn_are_refused():
    settings = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "pissa"}
    with pytest.raises(ConfigError, match=r"init_lora_weights='pissa': only true is drawn here"):
        engine_for(CONFIG, lora=settings)


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else real(name))
    with pytest.raises(ConfigError, match=r"model.lora needs peft; pip install 'horizon\[lora\]'"):
        engine_for(CONFIG, lora=horizon.LoraConfig(rank=2))


def test_models_without_adapters_need_no_peft(monkeypatch):
    real = builtins.__import__

    def refused(name, *arguments, **settings):
        assert not name.startswith("peft"), "peft is imported"
        return real(name, *arguments, **settings)

    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(builtins, "__import__", refused)
    assert adapter_of(skeleton_from_instance(build("llama"))) is None
    assert adapter_of(build_skeleton(CONFIG)) is None


def test_a_skeleton_with_an_adapter_attaches_no_other():
    skeleton = build_skeleton(CONFIG)
    attach(skeleton, {"r": 2, "target_modules": ["q_proj"]})
    with pytest.raises(UnsupportedModelError, match="has an adapter already"):
        attach(skeleton, {"r": 2, "target_modules": ["k_proj"]})
