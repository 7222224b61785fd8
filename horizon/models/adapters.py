"""LoRA adapters, as peft puts them into a model: a layer that holds the linear layer it stands for, and two matrices.

    model.layers.0.self_attn.q_proj.base_layer.weight         frozen by peft
    model.layers.0.self_attn.q_proj.lora_A.default.weight     trained
    model.layers.0.self_attn.q_proj.lora_B.default.weight     trained

With these layers in place a model is one like any other, most of whose parameters do not require gradients: blocks,
plan and optimizers need to know nothing of adapters. Here is what they must not meet, and what peft calls things on
disk. Peft is imported only where a model has adapters, or is to get one.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from horizon.errors import ConfigError, UnsupportedModelError, one_line
from horizon.models.lora import Lora, check_lora, require_peft

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


@dataclass(frozen=True, slots=True)
class Adapted:
    """Where the values of a model come from that has been given an adapter."""

    base: Any  # its skeleton without the adapter
    weights: Any  # of the base: a folder, a live model, or None where they are to be drawn
    names: Mapping[str, str]  # name of a parameter in the base -> its name beside the adapter
    folder: Path | None = None  # that has the adapter; None: it is new


def lora_settings(lora: Lora, model: Any) -> Mapping[str, Any]:
    """What peft calls these settings, where it is not what they are.

    Raises:
        ConfigError: as `check_lora`.
    """
    if isinstance(lora, Mapping):
        return lora
    check_lora(lora)
    assert lora.rank is not None
    return {
        "task_type": "CAUSAL_LM", "r": lora.rank, "lora_alpha": 2 * lora.rank if lora.alpha is None else lora.alpha,
        "lora_dropout": lora.dropout, "target_modules": list(lora.targets) or _linear_layers(model),
    }  # fmt: skip


def _linear_layers(model: Any) -> list[str]:
    """Names of all linear layers but the head."""
    from transformers.pytorch_utils import Conv1D  # here: a plan has no use for transformers

    head = model.get_output_embeddings()
    found = (name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head)
    return sorted({name.rpartition(".")[2] for name in found})


def attach(skeleton: Any, settings: Mapping[str, Any]) -> dict[str, str]:
    """Give a skeleton an adapter, which is without values, too; all else of it is then frozen.

    Args:
        settings: of peft's LoraConfig.

    Returns:
        name of each parameter before -> its name now.

    Raises:
        ConfigError: peft is not installed, or refuses the settings.
        UnsupportedModelError: the skeleton has an adapter, or as `check_adapters`.
    """
    if _adapted(skeleton):
        raise UnsupportedModelError(f"{type(skeleton).__name__} has an adapter already; leave out lora, or merge it")
    require_peft()
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    names = {id(parameter): name for name, parameter in skeleton.named_parameters()}
    try:
        config = PeftConfig(**{**settings, "inference_mode": False, "init_lora_weights": True})
        inject_adapter_in_model(config, skeleton, low_cpu_mem_usage=True)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.lora: peft refuses the adapter: {one_line(error)}") from error
    config.init_lora_weights = settings.get("init_lora_weights", True)  # nothing is initialised here
    check_adapters(skeleton)
    return {names[id(p)]: name for name, p in skeleton.named_parameters() if id(p) in names}


def draw_adapter(skeleton: Any, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Initial values of an adapter that does nothing yet: A as a linear layer's, B zero, as peft has them.

    A parameter's values depend on the seed and its name only.

    Raises:
        ConfigError: its settings want other values.
    """
    found = adapter_of(skeleton)
    if found is not None and found[1].init_lora_weights is not True:
        raise ConfigError(
            f"init_lora_weights={found[1].init_lora_weights!r}: only true is drawn here; hand over a peft.PeftModel"
        )
    for name in saved_form(skeleton):
        value = torch.zeros(skeleton.get_parameter(name).shape)
        if ".lora_A." in name:
            digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
        yield name, value


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
            raise UnsupportedModelError(
                f"{what}: {path} adapts {layer.parameter_name}; name targets that are linear layers"
            )
        if not layer.lora_A:
            raise UnsupportedModelError(f"{what}: {path} adapts an embedding; name targets that are linear layers")
        if layer.merged or layer.disable_adapters:
            state = "merged" if layer.merged else "disabled"
            raise UnsupportedModelError(f"{what}: the adapter of {path} is {state}; unmerge and enable it")
    config = model.peft_config[names[0]]
    if config.bias != "none":
        raise UnsupportedModelError(f"{what}: bias={config.bias!r} trains biases of the base; only 'none' is supported")
    beside = [name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]
    if beside:
        raise UnsupportedModelError(f"{what}: {beside[0]} is trained, but not saved with the adapter; freeze it")


def saved_form(model: Any) -> dict[str, str]:
    """Name in the model -> name in peft's file, of every parameter of the adapter."""
    from peft import get_peft_model_state_dict

    found = adapter_of(model)
    assert found is not None
    metas = {name: p.detach() for name, p in model.named_parameters()}
    names = {id(meta): name for name, meta in metas.items()}
    saved = get_peft_model_state_dict(model, metas, adapter_name=found[0], save_embedding_layers=False)
    return {names[id(meta)]: _WRAPPER + target for target, meta in saved.items()}


def saved_config(model: Any) -> dict[str, Any] | None:
    """The adapter's settings as peft saves them, plain JSON values; None where there is no adapter."""
    found = adapter_of(model)
    if found is None:
        return None
    base = found[1].base_model_name_or_path or getattr(model, "name_or_path", None)
    settings = {**found[1].to_dict(), "inference_mode": True, "base_model_name_or_path": base}
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=_plain))
    return plain


def _plain(value: Any) -> Any:
    """Peft keeps names of modules in sets."""
    return sorted(value) if isinstance(value, set) else str(value)


def _adapted(model: nn.Module) -> dict[str, Any]:
    """Modules that peft has put where others were, by path."""
    if sys.modules.get("peft") is None:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)}


def _names(layer: Any) -> Iterable[str]:
    """Adapters in a layer, active or not."""
    return {name for kind in layer.adapter_layer_names for name in getattr(layer, kind, ())}
