"""LoRA adapters, as peft puts them into a model: a layer that holds the linear layer it stands for, and two matrices.

    model.layers.0.self_attn.q_proj.base_layer.weight         frozen by peft
    model.layers.0.self_attn.q_proj.lora_A.default.weight     trained
    model.layers.0.self_attn.q_proj.lora_B.default.weight     trained

With these layers in place a model is one like any other, most of whose parameters do not require gradients: blocks,
plan and optimizers need to know nothing of adapters. Here is what they must not meet, and what peft calls things on
disk. Peft is imported only where a model has adapters.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

from horizon.errors import UnsupportedModelError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_WRAPPER = "base_model.model."  # where a PeftModel has the model that it adapts


def unwrapped(model: Any) -> Any:
    """The transformers model inside a `PeftModel`, its adapters in place; any other model as it is.

    Raises:
        UnsupportedModelError: what peft added is no LoRA.
    """
    peft = sys.modules.get("peft")  # who has such a model has imported it
    if peft is None or not isinstance(model, peft.PeftModel):
        return model
    config = model.active_peft_config
    if config.peft_type != peft.PeftType.LORA:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise UnsupportedModelError(f"{type(model).__name__} has an adapter of kind {kind}; only LORA is supported")
    return model.get_base_model()


def adapter_of(model: Any) -> tuple[str, Any] | None:
    """(name, peft's LoraConfig) of the adapter in a model's layers; None where there is none."""
    if not _adapted(model):
        return None
    ((name, config),) = model.peft_config.items()
    return name, config


def check_adapters(model: Any) -> None:
    """Refuse adapters that blocks would not compute as peft does, or that could not be saved.

    Raises:
        UnsupportedModelError: saying which, and where.
    """
    layers = _adapted(model)
    if not layers:
        return
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    what, names = type(model).__name__, sorted({name for layer in layers.values() for name in _names(layer)})
    if len(names) > 1:
        raise UnsupportedModelError(f"{what} has {len(names)} adapters ({', '.join(names)}); delete all but one")
    for path, layer in layers.items():
        if not isinstance(layer, LoraLayer) or layer.lora_variant:
            found = type(layer).__name__ if not isinstance(layer, LoraLayer) else "a variant of LoRA (DoRA or such)"
            raise UnsupportedModelError(f"{what}: {path} is {found}; only plain LoRA is supported")
        if isinstance(layer, ParamWrapper):
            raise UnsupportedModelError(f"{what}: {path} adapts {layer.parameter_name}; adapt linear layers only")
        if not layer.lora_A:
            raise UnsupportedModelError(f"{what}: {path} adapts an embedding; adapt linear layers only")
        if layer.merged or layer.disable_adapters:
            state = "merged" if layer.merged else "disabled"
            raise UnsupportedModelError(f"{what}: the adapter of {path} is {state}; unmerge and enable it")
    config = model.peft_config[names[0]]
    if config.bias != "none":
        raise UnsupportedModelError(f"{what}: bias={config.bias!r} trains biases of the base; only 'none' is supported")


def saved_form(model: Any) -> dict[str, str]:
    """Name in the model -> name in peft's file, of every parameter of the adapter."""
    from peft import get_peft_model_state_dict

    found = adapter_of(model)
    assert found is not None
    metas = {name: p.detach() for name, p in model.named_parameters()}
    names = {id(meta): name for name, meta in metas.items()}
    saved = get_peft_model_state_dict(model, metas, adapter_name=found[0], save_embedding_layers=False)
    return {names[id(meta)]: _WRAPPER + target for target, meta in saved.items()}


def saved_config(model: Any) -> Any:
    """The adapter's config as peft saves it, a copy."""
    found = adapter_of(model)
    assert found is not None
    config = copy.deepcopy(found[1])
    config.inference_mode = True
    config.base_model_name_or_path = config.base_model_name_or_path or getattr(model, "name_or_path", None)
    return config


def _adapted(model: nn.Module) -> dict[str, Any]:
    """Modules that peft has put where others were, by path."""
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)}


def _names(layer: Any) -> Iterable[str]:
    """Adapters in a layer, active or not."""
    return {name for kind in layer.adapter_layer_names for name in getattr(layer, kind, ())}
