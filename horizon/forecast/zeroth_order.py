"""What a zeroth-order run would use, and how long its steps would take: `horizon.zo.plan` on estimates.

A step is as long as the slower of two things that run beside each other: what crosses the link, and what the device
computes, which is two forward passes a query and the noise. docs/planning.md says how far off that is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from horizon.config.schema import HorizonConfig, Moments, Recompute
from horizon.errors import BudgetError, ConfigError
from horizon.forecast.machine import Target
from horizon.forecast.report import plan_json, refusal_json, whole_json
from horizon.models.shape import ModelShape
from horizon.plan.cost import HOST_S
from horizon.plan.estimate import WORKSPACE, Estimator
from horizon.plan.memory import WEIGHT_SLOTS, MemoryPlan
from horizon.plan.prediction import StepPrediction
from horizon.stream.head import chunk_tokens
from horizon.zo.masters import states_of
from horizon.zo.plan import (
    HEAD_CHUNK_BYTES,
    WorkingSet,
    ZerothOrderNeeds,
    choose_rows,
    least_traffic,
    plan_memory,
    refuse_what_has_no_use,
    with_activations,
)
from horizon.zo.settings import ZerothOrder

WIDEST = 2  # of the widest activation, that a forward pass holds beside its inputs
LOGITS = 2  # copies of a chunk's logits that the head holds
NOISE_BYTES = 10.5  # of device memory's rate, that updating and perturbing a parameter takes (measured on an H100)


@dataclass(frozen=True, slots=True)
class ZerothOrderForecast:
    """What a run with these settings would use, or why it cannot be."""

    config: HorizonConfig
    plan: MemoryPlan | None
    micro_batch: int | None
    refusal: BudgetError | None = None


def forecast_zeroth_order(
    model: ModelShape, target: Target, settings: ZerothOrder, config: HorizonConfig
) -> ZerothOrderForecast:
    """The run that `horizon train` would make of these settings.

    Raises:
        ConfigError: settings that cannot work.
    """
    memory, train = config.memory, config.train
    refuse_what_has_no_use(memory)
    if model.max_positions is not None and train.seq_len > model.max_positions:
        raise ConfigError(f"train.seq_len={train.seq_len}, but the model has only {model.max_positions} positions")
    dtype = settings.compute_dtype(config.compute_dtype, target.device)
    chunk = chunk_tokens(model.vocab_size, HEAD_CHUNK_BYTES)
    estimator = Estimator.of(model, target.facts, dtype, target.fused(config.kernels), target.on_gpu, chunk)
    overhead = target.device_overhead + model.buffer_bytes
    slots = memory.weight_slots or WEIGHT_SLOTS
    needs = ZerothOrderNeeds(model.layouts, settings, dtype, slots, target.host_overhead, overhead)
    token_bytes, working = model.hidden_size * dtype.itemsize, _working_set(estimator, train.seq_len)
    try:
        plan = plan_memory(needs, target.limits(memory))
        rows = train.micro_batch or choose_rows(
            plan, train.batch_size, train.seq_len, settings.queries, token_bytes, working
        )
        shapes = [(min(rows, train.batch_size - i), train.seq_len) for i in range(0, train.batch_size, rows)]
        plan = with_activations(plan, shapes, settings.queries, token_bytes, working)
    except BudgetError as refusal:
        return ZerothOrderForecast(config, None, None, refusal)
    predicted = _predict(needs, estimator, shapes, target)
    return ZerothOrderForecast(config, plan.with_activations(plan.activations, predicted), rows)


def _working_set(estimator: Estimator, seq_len: int) -> WorkingSet:
    """Of a forward pass; none on CPU, as an engine has it there."""
    if not estimator.on_gpu:
        return WorkingSet()
    size = estimator.dtype.itemsize
    per_token = max(WIDEST * layer.widest * size for layer in estimator.work.layers)
    logits = min(estimator.chunk, seq_len) * estimator.work.vocab_size * size * LOGITS
    return WorkingSet(WORKSPACE, per_token, WORKSPACE + logits)


def _predict(
    needs: ZerothOrderNeeds, estimator: Estimator, shapes: list[tuple[int, int]], target: Target
) -> StepPrediction:
    settings, moves = needs.settings, least_traffic(needs)
    passes = 0.0
    for shape in shapes:
        times = estimator.step_times(shape, 0, {Recompute.full}, True)
        layers = [times.layers[lay.num_elements, lay.num_trainable, Recompute.full] for lay in needs.layouts[1:-1]]
        passes += times.embedding.forward_s + sum(layer.forward_s for layer in layers) + times.head_s / 3
    rates = estimator.rates(Moments.float32, None)  # of copies: there are no moments
    trained = sum(layout.num_trainable for layout in needs.layouts)
    frozen = sum(layout.num_elements for layout in needs.layouts) - trained
    copied = sum(state.dtype.itemsize for state in states_of(settings)) + needs.compute_dtype.itemsize
    noise = (settings.queries * trained * NOISE_BYTES + frozen * copied) / rates.device_bytes_per_s
    arithmetic = 2 * settings.queries * passes + noise
    up, down = moves["H2D", "weights"] / rates.up_bytes_per_s, moves["D2H", "weights"] / rates.down_bytes_per_s
    link = max(0.0, max(up, down) - arithmetic) if target.on_gpu else up + down
    tokens = sum(rows * length for rows, length in shapes)
    return StepPrediction(num_tokens=tokens, arithmetic_s=arithmetic, link_s=link, optimizer_s=0.0, launch_s=HOST_S)


# ---- what is shown


def zeroth_order_text(forecast: ZerothOrderForecast, name: str, target: Target) -> str:
    """The forecast as a table."""
    head = f"{name} on {target.facts.name} ({target.facts.source})"
    if forecast.plan is None:
        return f"{head}\ndoes not fit: {forecast.refusal}"
    train, rows = forecast.config.train, forecast.micro_batch
    assert rows is not None
    batches = f"  micro-batches   {-(-train.batch_size // rows)} of {rows} rows of {train.seq_len} tokens"
    return "\n".join([head, forecast.plan.table(), batches])


def zeroth_order_json(forecast: ZerothOrderForecast, name: str, model: ModelShape, target: Target) -> dict[str, Any]:
    """The forecast as one JSON object, with the fields that `horizon.forecast.report` gives."""
    plan = refusal = None
    if forecast.refusal is not None:
        refusal = refusal_json(forecast.refusal)
    elif forecast.plan is not None and forecast.micro_batch is not None:
        plan = plan_json(forecast.plan, forecast.config, forecast.micro_batch)
    return whole_json(forecast.config, name, model, target, plan, refusal)
