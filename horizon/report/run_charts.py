"""The charts of a run's report, and those that put several runs on the same axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from horizon.plan.memory import Line
from horizon.records import StepRow, StepSplit
from horizon.report.charts import SERIES, Axis, BarChart, Chart, LineChart, Series, Style
from horizon.report.curves import MOST_POINTS, smoothed, thinned, window
from horizon.report.measurements import short_number
from horizon.report.runs import TrainingRun
from horizon.units import GIB, MIB

STEP = Axis("step")
WIDE_RANGE = 30  # largest over smallest: from here on an axis is logarithmic
CLIP_WINDOW = 10  # steps, at least, that a share of clipped steps is of
SHOWN_QUERIES = 4
FACTORS, MOST_TICKS = 5, 8  # values of a setting: so far apart they are tried by factors; so few have a tick each
TIER_NAMES = {"host": "Host memory", "device": "Device memory", "nvme": "Disk"}

Value = Callable[[StepRow], float]


def short_rate(rate: float) -> str:
    """`0.5`, `2e-3`, `1.25e-4`: small numbers of one axis look alike."""
    if rate >= 0.1 or rate <= 0:
        return f"{rate:.3g}"
    digits, exponent = f"{rate:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


RATE = Axis("learning rate", text=short_rate, from_zero=True)


def curve(label: str, rows: Sequence[StepRow], value: Value, color: int = 0, smooth: bool = True) -> list[Series]:
    """A value over the steps: of many, the mean around each, and the values themselves behind it."""
    steps, values = [row.step for row in rows], [value(row) for row in rows]
    over = window(len(rows)) if smooth else 1
    if over == 1:
        return [Series(label, *thinned(steps, values), color)]
    mean = Series(label, *thinned(steps, smoothed(values, over)), color)
    return [mean, Series("", *thinned(steps, values), color, Style.faint)]


def how_drawn(num_steps: int) -> str:
    """What a caption has to say of curves of so many steps."""
    over = window(num_steps)
    said = f" Bold: mean of {over} steps; faint: single steps." if over > 1 else ""
    if num_steps > MOST_POINTS:
        said += f" Of {num_steps:,} steps the highest and lowest of each stretch are drawn, {MOST_POINTS} at most."
    return said


# ---- training


def training_charts(run: TrainingRun) -> list[Chart]:
    """Loss, learning rate, gradients, clipping and throughput; none without steps."""
    rows = run.rows
    if not rows:
        return []
    charts = [_loss(run), _rate(rows)]
    if any(row.projected_gradients for row in rows):
        charts.append(_projected(rows))
    else:
        charts.append(_gradients(run))
        if run.settings.get("optim.max_grad_norm") is not None:
            charts.append(_clipping(rows))
    return [*charts, _throughput(run), _host_memory(run)]


def _loss(run: TrainingRun) -> Chart:
    rows, says = run.rows, "Mean over the trained tokens of each step, before its update."
    series = curve("training", rows, lambda row: row.loss)
    if run.validation:
        steps, losses = [step for step, _ in run.validation], [loss for _, loss in run.validation]
        series.append(Series("validation", steps, losses, 1, Style.points))
        says += " Points: held-out rows."
    lost = [row.step for row in rows if not math.isfinite(row.loss)]
    if lost:
        series.append(Series("not finite", lost[:MOST_POINTS], [math.nan] * len(lost[:MOST_POINTS]), 3, Style.marks))
        says += f" {len(lost):,} of {len(rows):,} steps had no finite loss, the first was step {lost[0]:,}."
    return LineChart(title="Loss", says=says + how_drawn(len(rows)), x=STEP, y=Axis("loss"), series=tuple(series))


def _rate(rows: Sequence[StepRow]) -> Chart:
    series = curve("", rows, lambda row: row.lr, smooth=False)
    return LineChart(title="Learning rate", says="As the schedule gave it.", x=STEP, y=RATE, series=tuple(series))


def _gradients(run: TrainingRun) -> Chart:
    series, limit = curve("norm", run.rows, lambda row: row.grad_norm), run.settings.get("optim.max_grad_norm")
    says = "L2 norm of all gradients, before clipping."
    if limit is not None:
        series.append(Series(f"clipped to {limit:g}", [], [float(limit)], 1, Style.level))
    y = _norm([row.grad_norm for row in run.rows])
    return LineChart(
        title="Gradient norm", says=says + how_drawn(len(run.rows)), x=STEP, y=y, series=tuple(series)
    )  # fmt: skip


def _clipping(rows: Sequence[StepRow]) -> Chart:
    over = min(len(rows), max(CLIP_WINDOW, window(len(rows))))
    shares = [100 * share for share in smoothed([float(row.clip_scale < 1) for row in rows], over)]
    clipped = sum(row.clip_scale < 1 for row in rows)
    return LineChart(
        title="Clipped steps",
        says=f"Share of the {over} steps around each whose gradients were scaled down; {clipped:,} of {len(rows):,} in "
        "all.",
        x=STEP,
        y=Axis("%", limits=(-3.0, 103.0)),
        series=(Series("", *thinned([row.step for row in rows], shares)),),
    )


def _projected(rows: Sequence[StepRow]) -> Chart:
    num_queries = min(SHOWN_QUERIES, max(len(row.projected_gradients) for row in rows))
    series = [
        line
        for query in range(num_queries)
        for line in curve("" if num_queries == 1 else f"query {query + 1}", rows, _query(query), query)
    ]
    says = "Slope of the loss along the noise of each query, (L+ - L-) / (2 eps)." + how_drawn(len(rows))
    return LineChart(title="Projected gradients", says=says, x=STEP, y=Axis("slope"), series=tuple(series))


def _query(number: int) -> Value:
    return lambda row: row.projected_gradients[number] if number < len(row.projected_gradients) else math.nan


def _throughput(run: TrainingRun) -> Chart:
    series = curve("measured", run.rows, lambda row: row.tokens_per_s)
    if run.facts is not None and run.facts.predicted is not None:
        series.append(Series("planned", [], [run.facts.predicted.tokens_per_s], 1, Style.level))
    says = "Tokens without padding, over the wall time of each step." + how_drawn(len(run.rows))
    return LineChart(
        title="Throughput", says=says, x=STEP, y=Axis("tokens/s", from_zero=True), series=tuple(series)
    )  # fmt: skip


def _host_memory(run: TrainingRun) -> Chart:
    series = curve("measured", run.rows, lambda row: row.host_bytes / GIB, smooth=False)
    if run.facts is not None and run.facts.planned:
        series.append(Series("planned peak", [], [planned_bytes(run.facts.planned, "host") / GIB], 1, Style.level))
    says = "Of the whole process, after each step."
    return LineChart(title="Host memory in use", says=says, x=STEP, y=Axis("GiB", from_zero=True), series=tuple(series))


def _norm(norms: Sequence[float]) -> Axis:
    known = [norm for norm in norms if math.isfinite(norm)]
    if known and min(known) > 0 and max(known) > WIDE_RANGE * min(known):
        return Axis("norm", "log", text=short_number)
    return Axis("norm")


# ---- where time and memory went

WAITS = {name: f"waiting for {name if name != 'launch' else 'launches'}"
         for name in ("link", "optimizer", "disk", "data", "launch")}  # fmt: skip


def split_parts(split: StepSplit) -> dict[str, float]:
    """Milliseconds of the six parts of a step."""
    return {"arithmetic": split.arithmetic_ms} | {name: getattr(split, f"{wait}_ms") for wait, name in WAITS.items()}


def split_charts(run: TrainingRun) -> list[Chart]:
    """The recorded steps' parts, beside the planned ones where there was a prediction."""
    split, predicted = run.split, None if run.facts is None else run.facts.predicted
    if split is None:
        return []
    measured, planned = split_parts(split), dict[str, float]()
    if predicted is not None:
        planned = {"arithmetic": predicted.arithmetic_s * 1e3}
        planned |= {name: getattr(predicted, f"{wait}_s", 0.0) * 1e3 for wait, name in WAITS.items()}
    names = ("measured", "planned") if planned else ("measured",)
    values = {part: tuple(row[part] for row in (measured, planned)[: len(names)]) for part in measured}
    says = f"Mean of {split.steps} recorded steps: what the device computed, and what it stood still for."
    if total := sum(planned.values()):
        away = sum(measured.values()) / total - 1
        says += f" A step took {abs(away):.0%} {'more' if away > 0 else 'less'} than planned."
    return [
        BarChart(
            title="A step's time",
            says=says,
            names=names,
            x=Axis("ms"),
            bars=tuple((part, found) for part, found in values.items() if any(found)),
            stacked=True,
        )
    ]


