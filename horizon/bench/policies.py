"""Steps of a small model under each policy of placement: what the plan said they would take, and what they took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from horizon.config.schema import MemoryConfig, Policy, SimulatedCxl
from horizon.engine import Engine
from horizon.errors import HorizonError
from horizon.optim.adamw import AdamW
from horizon.plan.cxl import POLICIES
from horizon.plan.machine import host_overhead, resolve_device
from horizon.plan.policies import POLICY_RULES
from horizon.report.measurements import Row, Setting, Skipped
from horizon.units import MIB, align_up

STATES_KEPT = 10  # bytes a parameter that cxl_aware may have in DRAM: moments and residual; the rest spills
MARGIN = 48 * MIB  # by which the process itself grows while an engine is built
UNPREDICTED = 2  # steps that take pages, compile, or have work of planning behind them
LIMIT_S = 60.0  # for the steps of one policy: on a machine that slow there are fewer
LEAST_STEPS = 3


@dataclass(frozen=True, slots=True)
class Shape:
    """A model and a step."""

    hidden_size: int
    num_layers: int
    vocab_size: int
    rows: int
    seq_len: int
    steps: int

    @property
    def config(self) -> dict[str, object]:
        """For transformers."""
        return {
            "model_type": "llama", "hidden_size": self.hidden_size,
            "intermediate_size": align_up(self.hidden_size * 8 // 3, 64),  # for which GPUs have fast kernels
            "num_hidden_layers": self.num_layers, "num_attention_heads": self.hidden_size // 64,
            "num_key_value_heads": self.hidden_size // 64, "vocab_size": self.vocab_size,
        }  # fmt: skip


def policies(shape: Shape, simulated_gb_per_s: float, disk_folder: Path) -> Iterator[Row | Skipped]:
    """A row for each policy, or why this machine cannot follow it.

    Args:
        simulated_gb_per_s: of a stand-in for the cxl tier; 0: its nodes.
        disk_folder: for states on nvme.
    """
    num_parameters = 0
    for policy in Policy:
        memory, overhead = MemoryConfig(policy=policy), host_overhead(resolve_device("auto"))
        if policy in POLICY_RULES:
            memory.nvme_dir = str(disk_folder)
        if policy in POLICIES:
            if simulated_gb_per_s:
                memory.cxl_simulated = SimulatedCxl(size="4GiB", gb_per_s=simulated_gb_per_s)
            if policy is Policy.cxl_aware:
                memory.host_budget = str(overhead + MARGIN + STATES_KEPT * num_parameters)
        try:
            with Engine.from_config(
                shape.config, optimizer=AdamW(lr=1e-5), memory=memory, self_check=False, max_grad_norm=1.0
            ) as engine:
                num_parameters = max(num_parameters, engine.plan.num_parameters)
                yield _row(engine, policy, shape)
        except (HorizonError, torch.OutOfMemoryError) as error:
            yield Skipped(test="step", place=policy, reason=str(error))


def _row(engine: Engine, policy: Policy, shape: Shape) -> Row:
    rows = engine.plan_micro_batch(shape.rows, shape.seq_len)
    predicted, cxl = engine.plan.prediction, engine.plan.limits.cxl
    dice = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, shape.vocab_size, (shape.rows, shape.seq_len), generator=dice)
    batches = [{"input_ids": part, "labels": part} for part in torch.split(tokens, rows)]
    begun, times = time.perf_counter(), list[float]()
    while len(times) < shape.steps + UNPREDICTED and (
        len(times) < LEAST_STEPS + UNPREDICTED or time.perf_counter() - begun < LIMIT_S
    ):
        started = time.perf_counter()
        engine.step(batches)
        times.append(time.perf_counter() - started)  # the next step waits for this one's update
    settings: dict[str, Setting] = {"parameters": engine.plan.num_parameters, "tokens": shape.rows * shape.seq_len}
    if cxl.bytes_per_s is not None:
        settings["tier_gb_per_s"] = cxl.bytes_per_s / 1e9
    also = {"on_cxl_bytes": float(engine.plan.num_bytes(cxl.name))} if cxl.num_bytes else {}
    if predicted is not None:
        also["planned_s"] = predicted.seconds
    name = f"{policy} (simulated)" if cxl.simulated else str(policy)
    return Row.of("step", name, settings, "s", times[UNPREDICTED:], also=also, simulated=cxl.simulated)
