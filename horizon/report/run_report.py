"""The report of one run: a page that needs nothing else, and a JSON file with the same numbers."""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from horizon.report.charts import Chart
from horizon.report.facts import Status
from horizon.report.metrics import finite
from horizon.report.page import render, require_report_extra
from horizon.report.run_charts import (
    WAITS,
    measured_bytes,
    memory_charts,
    planned_bytes,
    split_charts,
    split_parts,
    training_charts,
)
from horizon.report.runs import CHECKPOINTS, TrainingRun, format_duration, write_number
from horizon.report.settings import changed, show
from horizon.units import format_bytes

FORMAT = 1
REPORT = "report.html"
SHOWN_CHECKPOINTS = 20  # the last ones; the JSON file has all


def write_report(run: TrainingRun, path: Path) -> None:
    """The page at `path`, and its numbers beside it in a file that ends in .json.

    Raises:
        ConfigError: matplotlib or jinja2 is not installed.
    """
    require_report_extra()
    charts = {"training": training_charts(run), "step": split_charts(run), "memory": memory_charts(run)}
    memory = list(zip(charts["memory"], memory_rows(run), strict=True))
    page = render(
        "run.html.j2", run=run, title=title_of(run), banner=banner(run), cards=cards(run), charts=charts,
        origin=origin(run), picture=_picture(run), split=split_rows(run), memory=memory,
        checkpoints=checkpoint_rows(run), stall=_stall(run), samples=run.samples, changed=changed(run.settings),
        settings=[(key, show(value)) for key, value in run.settings.items()], environment=environment(run),
    )  # fmt: skip
    path.write_text(page, encoding="utf-8", errors="replace")  # paths may hold any bytes
    content = as_json(run, [chart for part in charts.values() for chart in part])
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def as_json(run: TrainingRun, charts: Sequence[Chart]) -> dict[str, Any]:
    """What the page shows, as numbers; what is not finite is null."""
    prompt, before, after = run.samples
    content: dict[str, Any] = {
        "format": FORMAT,
        "run": str(run.folder.resolve()),
        "status": run.status,
        "error": None if run.facts is None else run.facts.error,
        "last_good_step": None if run.last_good is None else run.last_good.step,
        "numbers": run.numbers,
        "validation": [{"step": step, "loss": loss} for step, loss in run.validation],
        "charts": [chart.as_json() for chart in charts],
        "split": None if run.split is None else asdict(run.split),
        "predicted": None if run.facts is None or run.facts.predicted is None else asdict(run.facts.predicted),
        "memory": [
            {"tier": tier, "planned_bytes": planned, "measured_bytes": measured, "limit_bytes": limit}
            for tier, planned, measured, limit in _tiers(run)
        ],
        "planned": [] if run.facts is None else [asdict(line) for line in run.facts.planned],
        "checkpoints": [asdict(row) for row in run.checkpoints],
        "samples": {"prompt": prompt, "before": before, "after": after},
        "settings": run.settings,
        "changed": [key for key, _, _ in changed(run.settings)],
        "environment": None if run.facts is None else asdict(run.facts.environment),
    }
    cleaned: dict[str, Any] = finite(content)
    return cleaned


# ---- the top of the page


def title_of(run: TrainingRun) -> str:
    """The model's name, and the run's."""
    settings = run.settings
    path = settings.get("model.path")
    model = Path(str(path)).name if path else settings.get("model.config.model_type")
    return f"{model}, {run.name}" if model else run.name


def origin(run: TrainingRun) -> list[str]:
    """When, where and how, a piece each."""
    if run.facts is None:
        return [str(run.folder)]
    there, facts = run.facts.environment, run.facts
    took = [f"took {format_duration(facts.ended - facts.started)}"] if facts.ended is not None else []
    return [time.strftime("%Y-%m-%d %H:%M", time.localtime(facts.started)), f"commit {there.commit}", *took]


def banner(run: TrainingRun) -> dict[str, str] | None:
    """What is to be said first of a run that did not finish: what happened, how far it came, how to go on."""
    if run.status is Status.finished:
        return None
    head = {
        Status.running: "This run has not ended, or it was killed",
        Status.failed: "This run failed",
        Status.interrupted: "This run was interrupted",
    }[run.status]
    good = run.last_good
    steps = run.settings.get("train.steps")
    far = "No step was completed." if good is None else (
        f"The last good step is {good.step:,}{f' of {steps:,}' if steps else ''}, with a loss of {good.loss:.4f}."
    )  # fmt: skip
    if run.checkpoints:
        last = run.checkpoints[-1]
        far += f" Its last checkpoint is of step {last.step:,}: resume=auto hydra.run.dir={run.folder} goes on from it."
    facts = run.facts
    return {
        "head": head,
        "error": (facts.error if facts is not None else None) or "",
        "far": far,
        "traceback": (facts.traceback if facts is not None else None) or "",
    }


