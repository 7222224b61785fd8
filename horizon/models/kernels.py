"""Fused kernels for a skeleton's norms, rotary embedding and gated MLP: Liger's, where installed and on a GPU.

Liger patches a model's modules and, for the rotary embedding, a global of the model's source file. The global is
swapped only while Horizon runs a layer, so other models in the process keep their own code.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from horizon.config.schema import Kernels
from horizon.errors import ConfigError

logger = logging.getLogger(__name__)


def liger_available() -> bool:
    """Whether Liger's kernels can be imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("liger_kernel", "triton"))


def choose_kernels(kernels: Kernels, device: torch.device) -> Kernels:
    """`auto` resolved to what this machine has.

    Raises:
        ConfigError: Liger was asked for and cannot run here.
    """
    if kernels is Kernels.liger and (device.type != "cuda" or not liger_available()):
        raise ConfigError("kernels=liger needs a CUDA device and `pip install liger-kernel`; use kernels=auto or torch")
    if kernels is Kernels.auto:
        return Kernels.liger if device.type == "cuda" and liger_available() else Kernels.torch
    return kernels


class FusedKernels:
    """Liger's kernels on one skeleton; `active()` must be open while its layers run."""

    def __init__(self, skeleton: Any):
        self._home = sys.modules[type(skeleton).__module__]
        self._globals = _patch(skeleton, self._home)

    @contextmanager
    def active(self) -> Iterator[None]:
        """The model's source file uses the fused rotary embedding while open."""
        originals = {name: getattr(self._home, name) for name in self._globals}
        vars(self._home).update(self._globals)
        try:
            yield
        finally:
            vars(self._home).update(originals)


def _patch(skeleton: Any, home: Any) -> dict[str, Any]:
    """Patch the skeleton's modules; return the globals that its layers call, leaving the source file as it was."""
    # Liger would compile some 150 variants of its expert kernels at the first step, for minutes, and let their times
    # decide which one computes: gradients would differ from run to run.
    os.environ.setdefault("LIGER_FUSED_MOE_AUTOTUNE", "0")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    if skeleton.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        logger.info("Liger has no kernels for %s; torch's are used", skeleton.config.model_type)
        return {}
    before = dict(vars(home))
    forward = type(skeleton).forward
    try:
        _apply_liger_kernel_to_instance(skeleton, cross_entropy=False, fused_linear_cross_entropy=False)
        changed = {name: value for name, value in vars(home).items() if before.get(name) is not value}
    finally:
        vars(home).update(before)
        type(skeleton).forward = forward
    return {name: value for name, value in changed.items() if name.startswith("apply_")}
