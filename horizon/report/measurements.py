"""What a benchmark of tiers measured: rows that say what, where, how and on which machine, and the file they are in.

The file is JSON: `format`, `run` (machine, commit, versions, command), `rows`, and `skipped` (what this machine could
not do, and why). Every row repeats what makes it comparable, so that one that is cut out still says where it is from.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from horizon.errors import DataError

FORMAT = 1
LESS_IS_BETTER = ("ns", "s")
RAW = "raw"  # among the engines of the nvme tier: calls to the system with nothing around them
REPEATED = ("machine", "commit", "versions", "command")  # of the run, in every row

Setting = str | int | float
PHRASES = {  # of a setting, as a part of a sentence
    "cpus": "from {}", "threads": "{} threads", "block": "blocks of {}", "depth": "{} requests",
    "loaders": "{} loaders", "pause": "pauses of {}", "parameters": "{} parameters", "tokens": "{} tokens",
    "io": "{} I/O", "tier_gb_per_s": "a tier of {} GB/s",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Where rows come from."""

    machine: str
    commit: str
    versions: dict[str, str]
    command: str
    date: str
    seconds: float  # that all of it took
    facts: dict[str, str]  # of the machine, for reading


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One thing that was measured several times."""

    test: str  # latency, bandwidth, loaded latency, link, hbm, disk, nvme, adamw, step
    place: str  # the tier, or for a step the policy
    settings: Mapping[str, Setting]
    unit: str  # ns, s, GB/s (1e9 bytes), Gparam/s
    n: int
    best: float
    median: float
    also: Mapping[str, float] = field(default_factory=dict)  # other numbers of the same measurement
    simulated: bool = False  # the tier is a stand-in

    @classmethod
    def of(
        cls, test: str, place: str, settings: Mapping[str, Setting], unit: str, values: Sequence[float], **more: Any
    ) -> Row:
        """The row of repeated measurements."""
        best = min(values) if unit in LESS_IS_BETTER else max(values)
        return cls(
            test=test, place=place, settings=dict(settings), unit=unit, n=len(values), best=best,
            median=statistics.median(values), **more,
        )  # fmt: skip

    @property
    def key(self) -> tuple[str, str, tuple[tuple[str, Setting], ...]]:
        """What two machines have in common where they measured the same."""
        return self.test, self.place, tuple(sorted(self.settings.items()))

    def describe_settings(self, *without: str) -> str:
        """The settings in a line, sizes with units."""
        return ", ".join(describe(name, value) for name, value in self.settings.items() if name not in without)


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """What was not measured."""

    test: str
    place: str
    reason: str


@dataclass(frozen=True, slots=True)
class Measurements:
    """All of one run."""

    run: Run
    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...] = ()

    def of(self, test: str) -> list[Row]:
        """Rows of one kind."""
        return [row for row in self.rows if row.test == test]

    @property
    def simulated(self) -> bool:
        """Some row is of a stand-in."""
        return any(row.simulated for row in self.rows)

    def write(self, path: Path) -> None:
        """As JSON."""
        run = dataclasses.asdict(self.run)
        repeated = {key: run[key] for key in REPEATED}
        content = {
            "format": FORMAT,
            "run": run,
            "rows": [{**dataclasses.asdict(row), **repeated} for row in self.rows],
            "skipped": [dataclasses.asdict(skipped) for skipped in self.skipped],
        }
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Measurements:
        """What `write` wrote.

        Raises:
            DataError: there is no such file, or it is something else.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise DataError(f"{path} has format {content['format']}, this version of horizon reads {FORMAT}")
            rows = tuple(Row(**{k: v for k, v in row.items() if k not in REPEATED}) for row in content["rows"])
            skipped = tuple(Skipped(**one) for one in content["skipped"])
            return cls(Run(**content["run"]), rows, skipped)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is not a file that `horizon bench tiers` writes ({error!r})") from error


def by_setting(rows: Sequence[Row], name: str) -> Iterator[tuple[Setting, list[Row]]]:
    """Rows with equal values of one setting, in the order of these values."""
    values = sorted(
        {row.settings[name] for row in rows if name in row.settings}, key=lambda value: (str(type(value)), value)
    )
    for value in values:
        yield value, [row for row in rows if row.settings.get(name) == value]


def short_bytes(num_bytes: float) -> str:
    """A size that is a power of two, or near one, for axes and tables: `64 KiB`."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.4g} {unit}"
    return f"{num_bytes:.0f} B"


def short_number(value: float) -> str:
    """Up to three significant digits, without exponents where they are not needed: for ticks of an axis."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def three_digits(value: float) -> str:
    """Three significant digits, zeros among them, so that columns of a table look alike: `2.10`, `15.0`, `1,240`."""
    rounded = float(f"{value:.3g}")
    if not 1e-3 <= abs(rounded) < 1e6:
        return f"{value:.3g}"
    decimals = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{decimals}f}"


def describe(name: str, value: Setting) -> str:
    """A setting as a part of a sentence: `2 threads`, `blocks of 1 MiB`, `all states`."""
    if name == "states":
        return "all states" if value == "all" else f"only {value}"
    said = PHRASES.get(name, "{}").format(show_setting(name, value))
    return said.removesuffix("s") if value == 1 else said


def show_setting(name: str, value: Setting) -> str:
    """A setting's value with its unit, for a column that has its name."""
    if isinstance(value, str):
        return value
    if name in ("block", "size"):
        return short_bytes(value)
    return f"{value / 1e6:.4g} M" if name == "parameters" else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
