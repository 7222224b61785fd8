"""An outlook in words and as JSON. The field names are stable; docs/planning.md lists them."""

from __future__ import annotations

import dataclasses
from typing import Any

from horizon.config.schema import HorizonConfig, Recompute
from horizon.errors import BudgetError
from horizon.forecast.changes import describe, plain
from horizon.forecast.imagined import Forecast
from horizon.forecast.machine import Target
from horizon.forecast.outlook import Alternative, Outlook, advice, worthwhile
from horizon.models.shape import ModelShape
from horizon.plan.facts import MachineFacts
from horizon.plan.memory import MemoryPlan
from horizon.plan.prediction import StepPrediction, format_seconds
from horizon.units import format_bytes

TIERS = "host", "device"


def as_json(outlook: Outlook, config: HorizonConfig, name: str, model: ModelShape, target: Target) -> dict[str, Any]:
    """The outlook as one JSON object; all sizes in bytes, all times in seconds. `name`: what people call the model."""
    plan = None if outlook.forecast is None else _plan(outlook.forecast)
    refusal = None if outlook.refusal is None else refusal_json(outlook.refusal, outlook.least)
    found = [_alternative(other) for other in outlook.alternatives]
    return whole_json(config, name, model, target, plan, refusal) | {"alternatives": found}


