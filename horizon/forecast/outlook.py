"""A forecast with what surrounds it: other settings that would be faster or smaller, or, where it does not fit, the
nearest that do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from horizon.config.schema import Clip, HorizonConfig, MemoryConfig, Moments, Policy, Recompute
from horizon.errors import BudgetError
from horizon.forecast.changes import (
    Change,
    Lever,
    alternatives,
    changed,
    describe,
    nearest_changes,
    setting,
    smaller_levers,
)
from horizon.forecast.imagined import Forecast, Forecaster
from horizon.plan.memory import PROCESS_DRIFT, Limits, round_up
from horizon.units import format_bytes, parse_bytes

NEAREST = 3
TRIED = 3000  # changes at most, before none is said to fit


@dataclass(frozen=True, slots=True)
class Alternative:
    """Other settings, and what comes of them; None where they do not fit."""

    change: Change
    forecast: Forecast | None


@dataclass(frozen=True, slots=True)
class Outlook:
    """The answer of `horizon plan`: either a forecast and its alternatives, or a refusal and what would fit."""

    forecast: Forecast | None
    refusal: BudgetError | None
    alternatives: tuple[Alternative, ...]  # faster or smaller, or, where refused, the nearest that fit
    least: tuple[int, int] | None = None  # where nothing near fits: (host, device) bytes of the smallest settings


def look(forecaster: Forecaster, config: HorizonConfig) -> Outlook:
    """Forecast a run and what surrounds it.

    Raises:
        ConfigError: settings that cannot work.
    """
    try:
        forecast = forecaster.forecast(config)
    except BudgetError as refusal:
        return look_around(forecaster, config, refusal)
    budget = forecast.plan.limits.device if forecaster.target.on_gpu else None
    most = forecaster.target.limits(MemoryConfig()).device
    changes = alternatives(config, forecast.micro_batch, budget, most)
    found = [Alternative(change, forecaster.fits(changed(config, change))) for change in changes]
    return Outlook(forecast, None, tuple(found))


def look_around(forecaster: Forecaster, config: HorizonConfig, refusal: BudgetError) -> Outlook:
    """What would fit instead of settings that were refused."""
    nearest = nearest_that_fit(forecaster, config, refusal)
    return Outlook(None, refusal, nearest, None if nearest else least_bytes(forecaster, changed(config, SMALLEST)))


def nearest_that_fit(forecaster: Forecaster, config: HorizonConfig, refusal: BudgetError) -> tuple[Alternative, ...]:
    """The three changes of settings nearest to what was refused that fit.

    One that changes all that another changes, and more, comes only where there are too few others.
    """
    target = forecaster.target
    budgets = larger_budgets(forecaster, config, refusal)
    levers = smaller_levers(config, target.on_gpu, budgets, target.has_cxl)
    if reserves := larger_reserves(forecaster, config, refusal):
        levers.append(Lever("memory.host_reserve", reserves, 2))
    found: list[Alternative] = []
    further: list[Alternative] = []
    for change in nearest_changes(levers)[:TRIED]:
        more = any(set(other.change) <= set(change) for other in found)
        if (more and len(further) == NEAREST) or not forecaster.may_fit(changed(config, change)):
            continue
        forecast = forecaster.fits(changed(config, change))
        if forecast is not None:
            (further if more else found).append(Alternative(change, forecast))
        if len(found) == NEAREST:
            break
    return (*found, *further)[:NEAREST]


def larger_budgets(forecaster: Forecaster, config: HorizonConfig, refusal: BudgetError) -> dict[str, str]:
    """By setting the budget that a refused plan asks for, where one was set and the machine has that much."""
    if refusal.tier is None:
        return {}
    target, memory = forecaster.target, config.memory
    key = target.limits(memory).of(refusal.tier)[1]
    if setting(config, key) in ("auto", None):
        return {}
    free = replace(memory, host_budget="auto", device_budget="auto", nvme_budget="auto", cxl_budget="auto")
    available = target.limits(free)
    # a stand-in for cxl is ordinary memory
    most = available.host if key == "memory.cxl_simulated.size" else available.of(refusal.tier)[0]
    size = round_up(refusal.needed + (PROCESS_DRIFT if refusal.tier == "host" else 0))
    return {key: size} if parse_bytes(size, key) <= most else {}


def larger_reserves(forecaster: Forecaster, config: HorizonConfig, refusal: BudgetError) -> tuple[str, ...]:
    """What states that spill to nvme may have to leave of host memory for the rest to fit, least first."""
    memory = config.memory
    if refusal.tier != "host" or memory.nvme_dir is None or memory.rules or memory.policy is not Policy.auto:
        return ()
    left, more = forecaster.left_by_states(config), refusal.needed - refusal.limit + PROCESS_DRIFT
    return round_up(left + more), round_up(left + 2 * more)  # checkpoints take half of what is left


SMALLEST: Change = {
    "optim.moments": Moments.int8, "optim.max_grad_norm": None, "optim.clip": Clip.exact, "train.batch_size": 1,
    "train.micro_batch": 1, "memory.weight_slots": 1, "memory.policy": Policy.dram, "memory.hbm_blocks": None,
    "memory.turn_layers": None, "memory.recompute": Recompute.auto, "memory.rules": [],
    "memory.host_reserve": None, "memory.cxl_nodes": "auto",
    "memory.cxl_budget": "auto", "memory.cxl_simulated.size": None,
}  # fmt: skip


def least_bytes(forecaster: Forecaster, config: HorizonConfig) -> tuple[int, int]:
    """(host, device) bytes that these settings cannot do without: all boundaries on the host, nothing kept."""
    limits = Limits(1, 1)
    while True:
        try:
            forecaster.forecast(config, limits)
            return limits.host, limits.device
        except BudgetError as refusal:  # for one tier at a time
            assert refusal.tier is not None
            limits = replace(limits, **{refusal.tier: refusal.needed})  # type: ignore[arg-type]


def advice(outlook: Outlook) -> str:
    """The end of a refusal: what would fit."""
    if outlook.alternatives:
        fitting = "; ".join(describe(alternative.change) for alternative in outlook.alternatives)
        return f"the nearest settings that fit: {fitting}"
    assert outlook.least is not None
    host, device = (format_bytes(num_bytes) for num_bytes in outlook.least)
    return f"no settings near these fit; with the smallest ones it takes {host} of host and {device} of device memory"


def worthwhile(outlook: Outlook, gain: float = 0.01) -> Iterable[Alternative]:
    """The alternatives that are faster, or need less of a tier, by more than `gain` of what was asked for."""
    assert outlook.forecast is not None
    base = outlook.forecast
    for alternative in outlook.alternatives:
        other = alternative.forecast
        if other is None:
            continue
        speed = 1.0
        if other.prediction is not None and base.prediction is not None:
            speed = other.prediction.tokens_per_s / base.prediction.tokens_per_s
        sizes: Sequence[float] = [
            other.plan.num_bytes(tier) / max(base.plan.num_bytes(tier), 1) for tier in ("host", "device")
        ]
        if speed > 1 + gain or min(sizes) < 1 - gain:
            yield alternative
