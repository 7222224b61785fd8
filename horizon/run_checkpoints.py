"""The checkpoints of a run of `horizon train`: where it goes on from, when it saves, and what it keeps.

They lie in the run's folder, `checkpoints/step-XXXXXXXX`, and one run at a time writes there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from horizon.checkpoint.folder import FolderLock, flush, list_checkpoints, remove_left_overs, step_folder
from horizon.checkpoint.format import MANIFEST
from horizon.checkpoint.manifest import read_manifest
from horizon.checkpoint.restore import differences
from horizon.checkpoint.saves import Save
from horizon.checkpoint.schedule import Due, parse_interval, prune
from horizon.config.schema import CheckpointConfig, HorizonConfig
from horizon.data import Rows
from horizon.errors import CheckpointError, ConfigError, HorizonError
from horizon.interrupts import Interrupts
from horizon.records import CheckpointRow
from horizon.report.metrics import METRICS_FILE, MetricsWriter
from horizon.units import format_bytes

if TYPE_CHECKING:
    from horizon.engine import Engine

log = logging.getLogger(__name__)

FOLDER, METRICS = "checkpoints", "checkpoints.jsonl"
AUTO = "auto"
Note: TypeAlias = Callable[[], dict[str, Any]]  # where a run stands, for the one that goes on; its tokenizer, too


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run begins: at a checkpoint, or (folder None) anew."""

    folder: Path | None = None  # of a checkpoint, or the log of a zeroth-order run
    run: dict[str, Any] = field(default_factory=dict)  # what the run that saved it noted; empty: its weights alone
    weights_alone: str = "take its weights alone (resume_weights_only=true)"  # what else to do with it

    @property
    def step(self) -> int:
        """Steps that were done before."""
        return int(self.run.get("step", 0))

    @property
    def tokens(self) -> int:
        """Tokens of these steps."""
        return int(self.run.get("tokens", 0))

    def check_data(self, now: dict[str, Any]) -> None:
        """Raise a CheckpointError unless the rows, and their order, are those that the run had."""
        if self.run and (differing := differences("", self.run["data"], now)):
            raise CheckpointError(
                f"{self.folder} was saved with other data: {'; '.join(differing)}; set them as they were, or "
                f"{self.weights_alone}"
            )


def check_checkpoint_settings(config: HorizonConfig) -> None:
    """Refuse settings that cannot work.

    Raises:
        ConfigError: naming the setting.
    """
    settings = config.checkpoint
    if settings.save_every is not None:
        parse_interval(settings.save_every)
    if settings.keep is not None and settings.keep < 1:
        raise ConfigError(f"checkpoint.keep={settings.keep} must be at least 1, or null to keep all")
    if settings.keep_best and not config.eval.rows:
        raise ConfigError("checkpoint.keep_best=true has no loss to go by: set eval.rows above 0")
    if config.optim.name == "mezo" and (settings.save_every is not None or settings.keep_best):
        raise ConfigError(
            f"checkpoint.save_every={settings.save_every} and keep_best={settings.keep_best} are not for optim=mezo, "
            "whose replay.jsonl is a checkpoint of every step: leave them out, resume=auto goes on from that log"
        )
    if config.optim.name == "mezo" and config.resume_weights_only:
        raise ConfigError(
            "resume_weights_only=true is not for optim=mezo: write the weights as a folder (horizon replay, or horizon "
            "export) and set model.path to it"
        )
    if config.resume_weights_only and config.resume in (None, AUTO):
        raise ConfigError(f"resume_weights_only=true with resume={config.resume}: set resume to a checkpoint's folder")


def data_facts(config: HorizonConfig, rows: Rows) -> dict[str, Any]:
    """What is in the rows, and what their order depends on, by the settings' names."""
    return {
        "data (hash of all rows)": rows.fingerprint(),
        "rows": len(rows),
        "train.seq_len": config.train.seq_len,
        "data.packing": config.data.packing,
        "data.shuffle": config.data.shuffle,
        "seed": config.seed,
    }