def memory_charts(run: TrainingRun) -> list[Chart]:
    """A chart for each tier that the plan uses: what it is for, and the peak that was measured."""
    if run.facts is None:
        return []
    tiers = dict.fromkeys(line.tier for line in run.facts.planned)
    return [_memory(tier, run.facts.planned, measured_bytes(run, tier)) for tier in tiers]


def measured_bytes(run: TrainingRun, tier: str) -> float | None:
    """The peak of a tier; None where nothing measures it."""
    return run.numbers.get(f"{tier}_bytes")


def planned_bytes(lines: Sequence[Line], tier: str) -> int:
    """What was planned for what `measured_bytes` measures: the host's peak holds all memory of the process."""
    measured_as = {tier} if tier != "host" else {line.tier for line in lines} - {"device", "nvme"}
    return sum(line.num_bytes for line in lines if line.tier in measured_as)


def _memory(tier: str, planned: Sequence[Line], measured: float | None) -> Chart:
    sizes = {line.purpose: line.num_bytes for line in planned if line.tier == tier}
    total = planned_bytes(planned, tier)
    unit, name = (GIB, "GiB") if max(total, measured or 0) >= GIB else (MIB, "MiB")
    order = sorted(sizes, key=lambda purpose: -sizes[purpose])
    shown, others = order[: len(SERIES) - 2], order[len(SERIES) - 2 :]  # a color is left for the rest, one for measured
    parts = {purpose: sizes[purpose] for purpose in shown}
    if elsewhere := total - sum(sizes.values()):
        parts["on cxl"] = elsewhere
    if others:
        parts[f"{len(others)} more"] = sum(sizes[purpose] for purpose in others)
    names, says = ["planned"], "Planned; nothing measures what was used"
    says += " of what stands in for a device." if tier == "device" else "."
    beside: tuple[float, ...] = () if measured is None else (0.0,)
    bars = [(purpose, (size / unit, *beside)) for purpose, size in parts.items()]
    if measured is not None:
        names.append("measured")
        bars.append(("measured peak", (0.0, measured / unit)))
        away = measured / total - 1
        far = f"{abs(away):.1%} {'above' if away > 0 else 'below'} the plan" if abs(away) >= 5e-4 else "as planned"
        says = f"The measured peak is {far}."
    title = TIER_NAMES.get(tier, f"Memory on {tier}")
    return BarChart(title=title, says=says, names=tuple(names), x=Axis(name), bars=tuple(bars), stacked=True)


