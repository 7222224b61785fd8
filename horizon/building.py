"""From what a caller of the engine asks for to its running parts: settings checked, the model opened, parts built."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from horizon.check import ensure_supported
from horizon.checkpoint.convert import saved_skeleton
from horizon.checkpoint.hf_import import load_weights
from horizon.checkpoint.reader import Checkpoint
from horizon.checkpoint.restore import check_weights
from horizon.config.schema import Clip, ComputeDtype, HorizonConfig, Kernels, LoraConfig, MemoryConfig, OnNonFinite
from horizon.config.values import choice, patterns, settings
from horizon.errors import ConfigError
from horizon.frozen import FrozenRuntime, build_frozen
from horizon.models.adapters import Lora, check_lora
from horizon.models.skeleton import Unloaded, open_model
from horizon.optim.adamw import AdamW
from horizon.optim.clipping import LAGGED_NOTE, Clipping
from horizon.runtime import Runtime, build_runtime
from horizon.zo.runtime import Write, ZerothOrderRuntime, build_zeroth_order
from horizon.zo.settings import ZerothOrder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """What an engine is made of."""

    runtime: Runtime | ZerothOrderRuntime
    lr: float
    clipping: Clipping
    on_nonfinite: OnNonFinite


def build_parts(
    model: Any, *, optimizer: AdamW | ZerothOrder | None, memory: MemoryConfig | None, max_grad_norm: float | None,
    device: str, compute_dtype: str, kernels: str, seed: int, freeze: Sequence[str], on_nonfinite: str, clip: str,
    revision: str | None, trust_remote_code: bool, self_check: bool, lora: Lora | None,
) -> Parts:  # fmt: skip
    """The parts that `Engine.from_pretrained` describes.

    Raises:
        HorizonError: named by kind; nothing stays allocated.
    """
    on_bad = choice(OnNonFinite, on_nonfinite, "on_nonfinite")
    memory = settings(MemoryConfig, memory, "memory")
    dtype, kernel_kind = choice(ComputeDtype, compute_dtype, "compute_dtype"), choice(Kernels, kernels, "kernels")
    frozen = patterns(freeze, "freeze")
    runtime: Runtime | ZerothOrderRuntime
    if isinstance(optimizer, ZerothOrder):
        clipping = _no_clipping(max_grad_norm, clip)
    else:
        optimizer = settings(AdamW, optimizer, "optimizer")
        clipping = Clipping(max_grad_norm, choice(Clip, clip, "clip"))
        clipping.check(optimizer, on_bad)
    lora = wanted_adapter(lora, optimizer)
    skeleton, weights = open_model(model, revision, trust_remote_code, lora)
    if self_check:
        ensure_supported(skeleton.config, trust_remote_code)
    if isinstance(optimizer, ZerothOrder):

        def load(write: Write, target: torch.device) -> None:
            load_weights(weights, skeleton, write, target, seed)

        runtime = build_zeroth_order(
            skeleton, load, settings=optimizer, memory=memory, device=device, compute_dtype=dtype, freeze=frozen,
            kernels=kernel_kind,
        )  # fmt: skip
    else:
        runtime = build_runtime(
            skeleton, weights, optimizer=optimizer, memory=memory, device=device, compute_dtype=dtype, seed=seed,
            kernels=kernel_kind, freeze=frozen, clipping=clipping,
            keeps_gradients=clipping.keeps_gradients or on_bad is OnNonFinite.skip,
        )  # fmt: skip
    if clipping.mode is Clip.lagged:
        logger.warning("%s: a step's gradients are scaled by the norm of the step before", LAGGED_NOTE)
    return Parts(runtime, optimizer.lr, clipping, on_bad)


def build_frozen_parts(
    model: Any, checkpoint: Path | None, *, memory: MemoryConfig | None = None, device: str = "auto",
    compute_dtype: str = "auto", kernels: str = "auto", seed: int = 0, revision: str | None = None,
    trust_remote_code: bool = False, self_check: bool = True,
) -> FrozenRuntime:  # fmt: skip
    """The parts that `InferenceEngine.from_pretrained` describes, or its `load_checkpoint`.

    Args:
        model: may be None where a checkpoint is given: what that is of.

    Raises:
        HorizonError: named by kind; nothing stays allocated.
    """
    memory = settings(MemoryConfig, memory, "memory")
    dtype, kernel_kind = choice(ComputeDtype, compute_dtype, "compute_dtype"), choice(Kernels, kernels, "kernels")
    weights: Any
    if checkpoint is None:
        skeleton, weights = open_model(model, revision, trust_remote_code)
    else:
        weights = Checkpoint(checkpoint)
        skeleton = (
            saved_skeleton(weights)
            if model is None
            else open_model(Unloaded(model, weights.manifest.adapter), revision, trust_remote_code)[0]
        )
        check_weights(weights, {name: tuple(p.shape) for name, p in skeleton.named_parameters()})
    if self_check:
        ensure_supported(skeleton.config, trust_remote_code)
    return build_frozen(
        skeleton, weights, memory=memory, device=device, compute_dtype=dtype, kernels=kernel_kind, seed=seed
    )


def make_optimizer(config: HorizonConfig) -> AdamW | ZerothOrder:
    """The optimizer that the settings describe, `optim.lr` filled in.

    Raises:
        ConfigError: no such optimizer, a value that cannot work, or a setting that only the other one has a use for.
    """
    optim, zo = config.optim, config.zo
    assert optim.lr is not None
    if optim.name == "adamw":
        _require_defaults(zo, "zo", "optim=adamw", [field.name for field in dataclasses.fields(zo)])
        betas = (optim.beta1, optim.beta2)
        return AdamW(optim.lr, betas, optim.eps, optim.weight_decay, optim.moments, optim.master)
    if optim.name == "mezo":
        _require_defaults(optim, "optim", "optim=mezo", ["beta1", "beta2", "eps", "moments", "master", "clip"])
        return ZerothOrder(
            lr=optim.lr, weight_decay=optim.weight_decay, seed=config.seed, eps=zo.eps, queries=zo.queries,
            momentum=zo.momentum, momentum_steps=zo.momentum_steps, master=zo.master,
            writeback_every=zo.writeback_every,
        )  # fmt: skip
    raise ConfigError(f"optim.name={optim.name!r} is unknown; expected adamw or mezo")


def _require_defaults(settings: Any, group: str, other: str, names: Sequence[str]) -> None:
    defaults = type(settings)()
    for name in names:
        value = getattr(settings, name)
        if value != getattr(defaults, name):
            raise ConfigError(f"{group}.{name}={value} has no use with {other}; leave it out")


def wanted_adapter(lora: Lora | None, optimizer: AdamW | ZerothOrder) -> Lora | None:
    """The adapter that is asked for; None where its settings have no rank.

    Raises:
        ConfigError: a value that cannot work, or that has no use here; peft is not installed.
    """
    if isinstance(lora, Mapping):
        return lora
    found = settings(LoraConfig, lora, "lora")
    if found.rank is None:
        _require_defaults(found, "model.lora", "model.lora.rank=null", ["alpha", "targets", "dropout"])
        return None
    check_lora(found)
    if found.dropout and isinstance(optimizer, ZerothOrder):
        raise ConfigError(f"model.lora.dropout={found.dropout}: zeroth-order steps have no dropout; leave it at 0")
    return found


def _no_clipping(max_grad_norm: float | None, clip: str) -> Clipping:
    """Zeroth-order steps have no gradient norm; the default of `max_grad_norm` is AdamW's."""
    if max_grad_norm not in (None, 1.0) or clip != Clip.exact:
        raise ConfigError(
            f"max_grad_norm={max_grad_norm}, clip={clip}: zeroth-order steps have no gradients to clip; "
            "set max_grad_norm=None (optim.max_grad_norm=null) and leave clip=exact"
        )
    return Clipping(None)
