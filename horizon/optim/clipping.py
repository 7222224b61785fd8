"""Global-norm clipping from per-parameter norms, with the arithmetic of `torch.nn.utils.clip_grad_norm_`.

The norms come from wherever the gradients passed last (the device, as a rule); no pass over the gradients is
made here. The scale is applied by the AdamW update itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from horizon.config.schema import Clip, MasterFormat, Moments, OnNonFinite
from horizon.errors import ConfigError, NonFiniteError
from horizon.optim.adamw import AdamW

LAGGED_NOTE = "lagged clipping: not exact"  # what every report of such a run says


@dataclass(frozen=True, slots=True)
class Clipping:
    """The norm that gradients are clipped to (None: they are not), and when that happens.

    Raises:
        ConfigError: the norm is not positive, or there is none to which `mode` could clip.
    """

    max_norm: float | None = 1.0
    mode: Clip = Clip.exact

    def __post_init__(self) -> None:
        if self.max_norm is not None and not self.max_norm > 0:
            raise ConfigError(
                f"max_grad_norm must be > 0, or null for no clipping, got {self.max_norm}; set optim.max_grad_norm"
            )
        if self.max_norm is None and self.mode is not Clip.exact:
            raise ConfigError(
                f"clip={self.mode} has no norm to clip to, as max_grad_norm is null; "
                "set optim.max_grad_norm, or leave optim.clip=exact"
            )

    def check(self, adamw: AdamW, on_nonfinite: OnNonFinite) -> None:
        """Raise a ConfigError where the other settings do not allow this mode."""
        if self.mode is Clip.lagged and on_nonfinite is OnNonFinite.skip:
            raise ConfigError(
                "clip=lagged updates blocks before a step is known to be finite, so that on_nonfinite=skip cannot drop "
                "it; set optim.clip=exact or speculative, or train.on_nonfinite=stop"
            )
        if self.mode is Clip.speculative and adamw.moments != Moments.float32:
            raise ConfigError(
                "clip=speculative takes updates back only from float32 moments, but they are "
                f"{adamw.moments}; set optim.moments=float32, or optim.clip=exact"
            )
        if self.mode is Clip.speculative and adamw.master != MasterFormat.split:
            raise ConfigError(
                f"clip=speculative takes updates back only from split masters, but they are {adamw.master}; set "
                "optim.master=split, or optim.clip=exact"
            )
        beta1, beta2 = adamw.betas
        if self.mode is Clip.speculative and beta1**2 >= beta2:
            raise ConfigError(
                f"clip=speculative takes updates back only where beta1^2 < beta2, got betas {adamw.betas}; "
                "set optim.beta1 and optim.beta2, or optim.clip=exact"
            )

    @property
    def keeps_gradients(self) -> bool:
        """Whether all gradients of a step wait on the host."""
        return self.max_norm is not None and self.mode is not Clip.lagged

    @property
    def note(self) -> str:
        """What a report says of it."""
        if self.max_norm is None:
            return "none"
        return LAGGED_NOTE if self.mode is Clip.lagged else str(self.mode)


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
