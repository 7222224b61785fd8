"""What `generate` is asked for, as transformers' GenerationConfig; what cannot be streamed is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

from horizon.errors import ConfigError, one_line

DEFAULT_NEW_TOKENS = 20  # transformers' own
OBJECTS = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer", "tokenizer")

_BEAMS = "beams would reorder the keys and values of every layer at every token"
_MODELS = "only one token after the other is computed"
_CACHE = "keys and values are where the plan has room for them"
_TENSORS = "only token ids are given back"
_REFUSED = {
    "num_beams": _BEAMS, "num_beam_groups": _BEAMS, "constraints": _BEAMS, "force_words_ids": _BEAMS,
    "penalty_alpha": _MODELS, "dola_layers": _MODELS, "prompt_lookup_num_tokens": _MODELS, "use_mtp": _MODELS,
    "assistant_early_exit": _MODELS, "guidance_scale": _MODELS, "token_healing": _MODELS,
    "prefill_chunk_size": "a prompt goes through the model in one pass",
    "cache_implementation": _CACHE, "cache_config": _CACHE, "max_cache_len": _CACHE, "use_cache": _CACHE,
    "compile_config": "blocks that come and go cannot be compiled as one graph",
    "return_dict_in_generate": _TENSORS, "output_scores": _TENSORS, "output_logits": _TENSORS,
    "output_attentions": _TENSORS, "output_hidden_states": _TENSORS,
}  # fmt: skip
_NEUTRAL = {"num_beams": 1, "num_beam_groups": 1, "use_cache": True, "guidance_scale": 1}
# What a model's own generation_config.json may say without anybody having asked for it.
_OF_THE_MODEL = {name for name, why in _REFUSED.items() if why in (_CACHE, _TENSORS)}


def read_arguments(own: GenerationConfig, arguments: Mapping[str, Any]) -> tuple[GenerationConfig, dict[str, Any]]:
    """The settings that `arguments` make of the model's own, and the objects among them.

    Raises:
        ConfigError: an argument that there is not, that cannot be streamed, or with a value that cannot work.
    """
    objects = {name: value for name, value in arguments.items() if name in OBJECTS and value is not None}
    given = {name: value for name, value in arguments.items() if name not in OBJECTS}
    config = copy.deepcopy(given.pop("generation_config", None) or GenerationConfig())  # type: ignore[no-untyped-call]
    if unknown := sorted(given.keys() - vars(config).keys()):
        raise ConfigError(f"generate takes no {unknown[0]}; expected an attribute of transformers' GenerationConfig")
    defaults = {name: value for name, value in own.to_dict().items() if name not in _OF_THE_MODEL}
    try:
        config.update(**defaults, defaults_only=True, allow_custom_entries=True)
        config.update(**given)
    except (ValueError, TypeError) as error:  # from the library's own checks
        raise ConfigError(f"generate: {one_line(error)}") from error
    for name, why in _REFUSED.items():
        value = getattr(config, name, None)
        if value is not None and value != _NEUTRAL.get(name, False):
            raise ConfigError(f"generate does not support {name}={value}: {why}; leave it out")
    return config, objects


def total_tokens(config: GenerationConfig, prompt_tokens: int, max_positions: int | None) -> int:
    """Tokens of a row at the end, the prompt's included; `config` then says it as max_new_tokens.

    Raises:
        ConfigError: none would be new, or the model has not so many positions.
    """
    if config.max_new_tokens is None:
        config.max_new_tokens = DEFAULT_NEW_TOKENS
        if config.max_length is not None:
            config.max_new_tokens = config.max_length - prompt_tokens
    config.max_length = None
    if config.max_new_tokens < 1:
        raise ConfigError(
            f"prompts of {prompt_tokens} tokens leave {config.max_new_tokens} new ones; set max_new_tokens to 1 or more"
        )
    total: int = prompt_tokens + config.max_new_tokens
    if max_positions is not None and total > max_positions:
        raise ConfigError(
            f"max_new_tokens={config.max_new_tokens} after prompts of {prompt_tokens} tokens makes {total}, but the "
            f"model has {max_positions} positions"
        )
    return total
