"""The settings of a run as a whole: which cannot work, which stand for others, and the engine that they describe."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from horizon.config.schema import HorizonConfig
from horizon.errors import ConfigError
from horizon.models.lora import wanted_adapter
from horizon.models.source import ModelSource
from horizon.optimizers import make_optimizer
from horizon.report.trace import require_matplotlib
from horizon.report.trackers import require_trackers
from horizon.run_checkpoints import check_checkpoint_settings
from horizon.validation import check_eval_settings
from horizon.zo.settings import ZerothOrder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from horizon.engine import Engine

LR_RANDOM = 2e-3  # optim.lr=null, random weights
LR_TRAINED = 1e-5  # optim.lr=null, weights that were trained before
LR_ADAPTER = 1e-4  # optim.lr=null, model.lora
LR_ZEROTH_ORDER = 1e-6  # optim.lr=null, optim=mezo
LR_ZEROTH_ORDER_ADAPTER = 5e-5  # optim.lr=null, optim=mezo, model.lora


def check_settings(config: HorizonConfig) -> None:
    """Refuse what no later part of a run looks at.

    Raises:
        ConfigError: naming the setting.
    """
    train = config.train
    for key, value, least in (
        ("steps", train.steps, 1),
        ("batch_size", train.batch_size, 1),
        ("micro_batch", 1 if train.micro_batch is None else train.micro_batch, 1),
        ("sample_tokens", train.sample_tokens, 0),
    ):
        if value < least:
            raise ConfigError(f"train.{key}={value} must be at least {least}")
    optimizer = make_optimizer(with_lr(config, None))
    wanted_adapter(config.model.lora, isinstance(optimizer, ZerothOrder))
    if config.trace:
        require_matplotlib()
    require_trackers(config.trackers)
    check_eval_settings(config)
    check_checkpoint_settings(config)
    if config.model.path is None and not config.model.config:
        raise ConfigError("no model: set model.path to a folder or hub id, or choose model=tiny_llama")


def with_lr(config: HorizonConfig, source: ModelSource | None) -> HorizonConfig:
    """The settings with `optim.lr`, when it is null, replaced by a rate that suits what is trained."""
    adapts = config.model.lora.rank is not None
    if config.optim.lr is not None:
        return config
    if config.optim.name == "mezo":
        lr = LR_ZEROTH_ORDER_ADAPTER if adapts else LR_ZEROTH_ORDER
    elif adapts:
        lr = LR_ADAPTER
    else:
        lr = LR_TRAINED if source is not None and source.has_weights else LR_RANDOM
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=lr))


def build_engine(
    config: HorizonConfig,
    source: ModelSource | None,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Path | None = None,
) -> Engine:
    """The engine that the settings describe, with the states of `checkpoint` if there is one.

    A model made from `model.config` gets the tokenizer's vocabulary.
    """
    from horizon.engine import Engine

    model, optim = config.model, config.optim
    settings: dict[str, Any] = {
        "optimizer": make_optimizer(config),
        "memory": config.memory,
        "max_grad_norm": optim.max_grad_norm,
        "clip": optim.clip,
        "device": config.device,
        "compute_dtype": config.compute_dtype,
        "kernels": config.kernels,
        "seed": config.seed,
        "freeze": model.freeze,
        "lora": model.lora,
        "on_nonfinite": config.train.on_nonfinite,
        "trust_remote_code": model.trust_remote_code,
        "self_check": model.self_check,
    }
    special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    made = {"vocab_size": len(tokenizer), **special, **model.config}
    what = made if source is None else str(source.named)
    if checkpoint is None or optim.name == "mezo":  # whose log is replayed later
        return Engine.from_pretrained(what, **settings)
    return Engine.load_checkpoint(checkpoint, model=what, weights_only=config.resume_weights_only, **settings)


def write_config(config: HorizonConfig, path: Path) -> None:
    """Write every setting as YAML."""
    from omegaconf import OmegaConf

    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")
