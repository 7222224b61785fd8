"""Metrics to the programs that people watch runs with, in folders of the run's own unless those are told otherwise.

Every number of a row is passed on as `train/loss`, `eval/accuracy`, `checkpoint/stall_s` and so on, at the row's step;
docs/metrics.md lists them. None of them waits for a network or, step by step, for a disk.
"""

from __future__ import annotations

import dataclasses
import json
import math
import netrc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self
from urllib.parse import urlsplit

from horizon.config.schema import HorizonConfig, TrackerName
from horizon.config.values import choice
from horizon.errors import ConfigError
from horizon.records import CheckpointRow, EvalRow, RunSummary, StepRow
from horizon.report.callbacks import Callback

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PACKAGES = {TrackerName.tensorboard: "tensorboard", TrackerName.wandb: "wandb", TrackerName.mlflow: "mlflow"}
MODULES = PACKAGES | {TrackerName.tensorboard: "torch.utils.tensorboard"}
IDS = "trackers.json"  # what the trackers call the run, by their names: a resumed run is the same to them
PROJECT = "horizon"
FLUSH_S = 5.0  # between two times that MLflow's database is written
UNTOLD = {"step", "time"}  # a tracker has its own of both


class Tracker(Protocol):
    """A program that collects numbers."""

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Take numbers of a step; returns at once."""

    def close(self, failed: bool) -> None:
        """Have all of them on their way. Idempotent."""


class Tracking(Callback):
    """What a run tells, in numbers, to one tracker."""

    def __init__(self, name: TrackerName, tracker: Tracker) -> None:
        self._name, self._tracker = name, tracker

    @property
    def name(self) -> str:
        """That of the tracker."""
        return self._name

    def on_step(self, row: StepRow) -> None:
        """Log the row's numbers."""
        self._tracker.log(numbers_of("train", row), row.step)

    def on_eval(self, row: EvalRow) -> None:
        """Log the row's numbers."""
        self._tracker.log(numbers_of("eval", row), row.step)

    def on_checkpoint(self, row: CheckpointRow) -> None:
        """Log the row's numbers."""
        self._tracker.log(numbers_of("checkpoint", row), row.step)

    def on_end(self, summary: RunSummary) -> None:
        """The run has finished."""
        self._tracker.close(failed=False)

    def on_failure(self, error: BaseException) -> None:
        """The run has failed."""
        self._tracker.close(failed=True)


def require_trackers(names: Sequence[str]) -> None:
    """Raise a ConfigError unless all are trackers that can be used, each named once."""
    for name in names:
        package = PACKAGES[choice(TrackerName, name, "trackers")]
        if find_spec(package) is None:
            raise ConfigError(
                f"trackers={name} needs the package {package}, which is not installed: pip install '.[{name}]'"
            )
    if len(set(names)) < len(names):
        raise ConfigError(f"trackers=[{','.join(names)}] names one twice")


