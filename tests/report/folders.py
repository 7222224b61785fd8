"""Folders as runs leave them, without running anything."""

import dataclasses
import json
import math

from horizon.plan.memory import Line
from horizon.plan.prediction import StepPrediction
from horizon.records import CheckpointRow, StepRow, StepSplit, Traffic
from horizon.report.facts import RunFacts
from horizon.report.measurements import Run
from horizon.report.metrics import from_row, to_json
from horizon.units import GIB

ENVIRONMENT = Run(
    machine="box, 2 CPUs", commit="abc1234", versions={"torch": "2.11"}, command="horizon train optim.lr=1e-3",
    date="2026-11-27 12:00", seconds=61.0, facts={"kernel": "6.1"},
)  # fmt: skip
SPLIT = StepSplit(
    steps=3, step_ms=100.0, arithmetic_ms=70.0, link_ms=20.0, optimizer_ms=5.0, disk_ms=0.0, data_ms=3.0, launch_ms=2.0,
    hbm_update_ms=0.0, forward_ms=20.0, head_ms=10.0, backward_ms=40.0, host_paced_ms=0.0,
    traffic=[Traffic(direction="H2D", what="weights", num_bytes=1 << 20, least_bytes=1 << 20, busy_ms=9.0)],
    update_bytes=100, update_ms=1.0, update_threads=1, update_bytes_per_s=1e5,
)  # fmt: skip
PLANNED = [
    Line("host", "weights (bf16)", 2 * GIB), Line("host", "framework", GIB), Line("device", "weight slots (2)", GIB),
]  # fmt: skip


def row(step, **values):
    """A step whose numbers all follow from its own."""
    numbers = {
        "step": step, "epoch": 0, "loss": 5.0 - 0.01 * step, "lr": 1e-3 * step, "grad_norm": 1.0 + 0.1 * (step % 5),
        "num_tokens": 100, "num_trained_tokens": 90, "seconds": 0.5, "tokens_per_s": 200.0 + step,
        "host_bytes": 3 * GIB + step, "device_bytes": GIB, "skipped": False, "clip_scale": 0.5 if step % 2 else 1.0,
        "corrected_blocks": 0, "projected_gradients": [], "simulated": False, "time": 1.7e9 + step,
    }  # fmt: skip
    return from_row(StepRow, numbers | values)


def facts(**values):
    known = {
        "started": 1.7e9, "ended": 1.7e9 + 61, "environment": ENVIRONMENT, "device": "cuda:0", "status": "finished",
        "num_parameters": 1000, "planned": PLANNED, "limits": {"host": 8 * GIB, "device": 2 * GIB}, "split": SPLIT,
        "predicted": StepPrediction(num_tokens=100, arithmetic_s=0.06, link_s=0.01, optimizer_s=0.0, launch_s=0.005),
        "validation_loss_before": 5.5, "prompt": "once", "sample_before": " xx",
    }  # fmt: skip
    return RunFacts(**known | values)


def checkpoint(step, stall_s=0.25):
    return CheckpointRow(step=step, folder=f"checkpoints/step-{step}", num_bytes=GIB, seconds=2.0, bytes_per_s=GIB / 2,
                         stall_s=stall_s, room_s=0.1, time=1.7e9)  # fmt: skip


def write_run(folder, rows=(), settings=None, notes=None, checkpoints=(), after=4.0, sample=" upon a time"):
    """The folder of a run; `notes` None: of an earlier version; `after` None: it did not finish."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(to_json(one) + "\n" for one in rows))
    lines = [f"{key}: {json.dumps(value)}" for key, value in (settings or {}).items()]
    (folder / "config.yaml").write_text("\n".join(lines) + "\n" if lines else "{}\n")
    if checkpoints:
        (folder / "checkpoints.jsonl").write_text("".join(to_json(one) + "\n" for one in checkpoints))
    if notes is not None:
        notes.write(folder)
    if after is not None:
        summary = {
            "steps": rows[-1].step if rows else 0, "validation_loss_before": 5.5, "validation_loss_after": after,
            "sample_before": " xx", "sample_after": sample, "split": dataclasses.asdict(SPLIT),
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


NAN = math.nan
