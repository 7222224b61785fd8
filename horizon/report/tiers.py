"""The report of `horizon bench tiers`: one HTML page that needs nothing else, and the same in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from horizon.report.measurements import LESS_IS_BETTER, Measurements, Row, short_bytes, short_number
from horizon.report.page import render, require_report_extra
from horizon.report.tables import markdown_table
from horizon.report.tier_charts import charts_of, largest

TESTS = {
    "latency": "Idle latency",
    "loaded latency": "Latency under load",
    "bandwidth": "Bandwidth",
    "link": "Link to the GPU",
    "disk": "Disk",
    "adamw": "AdamW",
    "step": "Steps by policy",
}
COLUMNS = ("where", "settings", "unit", "n", "best", "median", "also")


@dataclass(frozen=True, slots=True)
class Headline:
    """A number that says most about a tier."""

    name: str
    median: float
    unit: str
    note: str
    simulated: bool = False

    @property
    def value(self) -> str:
        """The median as text."""
        return short_number(self.median)


def write_html(measured: Measurements, path: Path) -> None:
    """The page.

    Raises:
        ConfigError: matplotlib or jinja2 is not installed.
    """
    require_report_extra()
    run = measured.run
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    page = render(
        "tiers.html.j2", measured=measured, charts=charts_of(measured), headlines=headlines(measured),
        findings=findings(measured), columns=COLUMNS, machine=[*run.facts.items(), ("versions", versions)],
        tables=[(title, [cells(row) for row in measured.of(t)]) for t, title in TESTS.items() if measured.of(t)],
    )  # fmt: skip
    path.write_text(page, encoding="utf-8")


def write_markdown(measured: Measurements, path: Path) -> None:
    """Headlines and all rows as tables."""
    run = measured.run
    lines = [f"# Tiers of {run.machine}", "", f"`{run.command}`, commit {run.commit}, {run.date}", ""]
    if measured.simulated:
        lines += [
            "Rows marked **simulated** are of a stand-in in ordinary memory, slowed down; no measure of real CXL.",
            "",
        ]
    lines += [f"- {h.name}: {h.value} {h.unit} ({h.note})" for h in headlines(measured)]
    lines += [f"- {finding}" for finding in findings(measured)]
    for test, title in TESTS.items():
        if rows := measured.of(test):
            lines += ["", f"## {title}", "", *markdown_table(COLUMNS, [cells(row) for row in rows])]
    if measured.skipped:
        skipped = [(one.test, one.place, one.reason) for one in measured.skipped]
        lines += ["", "## Not measured", "", *markdown_table(("test", "where", "why"), skipped)]
    lines += [
        "",
        "## Machine",
        "",
        *(f"- {name}: {value}" for name, value in (*run.facts.items(), *run.versions.items())),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def cells(row: Row) -> list[str]:
    """A row as text, in the order of `COLUMNS`."""
    place = row.place if not row.simulated or "simulated" in row.place else f"{row.place} (simulated)"
    return [
        place, row.describe_settings(), row.unit, str(row.n), short_number(row.best), short_number(row.median),
        ", ".join(_also(name, value) for name, value in row.also.items()),
    ]  # fmt: skip


def _also(name: str, value: float) -> str:
    """A number with the unit that its name ends in: `load_gb_per_s` is `load 3.2 GB/s`."""
    for end, unit in (("gb_per_s", "GB/s"), ("s", "s")):
        if name == end or name.endswith(f"_{end}"):
            return f"{name.removesuffix(end).replace('_', ' ')}{short_number(value)} {unit}"
    return f"{name.removesuffix('bytes').replace('_', ' ')}{short_bytes(value)}"


def headlines(measured: Measurements) -> list[Headline]:
    """The best that each tier reached."""
    found = []
    for place in dict.fromkeys(row.place for row in measured.of("latency")):
        rows = largest([row for row in measured.of("latency") if row.place == place], "size")
        row = min(rows, key=lambda one: one.median)
        size = short_bytes(float(row.settings["size"]))
        found.append(Headline(f"{place}, idle latency", row.median, "ns", f"median, over {size}"))
        rows = [row for row in measured.of("bandwidth") if row.place == place and row.settings["access"] == "read"]
        found += _best(f"{place}, read", rows)
    found += _best("link, H2D", [row for row in measured.of("link") if row.settings["direction"] == "H2D"])
    found += _best("disk, read", [row for row in measured.of("disk") if row.settings["access"] == "read"])
    for place in dict.fromkeys(row.place for row in measured.of("adamw")):
        rows = [row for row in measured.of("adamw") if row.place == place and row.settings["states"] == "all"]
        found += _best(f"AdamW, states on {place}", largest(rows, "parameters"))
    return found


def _best(name: str, rows: Sequence[Row]) -> list[Headline]:
    """The row with the best median, if there is any."""
    if not rows:
        return []
    row = (min if rows[0].unit in LESS_IS_BETTER else max)(rows, key=lambda one: one.median)
    return [Headline(name, row.median, row.unit, row.describe_settings(), row.simulated)]


def findings(measured: Measurements) -> list[str]:
    """What follows from the rows, in words."""
    said = []
    updates = largest(measured.of("adamw"), "parameters")
    best: dict[tuple[str, str], Row] = {}
    for row in updates:
        key = row.place, str(row.settings["states"])
        best[key] = max(best.get(key, row), row, key=lambda one: one.median)
    dram = next((row for (place, states), row in best.items() if place.startswith("dram") and states == "all"), None)
    for (place, states), row in best.items():
        if dram is not None and not place.startswith("dram"):
            what = "all states" if states == "all" else "only the gradients"
            said.append(
                f"AdamW with {what} on {place} runs at {row.median / dram.median:.0%} of its pace in {dram.place}."
            )
    steps = {row.place: row for row in measured.of("step")}
    for name, row in steps.items():
        if "planned_s" in row.also:
            off = row.also["planned_s"] / row.median - 1
            said.append(
                f"Policy {name}: planned {_seconds(row.also['planned_s'])}, median {_seconds(row.median)} ({off:+.0%})."
            )
    return said


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.0f} ms"