# ---- several runs

COMPARED: tuple[tuple[str, Axis, Value], ...] = (
    ("Training loss", Axis("loss"), lambda row: row.loss),
    ("Learning rate", RATE, lambda row: row.lr),
    ("Gradient norm", Axis("norm"), lambda row: row.grad_norm),
    ("Throughput", Axis("tokens/s", from_zero=True), lambda row: row.tokens_per_s),
)


def compared_charts(labels: Sequence[str], runs: Sequence[TrainingRun]) -> list[Chart]:
    """Each value of all runs on the same axes; none where no run has steps."""
    charts: list[Chart] = []
    for title, y, value in COMPARED:
        lines = [_overlaid(label, run.rows, value, i)
                 for i, (label, run) in enumerate(zip(labels, runs, strict=True)) if run.rows]  # fmt: skip
        known = [y for line in lines for y in line.y if math.isfinite(y)]
        if not known:
            continue
        over = window(max(len(run.rows) for run in runs))
        says = f"Mean of {over} steps around each." if over > 1 else "Every step."
        if y.label == "norm":
            y = _norm(known)
        charts.append(LineChart(title=title, says=says, x=STEP, y=y, series=tuple(lines)))
    return charts


def _overlaid(label: str, rows: Sequence[StepRow], value: Value, number: int) -> Series:
    """One line a run; those past the page's colors are dashed."""
    line = curve(label, rows, value)[0]
    return Series(label, line.x, line.y, number, Style.dashed if number // len(SERIES) % 2 else Style.line)


def by_setting_chart(key: str, values: Sequence[float], losses: Sequence[float], what: str) -> Chart:
    """The loss that each value of the one setting that differs came to."""
    points, tried = sorted(zip(values, losses, strict=True)), sorted(set(values))
    by_factors = tried[0] > 0 and tried[-1] >= FACTORS * tried[0]
    x = Axis(key, "log" if by_factors else "linear", tried if len(tried) <= MOST_TICKS else None, short_rate)
    return LineChart(
        title=f"{what[0].upper()}{what[1:]} by {key}",
        says="At the end of each run that finished.",
        x=x,
        y=Axis(what),
        series=(Series("", [value for value, _ in points], [loss for _, loss in points]),),
    )