class RunCheckpoints:
    """A context manager that holds the run's folder of checkpoints; does nothing where they are switched off.

    Raises:
        CheckpointError: another run writes there.
        ConfigError: an earlier run did, and this one is not to go on from it.
    """

    def __init__(self, config: HorizonConfig, output_dir: Path) -> None:
        self._config: CheckpointConfig = config.checkpoint
        self._resume, self._weights_only = config.resume, config.resume_weights_only
        self.folder, self._metrics_path = output_dir / FOLDER, output_dir / METRICS
        self._rows_path = output_dir / METRICS_FILE
        self.is_on = self._config.save_every is not None
        self._release = ExitStack()
        self._save: Save | None = None
        self._pruning: threading.Thread | None = None
        self._is_late = False
        self.last: Path | None = None  # the checkpoint begun last
        self._last_step = -1

    def __enter__(self) -> Self:
        if self.is_on or self._resume == AUTO:
            self._release.enter_context(FolderLock(self.folder))
            for path in remove_left_overs(self.folder):
                print(f"removed {path.name}, which a run that was stopped has left unfinished", flush=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pruning is not None:
            self._pruning.join()
        self._release.close()

    def find_start(self) -> Start:
        """Where `resume` says that the run begins.

        Raises:
            CheckpointError: there is no such checkpoint, or its manifest is damaged.
            ConfigError: this run's folder holds checkpoints of later steps, or it is not to be resumed at all.
        """
        existing = list_checkpoints(self.folder)
        if self._resume is None:
            start = Start()
        elif self._resume == AUTO:
            start = Start(existing[-1][1]) if existing else Start()
            print(f"resume=auto: {start.folder or f'no checkpoint in {self.folder}, starting anew'}", flush=True)
        else:
            start = Start(find_checkpoint(Path(self._resume), "resume="))
        if start.folder is not None and not self._weights_only:
            start = Start(start.folder, read_manifest(start.folder).run)
            if "step" not in start.run:
                raise CheckpointError(f"{start.folder} was not saved by horizon train; set resume_weights_only=true")
        later = [folder for step, folder in existing if step > start.step]
        if self.is_on and later:
            raise ConfigError(
                f"{later[-1]} is of a later step than this run would begin with; set resume=auto to go on from it, "
                "remove it, or choose another hydra.run.dir"
            )
        return start

    def holds(self, start: Start) -> bool:
        """Whether a run that begins there goes on with what this run's folder holds."""
        return start.folder is not None and start.folder.resolve().parent == self.folder.resolve()

    @property
    def newest(self) -> Path | None:
        """The last checkpoint of the run that is on disk."""
        existing = list_checkpoints(self.folder) if self.is_on else []
        return existing[-1][1] if existing else None

    def plan(self, engine: Engine) -> None:
        """Have the engine's plan include what saves need."""
        if self.is_on:
            engine.plan_checkpoints(self._config.staging)

    def begin(self, start: Start, engine: Engine, note: Note, tell: Callable[[CheckpointRow], None]) -> None:
        """Training begins.

        Args:
            note: gives what a checkpoint is to remember of the run.
            tell: hears of each checkpoint when it is on disk.
        """
        if self.is_on:
            assert self._config.save_every is not None
            self._engine, self._note, self._tell = engine, note, tell
            self._due = Due(parse_interval(self._config.save_every), start.step, start.tokens)
            self._last_step = start.step if start.folder is not None else -1
            self._metrics = self._release.enter_context(MetricsWriter(self._metrics_path, append=True))

    def after_step(self, step: int, tokens: int, interrupts: Interrupts) -> None:
        """Save if it is time, or if the run was asked to stop.

        Raises:
            CheckpointError: a save has failed.
            KeyboardInterrupt: the run was asked to stop, and what it did is on disk.
        """
        if not self.is_on:
            return
        if self._save is not None and self._save.done:
            self._report()
        if interrupts.requested is not None:
            print(f"\n{interrupts.requested}: saving step {step}; once more stops at once", flush=True)
            self.finish(step)
            print(f"saved {self.last}", flush=True)
            raise KeyboardInterrupt
        if self._due.is_due(step, tokens):
            if self._save is None:
                self._due.saved(step, tokens)
                self._begin(step)
            elif not self._is_late:
                self._is_late = True
                log.warning(
                    "step %d: a checkpoint is due while that of step %d is still being written; it follows as soon as "
                    "that is done. Set a longer checkpoint.save_every", step, self._last_step,
                )  # fmt: skip

    def finish(self, step: int) -> None:
        """Have `step` on disk; returns when it is.

        Raises:
            CheckpointError: a save has failed.
        """
        if self.is_on:
            self.begin_last(step)
            if self._save is not None:
                self._report()

    def begin_last(self, step: int) -> None:
        """Begin to save `step` unless that was done before."""
        if self.is_on and self._last_step != step:
            if self._save is not None:
                self._report()
            self._begin(step)

    def _begin(self, step: int) -> None:
        flush(self._rows_path)  # a checkpoint whose rows are lost would leave a gap
        run = self._note()
        tokenizer = run.pop("tokenizer")
        self.last, self._last_step, self._is_late = step_folder(self.folder, step), step, False
        self._save = self._engine.save_checkpoint(self.last, run=run, tokenizer=tokenizer)

    def _report(self) -> None:
        """Wait for the save under way, say what it took, and remove checkpoints that are not to be kept."""
        assert self._save is not None
        save, self._save = self._save, None
        row = save.wait()
        self._metrics.write(row)
        self._tell(row)
        log.info(
            "checkpoint %s: %s in %.1f s, %s/s; training waited %.3f s, of that %.3f s for the disk",
            save.folder.name, format_bytes(row.num_bytes), row.seconds, format_bytes(row.bytes_per_s), row.stall_s,
            row.room_s,
        )  # fmt: skip
        if self._pruning is not None:
            self._pruning.join()
        self._pruning = threading.Thread(target=self._prune, name="horizon-prune", daemon=True)
        self._pruning.start()

    def _prune(self) -> None:
        try:
            prune(self.folder, self._config.keep, self._config.keep_best)
        except (HorizonError, OSError) as error:
            log.warning("old checkpoints could not be removed: %s", error)


def find_checkpoint(folder: Path, key: str = "") -> Path:
    """The checkpoint that a folder is, or the last one of a run's folder; `key` names the setting in the error.

    Raises:
        CheckpointError: there is none.
    """
    folder = folder.expanduser()
    if (folder / MANIFEST).is_file():
        return folder
    found = list_checkpoints(folder / FOLDER) or list_checkpoints(folder)
    if not found:
        raise CheckpointError(f"{key}{folder}: no checkpoint there; expected the folder of one, or of a run")
    return found[-1][1]
