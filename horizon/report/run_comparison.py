"""Several runs side by side: the settings that differ, the numbers that they came to, and their curves."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from horizon.report.charts import Chart
from horizon.report.facts import Status
from horizon.report.metrics import finite
from horizon.report.page import render, require_report_extra
from horizon.report.run_charts import by_setting_chart, compared_charts
from horizon.report.runs import NUMBERS, TrainingRun, write_number
from horizon.report.settings import UNSET, differing, show
from horizon.report.tables import table

FORMAT = 1
COMPARISON = "comparison.html"
LABELLED_BY = 2  # differing settings, at most, that name a run in a legend; more would be a sentence
PRINTED = "validation_loss_after", "recent_loss", "steps", "tokens_per_s"  # on a terminal, where there is less room
LOSSES = "validation_loss_after", "recent_loss"  # what says how good a run is, the first that runs have


@dataclass(frozen=True)
class RunComparison:
    """At least one run, in the order in which they are shown."""

    runs: tuple[TrainingRun, ...]

    @cached_property
    def names(self) -> list[str]:
        """Each run's folder, without what all have in common."""
        folders = [run.folder.resolve() for run in self.runs]
        above = Path(os.path.commonpath([folder.parent for folder in folders]))
        return [str(folder.relative_to(above)) for folder in folders]

    @cached_property
    def differing(self) -> list[str]:
        """Keys of the settings that are not the same in all."""
        return differing([run.settings for run in self.runs])

    @cached_property
    def labels(self) -> list[str]:
        """What tells the runs apart in a legend: the settings if they are few and do, else the names."""
        keys = self.differing
        labels = [", ".join(f"{key}={self._value(run, key)}" for key in keys) for run in self.runs]
        tells_apart = 0 < len(keys) <= LABELLED_BY and len(set(labels)) == len(labels)
        return labels if tells_apart else self.names

    @cached_property
    def judged_by(self) -> str:
        """The number that says how good a run is."""
        return next((key for key in LOSSES if any(run.numbers[key] is not None for run in self.runs)), LOSSES[-1])

    @property
    def best(self) -> int | None:
        """Which run has the lowest loss; None if none has any."""
        found = [(loss, i) for i, run in enumerate(self.runs) if (loss := run.numbers[self.judged_by]) is not None]
        return min(found)[1] if found else None

    def columns(self, keys: Sequence[str]) -> list[str]:
        """Of the table, with these of `NUMBERS`."""
        return ["run", *self.differing, "ended", *(NUMBERS[key][0] for key in keys)]

    def rows(self, keys: Sequence[str]) -> list[list[str]]:
        """A row a run, in the order of `columns`; the best one's number is marked."""
        return [
            [
                name, *(self._value(run, key) for key in self.differing), run.status,
                *(write_number(key, run.numbers[key]) + (" *" if i == self.best and key == self.judged_by else "")
                  for key in keys),
            ]
            for i, (name, run) in enumerate(zip(self.names, self.runs, strict=True))
        ]  # fmt: skip

    def text(self) -> str:
        """The table for a terminal, and what failed."""
        keys = self._present(PRINTED)
        lines = [table(self.columns(keys), self.rows(keys))]
        if self.best is not None and len(self.runs) > 1:
            lines.append(f"* lowest {NUMBERS[self.judged_by][0]}")
        return "\n".join([*lines, *(f"{name} {status}: {error}" for name, status, error in self.failures())])

    def failures(self) -> list[tuple[str, str, str]]:
        """(name, status, what is known of the cause) of runs that did not finish."""
        return [
            (name, run.status, " ".join((run.facts.error if run.facts is not None and run.facts.error else
                                         f"stopped at step {run.numbers['steps']:.0f}").split()))
            for name, run in zip(self.names, self.runs, strict=True)
            if run.status is not Status.finished
        ]  # fmt: skip

    def charts(self) -> list[Chart]:
        """The loss by the setting that differs, if it is one and a number; then all runs' curves."""
        charts: list[Chart] = []
        ended = [run for run in self.runs if run.status is Status.finished and run.numbers[self.judged_by] is not None]
        values = [run.settings.get(self.differing[0]) for run in ended] if len(self.differing) == 1 else []
        numbers = [float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        if len(numbers) == len(values) > 1:
            losses = [run.numbers[self.judged_by] or 0.0 for run in ended]
            charts.append(by_setting_chart(self.differing[0], numbers, losses, NUMBERS[self.judged_by][0]))
        return charts + compared_charts(self.labels, self.runs)

    def as_json(self, charts: Sequence[Chart]) -> dict[str, Any]:
        """What the page shows, as numbers."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "differing": self.differing,
            "judged_by": self.judged_by,
            "best": None if self.best is None else self.names[self.best],
            "runs": [
                {
                    "name": name, "folder": str(run.folder.resolve()), "status": run.status,
                    "error": None if run.facts is None else run.facts.error,
                    "settings": {key: run.settings.get(key) for key in self.differing}, "numbers": run.numbers,
                }
                for name, run in zip(self.names, self.runs, strict=True)
            ],
            "charts": [chart.as_json() for chart in charts],
        }  # fmt: skip
        cleaned: dict[str, Any] = finite(content)
        return cleaned

    def write(self, path: Path) -> None:
        """The page, and its numbers beside it in a file that ends in .json.

        Raises:
            ConfigError: matplotlib or jinja2 is not installed.
        """
        require_report_extra()
        charts, keys = self.charts(), self._present(list(NUMBERS))
        columns, rows = self.columns(keys), self.rows(keys)
        numeric = columns[2 + len(self.differing) :]
        page = render("runs.html.j2", charts=charts, columns=columns, rows=rows, numeric=numeric, comparison=self,
                      what=NUMBERS[self.judged_by][0])  # fmt: skip
        path.write_text(page, encoding="utf-8", errors="replace")  # paths may hold any bytes
        path.with_suffix(".json").write_text(json.dumps(self.as_json(charts), indent=1) + "\n", encoding="utf-8")

    def _present(self, keys: Sequence[str]) -> list[str]:
        """Those of the numbers that some run has."""
        return [key for key in keys if any(run.numbers[key] is not None for run in self.runs)]

    @staticmethod
    def _value(run: TrainingRun, key: str) -> str:
        return show(run.settings[key]) if key in run.settings else UNSET