def whole_json(
    config: HorizonConfig, name: str, model: ModelShape, target: Target,
    plan: dict[str, Any] | None, refusal: dict[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """The object without alternatives."""
    return {
        "fits": plan is not None,
        "model": {
            "name": name,
            "architecture": model.architecture,
            "blocks": len(model.layouts),
            "parameters": model.num_parameters,
            "trainable_parameters": model.num_trainable,
        },
        "machine": machine_json(target.facts) | {"computes_on": target.device.type},
        "settings": _settings(config),
        "plan": plan,
        "refusal": refusal,
        "alternatives": [],
    }


def machine_json(facts: MachineFacts) -> dict[str, Any]:
    """A machine's facts for JSON."""
    found = dataclasses.asdict(facts)
    found["updates_per_s"] = {str(moments): rate for moments, rate in facts.updates_per_s.items()}
    return found | {"update_threads": facts.update_threads}


def _settings(config: HorizonConfig) -> dict[str, Any]:
    chosen: dict[str, Any] = {
        f"{section}.{field.name}": getattr(getattr(config, section), field.name)
        for section in ("train", "memory", "optim")
        for field in dataclasses.fields(getattr(config, section))
    }
    chosen["memory.rules"] = [dataclasses.asdict(rule) for rule in config.memory.rules]
    return plain(chosen | {"compute_dtype": config.compute_dtype, "kernels": config.kernels, "device": config.device})


def _plan(forecast: Forecast) -> dict[str, Any]:
    return plan_json(forecast.plan, forecast.config, forecast.micro_batch) | {
        "blocks_in_hbm": sorted(forecast.needs.in_hbm),
        "recompute": {str(kind): forecast.layers_that(kind) for kind in KINDS},
        "offloaded_boundaries": len(forecast.activations.offloaded),
    }


def plan_json(plan: MemoryPlan, config: HorizonConfig, micro_batch: int) -> dict[str, Any]:
    """A plan's bytes and its step; what only gradients need is null."""
    return {
        "memory": [
            {"tier": line.tier, "purpose": line.purpose, "bytes": line.num_bytes}
            for line in (*plan.lines, *plan.activations)
        ],
        "host_bytes": plan.num_bytes("host"),
        "host_limit_bytes": plan.limits.host,
        "cxl_bytes": plan.num_bytes(plan.limits.cxl.name),
        "cxl_limit_bytes": plan.limits.cxl.num_bytes,
        "cxl_simulated": plan.limits.cxl.simulated,
        "device_bytes": plan.num_bytes("device"),
        "device_limit_bytes": plan.limits.device,
        "nvme_bytes": plan.num_bytes("nvme"),
        "nvme_limit_bytes": plan.limits.nvme,
        "micro_batch": micro_batch,
        "micro_batches": -(-config.train.batch_size // micro_batch),
        "blocks_in_hbm": None,
        "recompute": None,
        "offloaded_boundaries": None,
        "step": None if plan.prediction is None else _step(plan.prediction),
    }


def _step(prediction: StepPrediction) -> dict[str, Any]:
    return {
        "seconds": prediction.seconds,
        "tokens": prediction.num_tokens,
        "tokens_per_s": prediction.tokens_per_s,
        "bound": prediction.bound,
        "arithmetic_s": prediction.arithmetic_s,
        "link_s": prediction.link_s,
        "optimizer_s": prediction.optimizer_s,
        "disk_s": prediction.disk_s,
        "launch_s": prediction.launch_s,
    }


KINDS = Recompute.full, Recompute.selective, Recompute.none


def refusal_json(refusal: BudgetError, least: tuple[int, int] | None = None) -> dict[str, Any]:
    """Why a run does not fit; `least`: (host, device) bytes of the smallest settings, where they are of interest."""
    host, device = least or (None, None)
    return {
        "message": str(refusal),
        "tier": refusal.tier,
        "needed_bytes": refusal.needed,
        "limit_bytes": refusal.limit,
        "shortfall_bytes": refusal.needed - refusal.limit,
        "least_host_bytes": host,
        "least_device_bytes": device,
    }


def _alternative(other: Alternative) -> dict[str, Any]:
    forecast = other.forecast
    found: dict[str, Any] = {"settings": plain(other.change), "fits": forecast is not None}
    for name in ("seconds", "tokens_per_s", "host_bytes", "device_bytes", "micro_batch"):
        found[name] = None
    if forecast is not None:
        prediction, plan = forecast.prediction, forecast.plan
        if prediction is not None:
            found |= {"seconds": prediction.seconds, "tokens_per_s": prediction.tokens_per_s}
        found |= {f"{tier}_bytes": plan.num_bytes(tier) for tier in TIERS} | {"micro_batch": forecast.micro_batch}
    return found


# ---- in words


def as_text(outlook: Outlook, name: str, target: Target) -> str:
    """The outlook as a few lines and tables."""
    facts = target.facts
    head = f"{name} on {facts.name} ({facts.source})"
    if outlook.forecast is None:
        lines = [head, f"does not fit: {outlook.refusal}"]
        if outlook.alternatives:
            return "\n".join([*lines, "the nearest settings that fit:", *_table(outlook.alternatives)])
        return "\n".join([*lines, advice(outlook)])
    better = list(worthwhile(outlook))
    asked = Alternative({}, outlook.forecast)
    lines = [head, outlook.forecast.plan.table(), *_choices(outlook.forecast)]
    return "\n".join([*lines, "other settings, faster or smaller:", *_table([asked, *better])] if better else lines)


def _choices(forecast: Forecast) -> list[str]:
    """What was chosen, in words."""
    train, layers = forecast.config.train, len(forecast.needs.layouts) - 2
    number = -(-train.batch_size // forecast.micro_batch)
    kept = ", ".join(
        f"{words} {forecast.layers_that(kind)}"
        for kind, words in zip(KINDS, ("run again", "keep linear outputs", "keep their graph"), strict=True)
    )
    return [
        f"  micro-batches   {number} of {forecast.micro_batch} rows of {train.seq_len} tokens",
        f"  {layers} layers       {kept}; {len(forecast.activations.offloaded)} boundaries on the host",
        f"  in HBM          the states of {len(forecast.needs.in_hbm)} of {layers + 2} blocks",
    ]


def _table(alternatives: list[Alternative] | tuple[Alternative, ...]) -> list[str]:
    """One row for each."""
    rows: list[tuple[str, ...]] = [("", "step", "tokens/s", "host", "device", "micro-batch")]
    for other in alternatives:
        forecast = other.forecast
        assert forecast is not None
        step = forecast.prediction
        rows.append(
            (
                describe(other.change) or "as asked",
                "not predicted" if step is None else format_seconds(step.seconds),
                "" if step is None else f"{step.tokens_per_s:,.0f}",
                *(format_bytes(forecast.plan.num_bytes(tier)) for tier in TIERS),
                f"{forecast.micro_batch} rows",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
