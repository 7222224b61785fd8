"""From what a caller of the library says to the running parts: settings are checked first, then the architecture."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from horizon.check import ensure_supported
from horizon.config.schema import Clip, ComputeDtype, Kernels, MemoryConfig, OnNonFinite
from horizon.config.values import choice, patterns, settings
from horizon.models.skeleton import open_model
from horizon.optim.adamw import AdamW
from horizon.optim.clipping import LAGGED_NOTE, Clipping
from horizon.runtime import Runtime, build_runtime

logger = logging.getLogger(__name__)


def open_runtime(
    model: Any,
    *,
    optimizer: AdamW | None,
    memory: MemoryConfig | None,
    max_grad_norm: float | None,
    device: str,
    compute_dtype: str,
    kernels: str,
    seed: int,
    freeze: Sequence[str],
    on_nonfinite: str,
    clip: str,
    revision: str | None,
    trust_remote_code: bool,
    self_check: bool,
) -> Runtime:
    """See `horizon.Engine.from_pretrained`, whose arguments these are."""
    clipping = Clipping(max_grad_norm, choice(Clip, clip, "clip"))
    on_bad = choice(OnNonFinite, on_nonfinite, "on_nonfinite")
    optimizer = settings(AdamW, optimizer, "optimizer")
    clipping.check(optimizer, on_bad)
    memory = settings(MemoryConfig, memory, "memory")
    dtype, kernel_kind = choice(ComputeDtype, compute_dtype, "compute_dtype"), choice(Kernels, kernels, "kernels")
    frozen = patterns(freeze, "freeze")
    skeleton, weights = open_model(model, revision, trust_remote_code)
    if self_check:
        ensure_supported(skeleton.config, trust_remote_code)
    runtime = build_runtime(
        skeleton, weights, optimizer=optimizer, memory=memory, device=device, compute_dtype=dtype, seed=seed,
        kernels=kernel_kind, freeze=frozen, clipping=clipping,
        keeps_gradients=clipping.keeps_gradients or on_bad is OnNonFinite.skip,
    )  # fmt: skip
    runtime.on_nonfinite = on_bad
    if clipping.mode is Clip.lagged:
        logger.warning("%s: a step's gradients are scaled by the norm of the step before", LAGGED_NOTE)
    return runtime
