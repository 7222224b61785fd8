"""The report of `horizon bench tiers`: one HTML page that needs nothing else, and the same in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from horizon.report.charts import Chart
from horizon.report.measurements import LESS_IS_BETTER, RAW, Measurements, Row, three_digits
from horizon.report.page import render, require_report_extra
from horizon.report.tables import markdown_table
from horizon.report.tier_charts import charts_of, largest
from horizon.report.tier_tables import Table, off, seconds, table_of

TESTS = {
    "latency": "Idle latency",
    "loaded latency": "Latency under load",
    "bandwidth": "Bandwidth",
    "link": "Link to the GPU",
    "hbm": "Within device memory",
    "disk": "Disk",
    "nvme": "Engines of the nvme tier",
    "adamw": "AdamW",
    "step": "Steps by policy",
}
NEAR = 0.2  # of the median step: a plan that is no further off is a good one
DISTURBED = 0.2  # by which a median is worse than its best


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the page: what is measured, and how to judge it."""

    title: str
    tests: tuple[str, ...]
    says: str


PARTS = (
    Part(
        "Host memory", ("cxl", "latency", "loaded latency", "bandwidth"),
        "How long a load waits, and what threads read and write in a second. Usual are 80 to 130 ns next to the "
        "processor, twice that from another socket or an expander, and more inside a virtual machine. One core moves "
        "10 to 30 GB/s; a channel of DDR5-4800 carries 38 GB/s, and all channels of a socket together are its limit.",
    ),
    Part(
        "Link to the GPU", ("link", "hbm"),
        "Weights cross it to the device (H2D) and gradients come back (D2H), in every step. 16 lanes of PCIe 4 carry "
        "31.5 GB/s each way and of PCIe 5 63; large copies from pinned memory should reach four fifths of that. "
        "Pageable memory is copied twice and reaches a part of it. Copies within device memory (hbm) count what is "
        "read and what is written.",
    ),
    Part(
        "Disk", ("disk", "nvme"),
        "What states on nvme wait for; they move in large requests. An NVMe disk on PCIe 4 reads 5 to 7 GB/s and one "
        "on PCIe 5 10 to 14; disks over a network less. Small requests need many under way. The tier's direct engine "
        "should reach nine tenths of raw access; tensorstore is for file systems that refuse direct I/O, and slower.",
    ),
    Part(
        "AdamW", ("adamw",),
        "Parameters that the host's update renews in a second, in thousand millions (Gparam/s), with its states on "
        "each tier. It reads or writes 26 bytes for each, so memory of 100 GB/s allows 3.8 Gparam/s; caches hold the "
        "states of some millions, and models have more.",
    ),
    Part(
        "Steps under each policy", ("step",),
        "A small model trained for some steps: what the plan had said of one, and what it took. A plan within a fifth "
        "of the median is good. Where best and median are far apart, other work disturbed the steps, or the "
        "measurements that the plan was made from.",
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Section:
    """A part with what was found."""

    part: Part
    charts: list[Chart]
    tables: list[Table]  # of steps; those of other tests stand at the end
    missing: list[str]  # what was not measured, and why


@dataclass(frozen=True, slots=True)
class Headline:
    """The best that a tier reached in one respect."""

    place: str
    what: str
    median: float
    unit: str
    note: str
    simulated: bool = False

    @property
    def name(self) -> str:
        """The tier, and in which respect."""
        return f"{self.place}, {self.what}"

    @property
    def value(self) -> str:
        """The median as text."""
        return three_digits(self.median)


def write_html(measured: Measurements, path: Path) -> None:
    """The page.

    Raises:
        ConfigError: matplotlib or jinja2 is not installed.
    """
    require_report_extra()
    page = render(
        "tiers.html.j2", measured=measured, sections=sections(measured), glance=glance(measured),
        findings=findings(measured), machine=machine(measured), tables=tables(measured, but=("step",)),
        took=_duration(measured.run.seconds),
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
    for found in tables(measured):
        lines += ["", f"## {found.title}", "", found.says, "", *markdown_table(found.columns, found.rows)]
    if measured.skipped:
        skipped = [(one.test, one.place, one.reason) for one in measured.skipped]
        lines += ["", "## Not measured", "", *markdown_table(("test", "where", "why"), skipped)]
    lines += ["", "## Machine", "", *(f"- {name}: {value}" for name, value in machine(measured))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def sections(measured: Measurements) -> list[Section]:
    """The page's parts; one of hardware that is not there says so."""
    return [
        Section(
            part,
            charts_of(measured, part.tests),
            [table_of(measured, "step", "")] if "step" in part.tests and measured.of("step") else [],
            [f"{one.place}: {one.reason}" for one in measured.skipped if one.test in part.tests],
        )
        for part in PARTS
    ]


def tables(measured: Measurements, but: Sequence[str] = ()) -> list[Table]:
    """All rows, a table for each test; without some tests."""
    return [table_of(measured, test, title) for test, title in TESTS.items() if measured.of(test) and test not in but]


def machine(measured: Measurements) -> list[tuple[str, str]]:
    """What bears on the numbers, by name."""
    versions = ", ".join(f"{name} {version}" for name, version in measured.run.versions.items())
    return [*measured.run.facts.items(), ("versions", versions)]


def headlines(measured: Measurements) -> list[Headline]:
    """The best that each tier reached."""
    found = []
    for place in dict.fromkeys(row.place for row in measured.rows if row.test not in ("step", "loaded latency")):
        rows = [row for row in measured.rows if row.place == place]
        found += _best("idle latency", largest(_having(rows, test="latency"), "size"))
        for access in ("read", "write"):
            found += _best(access, _having(rows, test="bandwidth", access=access), "access")
            found += _best(access, _having(rows, test="disk", access=access), "access")
        for direction in ("H2D", "D2H"):
            found += _best(direction, _having(rows, test="link", direction=direction), "direction")
        found += _best("copies within", _having(rows, test="hbm"))
        found += _best("AdamW", largest(_having(rows, test="adamw", states="all"), "parameters"), "states")
    return found


def glance(measured: Measurements) -> Table:
    """The headlines, a line for each tier."""
    found = headlines(measured)
    units = {headline.what: headline.unit for headline in found}
    values = {(headline.place, headline.what): headline.value for headline in found}
    heads = tuple(f"{what}, {unit}" for what, unit in units.items())
    return Table(
        "At a glance",
        "The best median of each tier, from whatever processors and with whatever settings it took.",
        ("tier", *heads),
        tuple(
            (place, *(values.get((place, what), "") for what in units))
            for place in dict.fromkeys(headline.place for headline in found)
        ),
        heads,
    )


def _having(rows: Sequence[Row], test: str, **settings: str) -> list[Row]:
    return [row for row in rows if row.test == test and all(row.settings[k] == v for k, v in settings.items())]


def _best(what: str, rows: Sequence[Row], *told: str) -> list[Headline]:
    """The row with the best median, if there is any; `told`: the setting that `what` tells."""
    if not rows:
        return []
    row = (min if rows[0].unit in LESS_IS_BETTER else max)(rows, key=lambda one: one.median)
    return [Headline(row.place, what, row.median, row.unit, row.describe_settings(*told), row.simulated)]


def findings(measured: Measurements) -> list[str]:
    """What follows from the rows, in words."""
    return [*_engines(measured), *_updates(measured), *_plans(measured), *_disturbed(measured)]


def _engines(measured: Measurements) -> list[str]:
    shares: dict[str, list[str]] = {}
    for row in measured.of("nvme"):
        if row.settings["engine"] != RAW:
            text = f"{row.also['of_raw']:.0%} ({row.settings['access']})"
            shares.setdefault(str(row.settings["engine"]), []).append(text)
    return [f"The {name} engine of the nvme tier reaches {', '.join(of)} of raw access." for name, of in shares.items()]


def _updates(measured: Measurements) -> list[str]:
    paces: dict[str, dict[str, float]] = {}  # by place and states
    for row in largest(measured.of("adamw"), "parameters"):
        found, states = paces.setdefault(row.place, {}), str(row.settings["states"])
        found[states] = max(found.get(states, 0.0), row.median)
    dram = next((place for place in paces if place.startswith("dram")), None)
    if dram is None:
        return []
    full = paces[dram]["all"]
    return [
        f"AdamW with all states on {place} runs at {found['all'] / full:.0%} of its pace in {dram}, "
        f"with only the gradients there at {found['gradients'] / full:.0%}."
        for place, found in paces.items()
        if {"all", "gradients"} <= found.keys()
    ]


def _plans(measured: Measurements) -> list[str]:
    planned = [row for row in measured.of("step") if "planned_s" in row.also]
    if not planned:
        return []
    near, far = sum(abs(off(row)) <= NEAR for row in planned), max(planned, key=lambda row: abs(off(row)))
    return [
        f"{near} of {len(planned)} policies took what was planned, within {NEAR:.0%}; furthest off is {far.place}: "
        f"planned {seconds(far.also['planned_s'])}, took {seconds(far.median)}."
    ]


def _disturbed(measured: Measurements) -> list[str]:
    many = sum(abs(row.median / row.best - 1) > DISTURBED for row in measured.rows if row.best)
    if not many:
        return []
    return [
        f"{many:,} of {len(measured.rows):,} medians are more than {DISTURBED:.0%} worse than their best: something "
        "else used this machine, or what it runs on."
    ]


def _duration(value: float) -> str:
    return f"took {value:.0f} s" if value < 100 else f"took {value / 60:.0f} min"
