"""Settings of LoRA adapters, checked before any model is looked at: nothing here loads transformers or peft."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from horizon.config.schema import LoraConfig
from horizon.config.values import require_defaults, settings
from horizon.errors import ConfigError

Lora: TypeAlias = LoraConfig | Mapping[str, Any]  # settings of Horizon's own, or of peft's LoraConfig


def wanted_adapter(lora: Lora | None, zeroth_order: bool) -> Lora | None:
    """The adapter that is asked for; None where its settings have no rank.

    Raises:
        ConfigError: a value that cannot work, or that has no use here; peft is not installed.
    """
    if isinstance(lora, Mapping):
        return lora
    found = settings(LoraConfig, lora, "lora")
    if found.rank is None:
        require_defaults(found, "model.lora", "model.lora.rank=null", ["alpha", "targets", "dropout"])
        return None
    check_lora(found)
    if found.dropout and zeroth_order:
        raise ConfigError(f"model.lora.dropout={found.dropout}: zeroth-order steps have no dropout; leave it at 0")
    return found


def check_lora(lora: LoraConfig) -> None:
    """Refuse settings of an adapter that cannot work.

    Raises:
        ConfigError: naming them; or peft is not installed.
    """
    rank, alpha, dropout = lora.rank, lora.alpha, lora.dropout
    if rank is None or rank < 1 or not 0 <= dropout < 1 or not (alpha is None or 0 < alpha < math.inf):
        raise ConfigError(
            f"model.lora: rank={rank}, alpha={alpha}, dropout={dropout}: expected a rank of at least 1, an alpha above "
            "0, and a dropout of at least 0 and below 1"
        )
    require_peft()


def require_peft() -> None:
    """Raise a ConfigError where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("model.lora needs peft; pip install 'horizon[lora]', or pip install peft")
