"""The optimizer that settings describe."""

from __future__ import annotations

import dataclasses

from horizon.config.schema import HorizonConfig
from horizon.config.values import require_defaults
from horizon.errors import ConfigError
from horizon.optim.adamw import AdamW
from horizon.zo.settings import ZerothOrder


def make_optimizer(config: HorizonConfig) -> AdamW | ZerothOrder:
    """The optimizer that the settings describe, `optim.lr` filled in.

    Raises:
        ConfigError: no such optimizer, a value that cannot work, or a setting that only the other one has a use for.
    """
    optim, zo = config.optim, config.zo
    assert optim.lr is not None
    if optim.name == "adamw":
        require_defaults(zo, "zo", "optim=adamw", [field.name for field in dataclasses.fields(zo)])
        betas = (optim.beta1, optim.beta2)
        return AdamW(optim.lr, betas, optim.eps, optim.weight_decay, optim.moments, optim.master)
    if optim.name == "mezo":
        require_defaults(optim, "optim", "optim=mezo", ["beta1", "beta2", "eps", "moments", "master", "clip"])
        return ZerothOrder(
            lr=optim.lr, weight_decay=optim.weight_decay, seed=config.seed, eps=zo.eps, queries=zo.queries,
            momentum=zo.momentum, momentum_steps=zo.momentum_steps, master=zo.master,
            writeback_every=zo.writeback_every,
        )  # fmt: skip
    raise ConfigError(f"optim.name={optim.name!r} is unknown; expected adamw or mezo")
