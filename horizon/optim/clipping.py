"""Global-norm clipping from per-parameter norms, with the arithmetic of `torch.nn.utils.clip_grad_norm_`.

The norms come from wherever the gradients passed last (the device, as a rule); no pass over the gradients is
made here. The scale is applied by the AdamW update itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from horizon.errors import ConfigError, NonFiniteError


def check_max_grad_norm(max_norm: float | None) -> None:
    """Raise a ConfigError unless `max_norm` is a positive number or None (no clipping)."""
    if max_norm is not None and not max_norm > 0:
        raise ConfigError(
            f"max_grad_norm must be > 0, or null for no clipping, got {max_norm}; set optim.max_grad_norm"
        )


def global_norm(norms: Tensor) -> Tensor:
    """The norm (float32 scalar tensor) of all gradients together.

    `norms`: float32 [trainable parameters], the L2 norm of each one's gradient in model order, 0 where it has none.
    """
    total: Tensor = torch.linalg.vector_norm(norms, 2.0)
    return total


def clip_scale(norm: Tensor, max_norm: float | None) -> float:
    """What the gradients are multiplied by so that their norm is at most `max_norm`; 1.0 when nothing is clipped.

    `norm`: what `global_norm` gave. Reading it waits for the device, so it is read only if there is a maximum.

    Raises:
        NonFiniteError: the norm is NaN or infinite; a scale made from it would make every weight NaN.
    """
    if max_norm is None:
        return 1.0
    norm = norm.cpu()
    if not torch.isfinite(norm):
        raise NonFiniteError(f"the gradient norm is {norm.item()}; gradients cannot be clipped to {max_norm}")
    return float(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
