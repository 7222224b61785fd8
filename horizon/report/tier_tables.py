"""The tables of a report on tiers: a row for what was measured, and its largest setting across."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from horizon.report.measurements import (
    Measurements,
    Row,
    Setting,
    describe,
    show_setting,
    three_digits,
)
from horizon.units import format_bytes

ACROSS = {
    "latency": "size", "loaded latency": "pause", "bandwidth": "threads", "link": "size", "hbm": "size",
    "disk": "depth", "nvme": "access", "adamw": "parameters",
}  # fmt: skip
NAMES = {  # of a column
    "cpus": "from", "pause": "pause between blocks", "io": "I/O", "tier_gb_per_s": "tier's GB/s",
    "depth": "requests under way",
}  # fmt: skip
LOAD = "load_gb_per_s"
OF_RAW = "of_raw"
BESIDE = {  # what else a cell says
    "loaded latency": "; at: the GB/s that the others read meanwhile",
    "nvme": ", and that as a part of raw access",
}
WORTH_TELLING = 0.1  # by which the best is better than the median


@dataclass(frozen=True, slots=True)
class Table:
    """Text in columns.

    Attributes:
        says: what the numbers are.
        numeric: columns of numbers.
    """

    title: str
    says: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[str, ...]


def table_of(measured: Measurements, test: str, title: str) -> Table:
    """All rows of a test that has some."""
    rows = measured.of(test)
    if test == "step":
        return _steps(title, rows)
    return crossed(title, rows, _number, f"{_count(rows)}{BESIDE.get(test, '')}.")


def crossed(title: str, rows: Sequence[Row], text: Callable[[Row], str], says: str) -> Table:
    """Rows of one test, one of their settings across and the others down; `says`: what `text` makes of a row."""
    across = ACROSS[rows[0].test]
    down, same = _settings(rows, across)
    values = sorted({row.settings[across] for row in rows}, key=lambda value: (str(type(value)), value))
    found: dict[tuple[str, ...], dict[Setting, str]] = {}
    for row in rows:
        key = _place(row), *(_shown(row, name) for name in down)
        found.setdefault(key, {})[row.settings[across]] = text(row)
    heads = tuple(show_setting(across, value) for value in values)
    return Table(
        title,
        f"{rows[0].unit} by {NAMES.get(across, across)}{same}: {says}",
        ("where", *(NAMES.get(name, name) for name in down), *heads),
        tuple((*key, *(line.get(value, "") for value in values)) for key, line in found.items()),
        heads,
    )


def _steps(title: str, rows: Sequence[Row]) -> Table:
    """What was planned, what it took, and how far that is."""
    _, same = _settings(rows, "tier_gb_per_s")
    heads = "planned", "median", "best", "off by", "on cxl"
    return Table(
        title,
        f"A step{same}: {_count(rows)}; by how much the plan is off it.",
        ("policy", *heads),
        tuple(
            (
                row.place, _seconds(row.also.get("planned_s")), _seconds(row.median), _seconds(row.best),
                f"{off(row):+.0%}" if "planned_s" in row.also else "",
                format_bytes(row.also["on_cxl_bytes"]) if "on_cxl_bytes" in row.also else "",
            )
            for row in rows
        ),
        heads,
    )  # fmt: skip


def off(row: Row) -> float:
    """How far a step's plan is from its median, as a part of the median."""
    return row.also["planned_s"] / row.median - 1


def seconds(value: float) -> str:
    """`4.32 s`, `606 ms`."""
    return f"{three_digits(value)} s" if value >= 1 else f"{three_digits(value * 1e3)} ms"


def _seconds(value: float | None) -> str:
    return "" if value is None else seconds(value)


def _settings(rows: Sequence[Row], *others: str) -> tuple[list[str], str]:
    """The settings that differ, and in words those that all rows share; without some."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row.settings) if name not in others]
    differing = [name for name in names if len({row.settings.get(name) for row in rows}) > 1]
    same = [describe(name, rows[0].settings[name]) for name in names if name not in differing]
    return differing, "".join(f", {said}" for said in same)


def _place(row: Row) -> str:
    return row.place if not row.simulated or "simulated" in row.place else f"{row.place} (simulated)"


def _shown(row: Row, name: str) -> str:
    return show_setting(name, row.settings[name]) if name in row.settings else ""


def _number(row: Row) -> str:
    """The median, the best where that is much better, and the load under which it was or its part of raw access."""
    noisy = abs(row.best / row.median - 1) > WORTH_TELLING if row.median else False
    said = f"{three_digits(row.median)} ({three_digits(row.best)})" if noisy else three_digits(row.median)
    if OF_RAW in row.also:
        return f"{said}, {row.also[OF_RAW]:.0%}"
    return f"{said} at {three_digits(row.also[LOAD])}" if LOAD in row.also else said


def _count(rows: Sequence[Row]) -> str:
    numbers = sorted({row.n for row in rows})
    of = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    return f"median of {of}"
