"""What keeps `run.json` while a run goes on, and writes its report when it ends, whatever ends it."""

from __future__ import annotations

import functools
import logging
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TypeVar

import torch

from horizon.errors import ConfigError, HorizonError
from horizon.plan.memory import MemoryPlan
from horizon.plan.topology import read_topology
from horizon.records import StepSplit
from horizon.report.environment import describe_run
from horizon.report.facts import FILE, RunFacts, Status
from horizon.report.page import require_report_extra

log = logging.getLogger(__name__)

T = TypeVar("T")


class Planned(Protocol):
    """The engine, as far as it is asked here."""

    @property
    def plan(self) -> MemoryPlan:
        """What it uses."""

    @property
    def device(self) -> torch.device:
        """Where blocks compute."""


class RunRecord:
    """A context manager around a run that writes into `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._facts: RunFacts | None = None

    def began(
        self, engine: Planned, first_step: int, validation_loss: float | None, sample: str | None, prompt: str | None
    ) -> None:
        """Steps are about to begin, after `first_step` that were done before."""
        facts, plan = self._gathered, engine.plan
        used = [tier for tier in plan.limits.tiers if plan.num_bytes(tier)]
        facts.device, facts.first_step, facts.num_parameters = str(engine.device), first_step, plan.num_parameters
        facts.planned = [line for line in (*plan.lines, *plan.activations) if line.num_bytes]
        facts.limits = {tier: plan.limits.of(tier)[0] for tier in used}
        facts.predicted = plan.prediction
        facts.validation_loss_before, facts.sample_before, facts.prompt = validation_loss, sample, prompt
        facts.write(self.folder)

    def recorded(self, split: StepSplit | None) -> None:
        """Where the time of the recorded steps went is known."""
        self._gathered.split = split

    @property
    def _gathered(self) -> RunFacts:
        if self._facts is None:
            environment = describe_run(command_line(sys.orig_argv), read_topology(), 0.0)
            self._facts = RunFacts(started=self._started, environment=environment)
        return self._facts

    def __enter__(self) -> Self:
        self._started, self._facts = time.time(), None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._end(error)
            path = write_report_of(self.folder)
            print(f"report   {path}", flush=True)
        except ConfigError as missing:
            log.info("%s; then horizon report %s", missing, self.folder)
        except Exception:  # whatever is wrong with the report, the run has ended as it has
            log.warning("the report of %s could not be written", self.folder, exc_info=True)

    def _end(self, error: BaseException | None) -> None:
        facts = self._gathered
        facts.ended = time.time()
        facts.environment = replace(facts.environment, seconds=facts.ended - facts.started)
        if error is None:
            facts.status = Status.finished
        elif isinstance(error, KeyboardInterrupt):
            facts.status = Status.interrupted
        else:
            facts.status, facts.error = Status.failed, f"{type(error).__name__}: {error}"
            if not isinstance(error, HorizonError):
                facts.traceback = "".join(traceback.format_exception(error))
        self.folder.mkdir(parents=True, exist_ok=True)
        facts.write(self.folder)


def command_line(arguments: Sequence[str]) -> list[str]:
    """What was typed, of an interpreter's own `arguments`, whose paths differ from machine to machine."""
    typed = list(arguments[1:])
    if typed[:2] == ["-m", "horizon"]:
        typed = typed[1:]
    if typed and Path(typed[0]).name == "horizon":
        return ["horizon", *typed[1:]]
    return ["python", *typed]


def note_failure(folder: Path, error: HorizonError) -> None:
    """Keep what a run failed with before it could begin a record of its own."""
    if not (folder / FILE).exists():
        with suppress(type(error)), RunRecord(folder):
            raise error


def write_report_of(folder: Path) -> Path:
    """The report of a run's folder, in that folder; gives the page's path.

    Raises:
        ConfigError: a library that it needs is not installed.
        DataError: the folder holds something that no run wrote.
    """
    require_report_extra()
    from horizon.report.run_report import REPORT, write_report  # here: matplotlib and jinja2 are no requirements
    from horizon.report.runs import read_run

    write_report(read_run(folder), folder / REPORT)
    return folder / REPORT


class Recorded(Protocol):
    """What runs, and has a record."""

    record: RunRecord


def keeps_record(run: Callable[..., T]) -> Callable[..., T]:
    """A method of something that has a record, with that record open around it."""

    @functools.wraps(run)
    def with_record(self: Recorded) -> T:
        with self.record:
            return run(self)

    return with_record
