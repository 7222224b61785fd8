"""What a run that was refused on this machine could do instead."""

from __future__ import annotations

from horizon.config.schema import HorizonConfig
from horizon.errors import BudgetError
from horizon.forecast.here import this_machine
from horizon.forecast.imagined import Forecaster
from horizon.forecast.machine import target_of
from horizon.forecast.outlook import advice, look_around
from horizon.forecast.shapes import open_shape
from horizon.plan.machine import host_overhead, resolve_device


def advise(config: HorizonConfig, refusal: BudgetError) -> str:
    """The nearest settings that fit, as the end of the refusal's sentence."""
    overhead = host_overhead(resolve_device(config.device))
    target = target_of(this_machine(), config.device, here=True, host_overhead=overhead)
    return advice(look_around(Forecaster(open_shape(config), target), config, refusal))
