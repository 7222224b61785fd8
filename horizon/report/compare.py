"""Two measurements of tiers side by side: what both have measured, row by row, and how much better the second is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from horizon.errors import DataError
from horizon.report.measurements import LESS_IS_BETTER, Measurements, Row, short_number
from horizon.report.page import render
from horizon.report.tables import markdown_table
from horizon.report.tiers import headlines

NOTEWORTHY = 0.1  # smaller differences are within what runs differ by
COLUMNS = ("test", "where", "settings", "unit", "A", "B", "B is")


@dataclass(frozen=True, slots=True)
class Pair:
    """The same row of both."""

    a: Row
    b: Row

    @property
    def gain(self) -> float:
        """How many times better B's median is; below 1: worse."""
        ratio = self.b.median / self.a.median if self.a.median else float("nan")
        return 1 / ratio if self.a.unit in LESS_IS_BETTER and ratio else ratio

    @property
    def verdict(self) -> str:
        """better, worse, or as good."""
        if abs(self.gain - 1) < NOTEWORTHY:
            return "as good"
        return "better" if self.gain > 1 else "worse"

    def cells(self) -> list[str]:
        """As text, in the order of `COLUMNS`."""
        said = "as good" if self.verdict == "as good" else f"{self.gain:.2f} x"
        simulated = " (simulated)" if self.a.simulated and "simulated" not in self.a.place else ""
        return [
            self.a.test, self.a.place + simulated, self.a.describe_settings(), self.a.unit,
            short_number(self.a.median), short_number(self.b.median), said,
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two runs have in common, and how many rows only one of them has."""

    a: Measurements
    b: Measurements
    best: tuple[Pair, ...]  # of each tier, whatever the settings
    pairs: tuple[Pair, ...]
    only_a: int
    only_b: int

    def summary(self) -> list[str]:
        """What was compared, a line each."""
        verdicts = [pair.verdict for pair in self.pairs]
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("better", "as good", "worse"))
        lines = [f"{name}: {_source(measured)}" for name, measured in (("A", self.a), ("B", self.b))]
        lines.append(f"{len(self.pairs)} rows in both: B is {counts} (medians; within {NOTEWORTHY:.0%}: as good)")
        lines.append(f"{self.only_a} rows only in A, {self.only_b} only in B")
        if any(pair.a.simulated for pair in self.pairs):
            lines.append("rows marked simulated are of a stand-in in ordinary memory: no measure of real CXL")
        return lines

    def markdown(self) -> str:
        """Summary and table."""
        lines = ["# Tiers compared", "", *(f"- {line}" for line in self.summary()), ""]
        return "\n".join([*lines, *markdown_table(COLUMNS, self.cells())]) + "\n"

    def cells(self) -> list[list[str]]:
        """All pairs as text, the best first."""
        return [pair.cells() for pair in (*self.best, *self.pairs)]

    def html(self) -> str:
        """A page that needs nothing else."""
        return render("compare.html.j2", comparison=self, columns=COLUMNS)


def compare(a: Measurements, b: Measurements) -> Comparison:
    """What both have measured: the best that each tier reached, with whatever settings, then rows in A's order.

    Raises:
        DataError: they have no row in common.
    """
    of_b = {row.key: row for row in b.rows}
    best_of_b = {row.key: row for row in _best(b)}
    best = tuple(Pair(row, best_of_b[row.key]) for row in _best(a) if row.key in best_of_b)
    pairs = tuple(Pair(row, of_b[row.key]) for row in a.rows if row.key in of_b)
    if not pairs:
        raise DataError("the two files have no row in common; measure both with the same --quick")
    return Comparison(a, b, best, pairs, len(a.rows) - len(pairs), len(b.rows) - len(pairs))


def read_both(a: Path, b: Path) -> Comparison:
    """The comparison of two files.

    Raises:
        DataError: one cannot be read, or they have nothing in common.
    """
    return compare(Measurements.read(a), Measurements.read(b))


def _best(measured: Measurements) -> list[Row]:
    return [
        Row.of("best", card.name, {}, card.unit, [card.median], simulated=card.simulated)
        for card in headlines(measured)
    ]


def _source(measured: Measurements) -> str:
    run = measured.run
    return f"{run.machine}; commit {run.commit}, {run.date}, `{run.command}`"
