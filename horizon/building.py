"""From what a caller of the engine asks for to its running parts: settings checked, the model opened, parts built."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from horizon.check import ensure_supported
from horizon.checkpoint.convert import saved_skeleton
from horizon.checkpoint.hf_import import load_weights
from horizon.checkpoint.reader import Checkpoint
from horizon.checkpoint.restore import check_weights
from horizon.config.schema import Clip, ComputeDtype, Kernels, MemoryConfig, OnNonFinite
from horizon.config.values import choice, patterns, settings
from horizon.errors import ConfigError
from horizon.forecast.here import measured_threads
from horizon.frozen import FrozenRuntime, build_frozen
from horizon.models.lora import Lora, wanted_adapter
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
    lora = wanted_adapter(lora, isinstance(optimizer, ZerothOrder))
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
        if memory.update_threads is None:
            memory = dataclasses.replace(memory, update_threads=measured_threads())
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


def _no_clipping(max_grad_norm: float | None, clip: str) -> Clipping:
    """Zeroth-order steps have no gradient norm; the default of `max_grad_norm` is AdamW's."""
    if max_grad_norm not in (None, 1.0) or clip != Clip.exact:
        raise ConfigError(
            f"max_grad_norm={max_grad_norm}, clip={clip}: zeroth-order steps have no gradients to clip; "
            "set max_grad_norm=None (optim.max_grad_norm=null) and leave clip=exact"
        )
    return Clipping(None)
