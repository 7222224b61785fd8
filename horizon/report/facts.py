"""`run.json`: what a run says of itself beside its steps: where it ran, what was planned, how it began and ended."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from horizon.errors import DataError
from horizon.plan.memory import Line
from horizon.plan.prediction import StepPrediction
from horizon.records import StepSplit, Traffic
from horizon.report.measurements import Run
from horizon.report.metrics import from_row, to_json

FORMAT = 1
FILE = "run.json"


class Status(StrEnum):
    """How a run ended."""

    running = "running"  # it has not, or it was killed
    finished = "finished"
    failed = "failed"
    interrupted = "interrupted"  # by Ctrl-C or SIGTERM


@dataclass(kw_only=True, slots=True)
class RunFacts:
    """The content of `run.json`; written when steps begin, and when the run ends."""

    format: int = FORMAT
    status: Status = Status.running
    error: str | None = None  # what ended a failed run, with the error's type
    traceback: str | None = None  # of an error that has no name in horizon.errors
    started: float  # seconds since 1970
    ended: float | None = None
    environment: Run
    device: str | None = None  # where blocks computed; None, here and below: it ended before it was known
    first_step: int = 0  # steps done before, by the run whose checkpoint this one went on from
    num_parameters: int | None = None
    planned: list[Line] = field(default_factory=list)  # bytes by tier and purpose
    limits: dict[str, int] = field(default_factory=dict)  # bytes that each of these tiers may use
    predicted: StepPrediction | None = None
    split: StepSplit | None = None  # where the time of the recorded steps went
    validation_loss_before: float | None = None
    prompt: str | None = None
    sample_before: str | None = None

    def write(self, folder: Path) -> None:
        """Replace the file in a run's folder, whole."""
        path = folder / f".{FILE}.part"
        path.write_text(to_json(self, indent=1) + "\n", encoding="utf-8")
        os.replace(path, folder / FILE)

    @classmethod
    def read(cls, folder: Path) -> RunFacts | None:
        """What `write` wrote; None where there is no such file.

        Raises:
            DataError: it is something else.
        """
        path = folder / FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise DataError(f"{path} has format {content['format']}, this version of horizon reads {FORMAT}")
            predicted, split = content["predicted"], content["split"]
            return cls(**content | {
                "status": Status(content["status"]), "environment": Run(**content["environment"]),
                "planned": [Line(**line) for line in content["planned"]],
                "predicted": None if predicted is None else StepPrediction(**predicted),
                "split": None if split is None else split_from(split),
            })  # fmt: skip
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is not a file that a run of horizon train writes ({error!r})") from error


def split_from(row: dict[str, object]) -> StepSplit:
    """The record of a step's split that `to_json` wrote."""
    traffic = row["traffic"]
    assert isinstance(traffic, list)
    return from_row(StepSplit, row | {"traffic": [Traffic(**one) for one in traffic]})
