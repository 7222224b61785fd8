"""Horizon: host memory owns the model, the device borrows it block by block.

The public names are resolved on first use, so that `import horizon` stays light and touches no device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from horizon import errors
    from horizon.config.schema import LoraConfig, MemoryConfig, SimulatedCxl, TierRule
    from horizon.engine import Engine
    from horizon.inference import InferenceEngine
    from horizon.optim.adamw import AdamW
    from horizon.report.callbacks import Callback
    from horizon.trainer import Trainer
    from horizon.zo.settings import ZerothOrder

__version__ = "0.1.0"
__all__ = [
    "AdamW",
    "Callback",
    "Engine",
    "InferenceEngine",
    "LoraConfig",
    "MemoryConfig",
    "SimulatedCxl",
    "TierRule",
    "Trainer",
    "ZerothOrder",
    "__version__",
    "errors",
]

_HOMES = {
    "AdamW": "horizon.optim.adamw",
    "Callback": "horizon.report.callbacks",
    "Engine": "horizon.engine",
    "InferenceEngine": "horizon.inference",
    "LoraConfig": "horizon.config.schema",
    "MemoryConfig": "horizon.config.schema",
    "TierRule": "horizon.config.schema",
    "SimulatedCxl": "horizon.config.schema",
    "Trainer": "horizon.trainer",
    "ZerothOrder": "horizon.zo.settings",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("horizon.errors")
    if name not in _HOMES:
        raise AttributeError(f"module 'horizon' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
