"""The log of a zeroth-order run of `horizon train`: a checkpoint of every step, in kilobytes.

`replay.jsonl` in the run's folder gets a line a step, after the step's line in `metrics.jsonl`: whenever the run is
killed, the metrics have all steps that the log has. One run at a time writes there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from horizon.checkpoint.folder import FolderLock
from horizon.config.schema import HorizonConfig
from horizon.errors import CheckpointError, ConfigError
from horizon.interrupts import Interrupts
from horizon.records import CheckpointRow
from horizon.run_checkpoints import AUTO, Note, RunCheckpoints, Start
from horizon.zo.replay import ReplayLog, ReplayWriter, read_log, whole_lines

if TYPE_CHECKING:
    from horizon.engine import Engine

LOG_FILE = "replay.jsonl"
PLACE = "step", "tokens", "epoch", "position", "patience"  # of what a run notes, all that changes from step to step


class RunLog:
    """A context manager that holds the run's folder; to the trainer what `RunCheckpoints` is.

    Raises:
        CheckpointError: another run writes there.
    """

    is_on = True
    last = None  # no checkpoint besides the log

    def __init__(self, config: HorizonConfig, output_dir: Path) -> None:
        self._model, self._resume = config.model.path or "", config.resume
        self._folder, self.path = output_dir, output_dir / LOG_FILE
        self._release = ExitStack()

    def __enter__(self) -> Self:
        self._release.enter_context(FolderLock(self._folder))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._release.close()

    def find_start(self) -> Start:
        """Where `resume` says that the run begins.

        Raises:
            CheckpointError: there is no such log, it cannot be read, or does not tell where in its data the run was.
            ConfigError: this run's folder holds a log, and is not to be resumed.
        """
        exists = self.path.is_file()
        if self._resume == AUTO:
            print(f"resume=auto: {self.path if exists else f'no {self.path}, starting anew'}", flush=True)
            path = self.path if exists else None
        else:
            path = None if self._resume is None else find_log(Path(self._resume))
        start = Start() if path is None else self._start(path)
        if exists and not self.holds(start) and read_log(self.path).records:
            raise ConfigError(
                f"{self.path} is of an earlier run; set resume=auto to go on from it, remove it, or choose another "
                "hydra.run.dir"
            )
        return start

    def _start(self, path: Path) -> Start:
        run = read_log(path).run
        if "step" not in run:
            raise CheckpointError(
                f"{path} does not tell the place in its data: a script wrote it, or an earlier version; go on from the "
                "weights that horizon replay rebuilds (model.path)"
            )
        return Start(path, run, weights_alone="begin with the weights that horizon replay rebuilds (model.path)")

    def holds(self, start: Start) -> bool:
        """Whether a run that begins there goes on with what this run's folder holds."""
        return start.folder is not None and start.folder.resolve() == self.path.resolve()

    @property
    def newest(self) -> Path | None:
        """The log, if a step is in it."""
        return self.path if self.path.is_file() else None

    def plan(self, engine: Engine) -> None:
        """A log needs no room."""

    def begin(self, start: Start, engine: Engine, note: Note, tell: Callable[[CheckpointRow], None]) -> None:
        """Training begins: take the steps that were taken before. A log has no checkpoints to `tell` of.

        Raises:
            CheckpointError: the log is of other weights or settings.
        """
        self._engine, self._note = engine, note
        if start.folder is None:
            run = {key: value for key, value in note().items() if key != "tokenizer"}
            beginning = replace(engine.replay_log.beginning, model=self._model)
            text = ReplayLog(beginning, [], run).text()
        else:
            text = whole_lines(start.folder)
            engine.replay(start.folder)
        self._num_written = len(engine.replay_log.records)
        self._writer = ReplayWriter(self.path, text)
        self._release.callback(self._writer.close)

    def after_step(self, step: int, tokens: int, interrupts: Interrupts) -> None:
        """Write the step's line, if it was not skipped.

        Raises:
            KeyboardInterrupt: the run was asked to stop, and what it did is on disk.
        """
        records = self._engine.replay_log.records
        if len(records) > self._num_written:
            run = self._note()
            self._writer.write(records[-1], {key: run[key] for key in PLACE})
            self._num_written = len(records)
        if interrupts.requested is not None:
            self.finish(step)
            print(f"\n{interrupts.requested}: step {step} is in {self.path}", flush=True)
            raise KeyboardInterrupt

    def begin_last(self, step: int) -> None:
        """The last step is in the log."""

    def finish(self, step: int) -> None:
        """Have all steps on disk, whatever happens to the machine."""
        self._writer.sync()


def open_checkpoints(config: HorizonConfig, output_dir: Path) -> RunCheckpoints | RunLog:
    """What a run goes on from: checkpoints, or the log of its steps."""
    return RunLog(config, output_dir) if config.optim.name == "mezo" else RunCheckpoints(config, output_dir)


def find_log(folder: Path) -> Path:
    """The log that `folder` is, or that a run's folder holds.

    Raises:
        CheckpointError: there is none.
    """
    folder = folder.expanduser()
    path = folder / LOG_FILE if folder.is_dir() else folder
    if not path.is_file():
        raise CheckpointError(
            f"resume={folder}: no {LOG_FILE} there; expected it, or the folder of a run of optim=mezo"
        )
    return path
