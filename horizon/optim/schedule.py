"""The learning rate of a step: linear warm-up, then constant, linear or cosine."""

from __future__ import annotations

import math

from horizon.config.schema import LrSchedule
from horizon.errors import ConfigError


def learning_rate(
    step: int, base_lr: float, schedule: LrSchedule, warmup_steps: int, total_steps: int, min_lr_ratio: float
) -> float:
    """The learning rate of `step`, which counts from 1.

    Warm-up rises linearly and reaches `base_lr` at `warmup_steps` (without one, step 1 has it). From there `linear`
    and `cosine` fall to `base_lr * min_lr_ratio` at `total_steps` and stay there; `constant` stays at `base_lr`.

    Raises:
        ConfigError: `warmup_steps` or `min_lr_ratio` is outside its range.
    """
    if warmup_steps < 0:
        raise ConfigError(f"optim.warmup_steps must be >= 0, got {warmup_steps}")
    if not 0 <= min_lr_ratio <= 1:
        raise ConfigError(f"optim.min_lr_ratio must be in [0, 1], got {min_lr_ratio}")
    peak = max(warmup_steps, 1)
    if step <= peak or schedule is LrSchedule.constant:
        return base_lr * min(step / peak, 1.0)
    progress = min((step - peak) / max(total_steps - peak, 1), 1.0)
    remaining = 1 - progress if schedule is LrSchedule.linear else (1 + math.cos(math.pi * progress)) / 2
    return base_lr * (min_lr_ratio + (1 - min_lr_ratio) * remaining)
