"""Two measurements of tiers side by side: what both have measured, row by row, and how much better the second is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from horizon.errors import DataError
from horizon.report.charts import Chart
from horizon.report.measurements import LESS_IS_BETTER, Measurements, Row, three_digits
from horizon.report.page import render
from horizon.report.tables import markdown_table
from horizon.report.tier_charts import SOURCES, charts_of
from horizon.report.tier_tables import ACROSS, Table, crossed
from horizon.report.tiers import TESTS, Headline, headlines

NOTEWORTHY = 0.1  # smaller differences are within what runs differ by
NO_BREAK = "\N{NO-BREAK SPACE}"
COLUMNS = ("test", "where", "settings", "unit", "A", "B", "B is")
ONE_TEST = COLUMNS[1:]  # of a table that is of one test


@dataclass(frozen=True, slots=True)
class Pair:
    """The same row of both, or of each the best in some respect."""

    a: Row
    b: Row
    settings: str  # in words

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
            self.a.test, self.a.place + simulated, self.settings, self.a.unit,
            three_digits(self.a.median), three_digits(self.b.median), said,
        ]  # fmt: skip

    def short(self) -> str:
        """In a cell of a table: both, and if it is worth telling how much better B is."""
        both = f"{three_digits(self.a.median)} | {three_digits(self.b.median)}".replace(" ", NO_BREAK)
        return both if self.verdict == "as good" else f"{both}: {self.gain:.2f}{NO_BREAK}x"


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
        return [f"A: {_source(self.a)}", f"B: {_source(self.b)}", *self.notes()]

    def notes(self) -> list[str]:
        """How many rows are compared, and what to mind."""
        verdicts = [pair.verdict for pair in self.pairs]
        counts = ", ".join(f"{verdicts.count(v):,} {v}" for v in ("better", "as good", "worse"))
        lines = [
            f"{len(self.pairs):,} rows in both: B is {counts} (medians; within {NOTEWORTHY:.0%}: as good)",
            f"{self.only_a:,} rows only in A, {self.only_b:,} only in B",
        ]
        if any(pair.a.simulated for pair in self.pairs):
            lines.append("rows marked simulated are of a stand-in in ordinary memory: no measure of real CXL")
        return lines

    def sources(self) -> list[tuple[str, str, str]]:
        """What the two are, and what differs between their machines, line by line: (name, A, B)."""
        a, b = (
            {"machine": run.machine, "commit": run.commit, "date": run.date, "command": run.command}
            for run in (self.a.run, self.b.run)
        )
        of_a, of_b = ({**run.facts, **run.versions} for run in (self.a.run, self.b.run))
        differing = [name for name in {**of_a, **of_b} if of_a.get(name) != of_b.get(name)]
        return [
            *((name, a[name], b[name]) for name in a),
            *((name, of_a.get(name, "-"), of_b.get(name, "-")) for name in differing),
        ]

    def markdown(self) -> str:
        """Summary and table."""
        lines = ["# Tiers compared", "", *(f"- {line}" for line in self.summary()), ""]
        return "\n".join([*lines, *markdown_table(COLUMNS, self.cells())]) + "\n"

    def cells(self) -> list[list[str]]:
        """All pairs as text, the best first."""
        return [pair.cells() for pair in (*self.best, *self.pairs)]

    def lists(self) -> list[tuple[str, list[Pair]]]:
        """Title and pairs of what is listed line by line: the best of each tier, and steps."""
        steps = [pair for pair in self.pairs if pair.a.test == "step"]
        return [(title, pairs) for title, pairs in (("Best of each tier", list(self.best)), ("Steps", steps)) if pairs]

    def tables(self) -> list[Table]:
        """All other pairs, a table for each test."""
        pairs = {pair.a.key: pair for pair in self.pairs}
        rows = {test: [pair.a for pair in self.pairs if pair.a.test == test] for test in ACROSS}
        says = "A and B, and where they differ by more than a tenth, how many times better B is."
        return [
            crossed(TESTS[test], rows[test], lambda row: pairs[row.key].short(), says) for test in rows if rows[test]
        ]

    def charts(self) -> list[Chart]:
        """Those of what both measured, with both in each."""
        rows = [replace(row, place=source + row.place)
                for pair in self.pairs for source, row in zip(SOURCES, (pair.a, pair.b), strict=True)]  # fmt: skip
        return charts_of(Measurements(self.a.run, tuple(rows)))

    def html(self) -> str:
        """A page that needs nothing else."""
        return render("compare.html.j2", comparison=self, columns=ONE_TEST)


def compare(a: Measurements, b: Measurements) -> Comparison:
    """What both have measured: the best that each tier reached, with whatever settings, then rows in A's order.

    Raises:
        DataError: they have no row in common.
    """
    of_b, best_of_b = {row.key: row for row in b.rows}, {one.name: one for one in _best(b)}
    best = tuple(_best_pair(one, best_of_b[one.name]) for one in _best(a) if one.name in best_of_b)
    pairs = tuple(Pair(row, of_b[row.key], row.describe_settings()) for row in a.rows if row.key in of_b)
    if not pairs:
        raise DataError("the two files have no row in common; measure both with the same --quick")
    return Comparison(a, b, best, pairs, len(a.rows) - len(pairs), len(b.rows) - len(pairs))


def read_both(a: Path, b: Path) -> Comparison:
    """The comparison of two files.

    Raises:
        DataError: one cannot be read, or they have nothing in common.
    """
    return compare(Measurements.read(a), Measurements.read(b))


def _best(measured: Measurements) -> list[Headline]:
    """Without those of stand-ins, which say nothing of a machine."""
    return [one for one in headlines(measured) if not one.simulated]


def _best_pair(a: Headline, b: Headline) -> Pair:
    of_a, of_b = (Row.of("best", one.name, {}, one.unit, [one.median]) for one in (a, b))
    return Pair(of_a, of_b, a.note if a.note == b.note else f"A: {a.note}; B: {b.note}")


def _source(measured: Measurements) -> str:
    run = measured.run
    return f"{run.machine}; commit {run.commit}, {run.date}, `{run.command}`"
