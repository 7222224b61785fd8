"""The transformers config of a model, checked before anything is built: what Horizon cannot train is refused here."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from horizon.errors import CheckpointError, ConfigError, UnsupportedModelError, one_line

_AUTO_CLASS = "AutoModelForCausalLM"
_TOWERS = ("vision_config", "audio_config", "encoder_config", "speech_config")


def load_config(source: str | Path | Mapping[str, Any] | PreTrainedConfig, trust_remote_code: bool) -> PreTrainedConfig:
    """A fresh config object from a folder with a config.json, a plain mapping with `model_type`, or a config.

    Raises:
        CheckpointError: the folder has no readable config.json.
        ConfigError: a key of the mapping is none of the architecture's settings.
        UnsupportedModelError: the architecture is unknown to transformers, needs code that is not trusted, or has
            values that its own config class refuses.
    """
    if isinstance(source, PreTrainedConfig):
        return copy.deepcopy(source)
    folder = None if isinstance(source, Mapping) else Path(source)
    settings = dict(source) if isinstance(source, Mapping) else read_json(Path(source) / "config.json")
    _check_known(settings, trust_remote_code, "model.config" if folder is None else str(folder))
    try:
        if folder is not None:
            loaded = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        else:
            loaded = AutoConfig.for_model(**settings)
    except Exception as error:  # config classes are third-party code and raise what they like
        raise UnsupportedModelError(
            f"the {settings.get('model_type')!r} config is not valid: {one_line(error)}"
        ) from error
    assert isinstance(loaded, PreTrainedConfig)
    if folder is None:
        _check_keys(settings, loaded)
    return loaded


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder.

    Raises:
        CheckpointError: there is no such file, or it does not hold a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}; expected a Hugging Face model folder") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content


def refuse_unsupported(config: PreTrainedConfig) -> None:
    """Check that the config describes a decoder-only language model without parts Horizon would leave out.

    Raises:
        UnsupportedModelError: it does not; names the reason.
    """
    what = f"model_type {config.model_type!r}"
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{what} is an encoder-decoder; only decoder-only language models are supported")
    for name in sorted({*config.sub_configs, *_TOWERS} - {"text_config"}):
        if getattr(config, name, None) is not None:
            raise UnsupportedModelError(
                f"{what} has a {name}, so it is not a plain language model; "
                "extract its text model to a folder of its own and train that"
            )
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise UnsupportedModelError(
            f"{what} is quantized ({method}); the masters need fp32, fp16 or bf16 weights: "
            "dequantize the checkpoint and remove quantization_config from config.json"
        )
    if getattr(config, "output_router_logits", False):
        raise UnsupportedModelError(
            f"{what} asks for the router's auxiliary loss, which is not supported; set output_router_logits=false"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and _AUTO_CLASS not in (getattr(config, "auto_map", None) or {}):
        raise UnsupportedModelError(f"{what} has no causal language model in transformers {transformers.__version__}")


def _check_known(settings: Mapping[str, Any], trust_remote_code: bool, where: str) -> None:
    model_type = settings.get("model_type")
    if model_type in CONFIG_MAPPING:
        return
    if _AUTO_CLASS in (settings.get("auto_map") or {}):
        if trust_remote_code:
            return
        raise UnsupportedModelError(
            f"{where} brings its own model code; set model.trust_remote_code=true if you trust its author"
        )
    if model_type is None:
        raise UnsupportedModelError(f"{where} names no model_type, so its architecture is unknown; add it")
    raise UnsupportedModelError(
        f"model_type {model_type!r} in {where} is unknown to transformers {transformers.__version__}; "
        "check the spelling or install a version that has it"
    )


def _check_keys(settings: Mapping[str, Any], config: PreTrainedConfig) -> None:
    """Config classes keep unknown keys as attributes, so a misspelt key would silently train another model."""
    fields = {field.name for field in dataclasses.fields(config)} | config.attribute_map.keys()
    default = type(config)()
    for key in settings:
        known = key in fields or hasattr(default, key) or key not in vars(config)
        close = difflib.get_close_matches(key, fields - settings.keys(), n=1, cutoff=0.93)
        if close and not known:
            raise ConfigError(f"model.config.{key} is not a setting of {config.model_type!r}; did you mean {close[0]}?")