def import_trackers(names: Sequence[TrackerName]) -> None:
    """Load the packages: done before a plan is made, what they take of the host's memory is counted there."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else they report uses and crashes to their makers
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in names:
        import_module(MODULES[name])


def open_trackers(config: HorizonConfig, folder: Path, done: int) -> list[Callback]:
    """The trackers that the settings name, ready; `done` steps of the folder's run are known to them.

    Raises:
        ConfigError: one cannot begin, and all of them are closed.
    """
    import_trackers(config.trackers)
    opened: list[Callback] = []
    with ExitStack() as undo:
        for name in config.trackers:
            try:
                tracker = OPEN[name](config, folder, done)
            except Exception as error:  # of their own kinds
                raise ConfigError(f"trackers={name} cannot begin: {type(error).__name__}: {error}") from error
            undo.callback(tracker.close, failed=True)
            opened.append(Tracking(name, tracker))
        undo.pop_all()
    return opened


def numbers_of(group: str, row: DataclassInstance) -> dict[str, float]:
    """The finite numbers of a row, those inside of lists and dicts too: `group/field`, `group/field/key`."""
    fields = {key: value for key, value in dataclasses.asdict(row).items() if key not in UNTOLD}
    return {name: value for name, value in _flat(group, fields) if math.isfinite(value)}


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(f"{prefix}/{key}", item)
    elif isinstance(value, int | float):
        yield prefix, float(value)


# ---- the trackers


class TensorBoard:
    """Event files in the run's folder, for `tensorboard --logdir FOLDER`."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    @classmethod
    def open(cls, config: HorizonConfig, folder: Path, done: int) -> Self:
        """Events of steps after `done`, which a killed run may have left, are void."""
        from torch.utils.tensorboard import SummaryWriter

        make: Any = SummaryWriter  # torch does not type it
        writer = make(log_dir=str(folder / "tensorboard"), purge_step=done + 1 if done else None)
        writer.add_text("settings", f"```json\n{_settings(config)}\n```", done)
        return cls(writer)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Hand them to the thread that writes."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        """Have all of them on disk."""
        self._writer.close()


class WandB:
    """Weights & Biases: files in the run's folder, for `wandb sync`, or live for who logged in or set its mode."""

    def __init__(self, run: Any) -> None:
        self._run = run

    @classmethod
    def open(cls, config: HorizonConfig, folder: Path, done: int) -> Self:
        """W&B's own environment variables apply; it gets the settings, and nothing of what is printed."""
        import wandb

        offline = not (os.environ.get("WANDB_MODE") or _is_logged_in())
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", folder.resolve().name),
            id=_known(folder, TrackerName.wandb, done),
            resume="allow",
            dir=str(folder),
            config=json.loads(_settings(config)),
            mode="offline" if offline else None,
            settings=wandb.Settings(console="off", silent=True),
        )
        _remember(folder, TrackerName.wandb, run.id)
        run.define_metric("step")
        run.define_metric("*", step_metric="step")  # of checkpoints it hears after later steps, which its own forbids
        return cls(run)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Hand them to W&B's own process."""
        self._run.log({"step": step, **numbers})

    def close(self, failed: bool) -> None:
        """Have all of them where they belong."""
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A database in the run's folder, for `mlflow ui`, or the server of MLFLOW_TRACKING_URI."""

    def __init__(self, client: Any, run_id: str, metric: Any) -> None:
        self._client, self._run_id, self._metric = client, run_id, metric
        self._waiting: list[Any] = []
        self._flushed = time.monotonic()

    @classmethod
    def open(cls, config: HorizonConfig, folder: Path, done: int) -> Self:
        """MLflow's own environment variables apply; the settings become tags."""
        from mlflow import MlflowClient
        from mlflow.entities import Metric, RunTag

        here = folder.resolve()
        client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{here / 'mlflow.db'}"))
        run_id = _known(folder, TrackerName.mlflow, done)
        if run_id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            experiment = client.get_experiment_by_name(name)
            found = client.create_experiment(name) if experiment is None else experiment.experiment_id
            run_id = client.create_run(found, run_name=here.name).info.run_id
            _remember(folder, TrackerName.mlflow, run_id)
        client.log_batch(run_id, tags=[RunTag("settings", _settings(config))])
        client.update_run(run_id, status="RUNNING")
        return cls(client, run_id, Metric)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Keep them until the next time that the database is written."""
        now = int(time.time() * 1000)
        self._waiting += [self._metric(name, value, now, step) for name, value in numbers.items()]
        if time.monotonic() - self._flushed >= FLUSH_S:
            self._flush()

    def close(self, failed: bool) -> None:
        """Write what waits, and how the run ended."""
        self._flush()
        self._client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")

    def _flush(self) -> None:
        batch_size = 1000  # that its interface allows
        for start in range(0, len(self._waiting), batch_size):
            self._client.log_batch(self._run_id, metrics=self._waiting[start : start + batch_size])
        self._waiting, self._flushed = [], time.monotonic()


OPEN: dict[TrackerName, Callable[[HorizonConfig, Path, int], Tracker]] = {
    TrackerName.tensorboard: TensorBoard.open,
    TrackerName.wandb: WandB.open,
    TrackerName.mlflow: MLflow.open,
}


def _settings(config: HorizonConfig) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2)


def _is_logged_in() -> bool:
    """Whether W&B has a key, in the environment or where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _ids(folder: Path) -> dict[str, str]:
    path = folder / IDS
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _known(folder: Path, name: TrackerName, done: int) -> str | None:
    """What the tracker calls the run that this one goes on with; None: it begins anew."""
    return _ids(folder).get(name) if done else None


def _remember(folder: Path, name: TrackerName, run_id: str) -> None:
    (folder / IDS).write_text(json.dumps({**_ids(folder), name: run_id}) + "\n", encoding="utf-8")