def cards(run: TrainingRun) -> list[tuple[str, str, str, str]]:
    """(name, value, unit, note) of what is asked for first."""
    numbers, found = run.numbers, []

    def add(name: str, key: str, unit: str = "", note: str = "") -> None:
        if numbers[key] is not None:
            found.append((name, write_number(key, numbers[key]), unit, note))

    before, after = numbers["validation_loss_before"], numbers["validation_loss_after"]
    if after is not None:
        from_what = "" if before is None else f"{before:.4f} before training; "
        add("validation loss", "validation_loss_after", "", f"{from_what}perplexity {_perplexity(after)}")
    last = write_number("loss", numbers["loss"])
    add("training loss", "recent_loss", "", f"mean of the last 5 % of steps; last {last}")
    if run.rows:
        add("steps", "steps", "", f"{write_number('tokens', numbers['tokens'])} tokens")
    add("throughput", "tokens_per_s", "tokens/s", f"{write_number('seconds', numbers['seconds'])} in steps")
    for tier, planned, measured, _ in _tiers(run):
        if measured is not None:
            found.append((f"{tier} peak", format_bytes(measured), "", f"planned {format_bytes(planned)}"))
    if run.settings.get("optim.max_grad_norm") is not None and run.rows and not run.rows[-1].projected_gradients:
        add("clipped steps", "clipped_share", "", f"gradient norm above {run.settings['optim.max_grad_norm']:g}")
    if numbers["skipped_steps"]:
        add("skipped steps", "skipped_steps", "", "gradients were not finite")
    return found


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.3g}" if loss < 700 else "beyond any number"


# ---- tables


def split_rows(run: TrainingRun) -> list[tuple[str, str, str, str]]:
    """(part, ms, share, what it is made of) of a recorded step."""
    split = run.split
    if split is None:
        return []
    passes = f"forward {split.forward_ms:.3g}, head {split.head_ms:.3g}, backward {split.backward_ms:.3g} ms"
    updates = f"{split.hbm_update_ms:.3g} ms of it updating in HBM" if split.hbm_update_ms else ""
    notes = {"arithmetic": passes, WAITS["optimizer"]: updates}
    rows = [
        (part, f"{value:,.3g}", f"{value / split.step_ms:.1%}" if split.step_ms else "-", notes.get(part, ""))
        for part, value in split_parts(split).items()
    ]
    moved = [
        (f"{t.direction} {t.what}", f"{t.busy_ms:,.3g}", "", f"{format_bytes(t.num_bytes)}, needed "
         f"{format_bytes(t.least_bytes)}")
        for t in split.traffic
    ]  # fmt: skip
    return [*rows, ("whole step", f"{split.step_ms:,.3g}", "100%", ""), *moved]


def _tiers(run: TrainingRun) -> list[tuple[str, int, float | None, int | None]]:
    """(tier, planned bytes, measured ones, limit) of what the plan uses."""
    if run.facts is None:
        return []
    planned = run.facts.planned
    return [
        (tier, planned_bytes(planned, tier), measured_bytes(run, tier), run.facts.limits.get(tier))
        for tier in dict.fromkeys(line.tier for line in planned)
    ]


def memory_rows(run: TrainingRun) -> list[list[tuple[str, str]]]:
    """For each tier (purpose, bytes) of all lines of the plan, their sum and the measured peak."""
    tables = []
    for tier, planned, measured, limit in _tiers(run):
        assert run.facts is not None
        rows = [(line.purpose, format_bytes(line.num_bytes)) for line in run.facts.planned if line.tier == tier]
        rows.append(("planned peak", format_bytes(planned)))
        if measured is not None:
            rows.append(("measured peak", f"{format_bytes(measured)} ({measured / planned - 1:+.1%})"))
        if limit is not None:
            rows.append(("may be used", format_bytes(limit)))
        tables.append(rows)
    return tables


def checkpoint_rows(run: TrainingRun) -> list[tuple[str, ...]]:
    """(step, size, time, speed, stall, of it for the disk) of the last ones."""
    return [
        (f"{row.step:,}", format_bytes(row.num_bytes), format_duration(row.seconds),
         f"{format_bytes(row.bytes_per_s)}/s", f"{row.stall_s * 1e3:,.3g} ms", f"{row.room_s * 1e3:,.3g} ms")
        for row in run.checkpoints[-SHOWN_CHECKPOINTS:]
    ]  # fmt: skip


def _stall(run: TrainingRun) -> str:
    """What all checkpoints cost, in a sentence."""
    stalled, seconds = run.numbers["checkpoint_stall_s"], run.numbers["seconds"]
    if stalled is None:
        return ""
    share = f", {stalled / seconds:.2%} of the time in steps" if seconds else ""
    left_out = len(run.checkpoints) - SHOWN_CHECKPOINTS
    listed = f" The last {SHOWN_CHECKPOINTS} are listed, {CHECKPOINTS} has all." if left_out > 0 else ""
    count = f"{len(run.checkpoints)} checkpoint{'s' if len(run.checkpoints) != 1 else ''}"
    return f"{count}; training stood still for {format_duration(stalled)}{share}.{listed}"


def environment(run: TrainingRun) -> list[tuple[str, str]]:
    """Machine, versions, command and folder."""
    if run.facts is None:
        return [("folder", str(run.folder.resolve()))]
    there = run.facts.environment
    versions = ", ".join(f"{name} {version}" for name, version in there.versions.items())
    return [
        ("machine", there.machine), ("command", there.command), ("commit", there.commit), ("versions", versions),
        ("folder", str(run.folder.resolve())), *there.facts.items(),
    ]  # fmt: skip


def _picture(run: TrainingRun) -> str | None:
    """The timeline as a data URI."""
    if run.picture is None:
        return None
    return "data:image/png;base64," + base64.b64encode(run.picture.read_bytes()).decode()
